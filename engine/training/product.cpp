#include "training/product.hpp"

#include "kernels/scratch.hpp"
#include "kernels/tiles.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define TRIOLLAMA_DOTS 1
#endif

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && TRIOLLAMA_DOTS && defined(__linux__)
#define TRIOLLAMA_TILES 1
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && (defined(__AVX2__) || defined(__AVX512F__) || defined(__ARM_NEON))
#define TRIOLLAMA_VECTORS 1
#endif

namespace triollama::native {

namespace {

// A product here is C[j][i] = sum over k of L[j][k] R[i][k]: in ggml's terms i runs over the rows of src0, and j over
// the columns of src1. C has i contiguous. L is made k-contiguous beforehand, as a node that products share; R, of any
// type and either order, is dequantised in panels of some i and all k, and each panel meets all of L.

[[maybe_unused]] int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// R of one matrix of the batch.
struct Right {
    const char * data;
    ggml_type type;
    int64_t   n_i, n_k;
    size_t    stride;       // bytes from row to row
    bool      k_contiguous; // a row is one i and all k, else one k and all i
    ggml_to_float_t to_float;   // null for F32

    // Values [first, first + n) of a row, in `buffer` unless they are F32 where they lie.
    const float * read(int64_t row, int64_t first, int64_t n, float * buffer) const {
        const char * at = data + static_cast<size_t>(row) * stride + ggml_row_size(type, first);
        if (!to_float) {
            return reinterpret_cast<const float *>(at);
        }
        to_float(at, buffer, n);
        return buffer;
    }
};

// Where products go, i contiguous, and what is added to them: rows that lie alike, or null.
struct Sink {
    char *       out;
    size_t       stride;         // bytes from j to j
    const char * addend;
    size_t       addend_stride;

    float * row(int64_t j) const { return reinterpret_cast<float *>(out + static_cast<size_t>(j) * stride); }
    const float * added(int64_t j) const {
        return addend ? reinterpret_cast<const float *>(addend + static_cast<size_t>(j) * addend_stride) : nullptr;
    }
};

// What fills panels and multiplies them; made for one processor feature each.
struct Kernel {
    int64_t panel_i;      // i in a panel's unit
    int64_t element;      // bytes of a panel's element
    int64_t k_step;       // k is padded to a multiple with zeros
    // Values [first, first + n) of i and all k into as many panels as that takes, each `panel_bytes` after the last.
    void (*pack)(const Right & right, int64_t first, int64_t n, char * panels, size_t panel_bytes, float * buffer);
    // All j in [first, last) against n <= panel_i values of i. `left` has `left_stride` bytes from j to j.
    void (*multiply)(const char * left, size_t left_stride, int64_t first, int64_t last, const char * panel, int64_t n,
                     int64_t n_k, const Sink & sink);
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__F16C__)

// Two common types whose rows ggml dequantises value by value; the same values, bit for bit. The layout is GGUF's.
constexpr int64_t block_values = 32;

float scale_of(const uint8_t * block) {
    uint16_t half;
    std::memcpy(&half, block, sizeof(half));
    return _cvtsh_ss(half);
}

void store_scaled(__m256i bytes, float scale, float * out) {
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512i low  = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes));
    const __m512i high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1));
    _mm512_storeu_ps(out, _mm512_mul_ps(factor, _mm512_cvtepi32_ps(low)));
    _mm512_storeu_ps(out + 16, _mm512_mul_ps(factor, _mm512_cvtepi32_ps(high)));
}

void dequantize_q8_0(const void * row, float * out, int64_t n) {
    const uint8_t * block = static_cast<const uint8_t *>(row);
    for (int64_t i = 0; i < n; i += block_values, block += 2 + block_values) {
        store_scaled(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(block + 2)), scale_of(block), out + i);
    }
}

// The scale, a fifth bit for each value, then 16 bytes with the low bits of values j and j + 16.
void dequantize_q5_0(const void * row, float * out, int64_t n) {
    const uint8_t * block = static_cast<const uint8_t *>(row);
    for (int64_t i = 0; i < n; i += block_values, block += 6 + block_values / 2) {
        uint32_t fifth;
        std::memcpy(&fifth, block + 2, sizeof(fifth));
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i *>(block + 6));
        const __m256i low    = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), _mm256_set1_epi8(15));
        // Without the fifth bit 16 is to be subtracted.
        const __m256i values = _mm256_mask_sub_epi8(low, ~fifth, low, _mm256_set1_epi8(16));
        store_scaled(values, scale_of(block), out + i);
    }
}

[[maybe_unused]] ggml_to_float_t dequantizer(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:  return nullptr;
        case GGML_TYPE_Q8_0: return dequantize_q8_0;
        case GGML_TYPE_Q5_0: return dequantize_q5_0;
        default:             return ggml_get_type_traits(type)->to_float;
    }
}

#else

[[maybe_unused]] ggml_to_float_t dequantizer(ggml_type type) {
    return type == GGML_TYPE_F32 ? nullptr : ggml_get_type_traits(type)->to_float;
}

#endif

#if defined(__AVX512F__)

// Exchanges rows and columns of 16 x 16 32-bit values.
void transpose_16(__m512i * r) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i]     = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i]     = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i]      = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i]  = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i]  = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        r[i]     = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

#endif

#if TRIOLLAMA_VECTORS

#if defined(__AVX512F__)
constexpr int lanes = 16, rows_at_once = 12;
#elif defined(__AVX2__)
constexpr int lanes = 8, rows_at_once = 6;
#else
constexpr int lanes = 4, rows_at_once = 8;
#endif
constexpr int vector_i = 2 * lanes;
typedef float vec __attribute__((vector_size(lanes * sizeof(float))));
typedef float unaligned_vec __attribute__((vector_size(lanes * sizeof(float)), aligned(4), may_alias));

// panel[k][vector_i]
void pack_vectors(const Right & right, int64_t first, int64_t n, char * panels, size_t panel_bytes, float * buffer) {
    if (!right.k_contiguous) {
        for (int64_t k = 0; k < right.n_k; ++k) {
            const float * row = right.read(k, first, n, buffer);
            for (int64_t i = 0; i < n; i += vector_i) {
                float * to = reinterpret_cast<float *>(panels + static_cast<size_t>(i / vector_i) * panel_bytes) + k * vector_i;
                const int64_t some = std::min<int64_t>(vector_i, n - i);
                std::fill(std::copy(row + i, row + i + some, to), to + vector_i, 0.0f);
            }
        }
        return;
    }
    constexpr int together = lanes == 16 ? 16 : 8;   // rows read side by side, so that writes fill lines
    float * panel = reinterpret_cast<float *>(panels);
    for (int64_t i = 0; i < vector_i; i += together) {
        const float * rows[together];
        for (int64_t r = 0; r < together; ++r) {
            rows[r] = i + r < n ? right.read(first + i + r, 0, right.n_k, buffer + r * right.n_k) : nullptr;
        }
        int64_t k = 0;
#if defined(__AVX512F__)
        for (; k + lanes <= right.n_k; k += lanes) {
            __m512i square[lanes];
            for (int r = 0; r < lanes; ++r) {
                square[r] = rows[r] ? _mm512_loadu_si512(rows[r] + k) : _mm512_setzero_si512();
            }
            transpose_16(square);
            for (int r = 0; r < lanes; ++r) {
                _mm512_storeu_si512(panel + (k + r) * vector_i + i, square[r]);
            }
        }
#endif
        for (; k < right.n_k; ++k) {
            for (int64_t r = 0; r < together; ++r) {
                panel[k * vector_i + i + r] = rows[r] ? rows[r][k] : 0.0f;
            }
        }
    }
}

void add_some(float * to, const float * added, int64_t n) {
    for (int64_t i = 0; added && i < n; ++i) {
        to[i] += added[i];
    }
}

// `vectors`: how many of a panel's two have values.
template <int rows, int vectors>
void multiply_rows(const char * left, size_t left_stride, const float * panel, int64_t n, int64_t n_k, const Sink & sink,
                   int64_t first) {
    vec sum[rows][vectors] = {};
    for (int64_t k = 0; k < n_k; ++k) {
        vec b[vectors];
        for (int v = 0; v < vectors; ++v) {
            b[v] = *reinterpret_cast<const vec *>(panel + k * vector_i + v * lanes);
        }
        for (int r = 0; r < rows; ++r) {
            const float a = reinterpret_cast<const float *>(left + static_cast<size_t>(r) * left_stride)[k];
            for (int v = 0; v < vectors; ++v) {
                sum[r][v] += a * b[v];
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        float * target = sink.row(first + r);
        const float * added = sink.added(first + r);
        if (n == vectors * lanes) {
            for (int v = 0; v < vectors; ++v) {
                if (added) {
                    sum[r][v] += *reinterpret_cast<const unaligned_vec *>(added + v * lanes);
                }
                *reinterpret_cast<unaligned_vec *>(target + v * lanes) = sum[r][v];
            }
        } else {
            std::memcpy(target, sum[r], static_cast<size_t>(n) * sizeof(float));
            add_some(target, added, n);
        }
    }
}

template <int vectors>
void multiply_panel(const char * left, size_t left_stride, int64_t first, int64_t last, const float * panel, int64_t n,
                    int64_t n_k, const Sink & sink) {
    int64_t j = first;
    const auto step = [&](auto kernel, int rows) {
        kernel(left + static_cast<size_t>(j) * left_stride, left_stride, panel, n, n_k, sink, j);
        j += rows;
    };
    while (last - j >= rows_at_once) {
        step(multiply_rows<rows_at_once, vectors>, rows_at_once);
    }
    while (last - j >= 8) {
        step(multiply_rows<8, vectors>, 8);
    }
    while (last - j >= 4) {
        step(multiply_rows<4, vectors>, 4);
    }
    while (last > j) {
        step(multiply_rows<1, vectors>, 1);
    }
}

void multiply_vectors(const char * left, size_t left_stride, int64_t first, int64_t last, const char * memory, int64_t n,
                      int64_t n_k, const Sink & sink) {
    const float * panel = reinterpret_cast<const float *>(memory);
    (n <= lanes ? multiply_panel<1> : multiply_panel<2>)(left, left_stride, first, last, panel, n, n_k, sink);
}

const Kernel vector_kernel = { vector_i, sizeof(float), 1, pack_vectors, multiply_vectors };

#endif  // TRIOLLAMA_VECTORS

#if TRIOLLAMA_DOTS

// A tile is 16 rows of 64 bytes. tdpbf16ps adds to C, 16 x 16 floats, the product of A, 16 rows of 32 values of k, and
// B, whose row p holds for each of 16 columns the values 2 p and 2 p + 1 of k.
constexpr int64_t tile_k = 32, tile_i = 32, tile_j = 32;
constexpr size_t  tile_bytes = 1024;

__m512i bf16_pairs(const float * values) {   // 32 floats
    return (__m512i) _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + 16), _mm512_loadu_ps(values));
}

// For each 32 of k two tiles, of the first and the second 16 of i.
void pack_tiles(const Right & right, int64_t first, int64_t n, char * panels, size_t panel_bytes, float * buffer) {
    const int64_t n_k = right.n_k, padded = round_up(n_k, tile_k);
    if (right.k_contiguous) {
        for (int half = 0; half < 2; ++half) {
            const float * rows[16];
            const int64_t from = 16 * half;
            for (int64_t r = 0; r < 16; ++r) {
                float * own = buffer + r * padded;
                rows[r] = own;
                if (from + r >= n) {
                    std::fill(own, own + padded, 0.0f);
                    continue;
                }
                rows[r] = right.read(first + from + r, 0, n_k, own);
                if (padded != n_k) {
                    if (rows[r] != own) {
                        std::memcpy(own, rows[r], static_cast<size_t>(n_k) * sizeof(float));
                        rows[r] = own;
                    }
                    std::fill(own + n_k, own + padded, 0.0f);
                }
            }
            for (int64_t k = 0; k < padded; k += tile_k) {
                __m512i pairs[16];
                for (int r = 0; r < 16; ++r) {
                    pairs[r] = bf16_pairs(rows[r] + k);
                }
                transpose_16(pairs);
                char * tile = panels + static_cast<size_t>(k / tile_k * 2 + half) * tile_bytes;
                for (int r = 0; r < 16; ++r) {
                    _mm512_store_si512(tile + 64 * r, pairs[r]);
                }
            }
        }
        return;
    }
    const int64_t wide = round_up(n, tile_i);
    for (int64_t k = 0; k < padded; k += 2) {
        const float * rows[2];
        for (int64_t r = 0; r < 2; ++r) {
            float * own = buffer + r * wide;
            rows[r] = own;
            if (k + r >= n_k) {
                std::fill(own, own + wide, 0.0f);
                continue;
            }
            rows[r] = right.read(k + r, first, n, own);
            if (wide != n) {
                if (rows[r] != own) {
                    std::copy(rows[r], rows[r] + n, own);
                    rows[r] = own;
                }
                std::fill(own + n, own + wide, 0.0f);
            }
        }
        const size_t at = static_cast<size_t>(k / tile_k * 2) * tile_bytes + static_cast<size_t>(64 * (k % tile_k / 2));
        for (int64_t i = 0; i < wide; i += 16) {
            const __m512i low  = _mm512_cvtepu16_epi32((__m256i) _mm512_cvtneps_pbh(_mm512_loadu_ps(rows[0] + i)));
            const __m512i high = _mm512_cvtepu16_epi32((__m256i) _mm512_cvtneps_pbh(_mm512_loadu_ps(rows[1] + i)));
            char * panel = panels + static_cast<size_t>(i / tile_i) * panel_bytes + static_cast<size_t>(i % tile_i / 16) * tile_bytes;
            _mm512_store_si512(panel + at, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

// vdpbf16ps does with one row of B, in registers, what tdpbf16ps does with a tile.
template <int rows>
void multiply_dot_rows(const char * left, size_t left_stride, const char * panel, int64_t n, int64_t steps,
                       const Sink & sink, int64_t first) {
    __m512 sum[rows][2];
    for (int r = 0; r < rows; ++r) {
        sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    }
    for (int64_t s = 0; s < steps; ++s, left += 64, panel += 2 * tile_bytes) {
        for (int p = 0; p < 16; ++p) {
            const __m512bh b0 = (__m512bh) _mm512_load_si512(panel + 64 * p);
            const __m512bh b1 = (__m512bh) _mm512_load_si512(panel + tile_bytes + 64 * p);
            for (int r = 0; r < rows; ++r) {
                int32_t pair;
                std::memcpy(&pair, left + static_cast<size_t>(r) * left_stride + 4 * p, sizeof(pair));
                const __m512bh a = (__m512bh) _mm512_set1_epi32(pair);
                sum[r][0] = _mm512_dpbf16_ps(sum[r][0], a, b0);
                sum[r][1] = _mm512_dpbf16_ps(sum[r][1], a, b1);
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        float * target = sink.row(first + r);
        const float * added = sink.added(first + r);
        if (n == tile_i) {
            if (added) {
                sum[r][0] = _mm512_add_ps(sum[r][0], _mm512_loadu_ps(added));
                sum[r][1] = _mm512_add_ps(sum[r][1], _mm512_loadu_ps(added + 16));
            }
            _mm512_storeu_ps(target, sum[r][0]);
            _mm512_storeu_ps(target + 16, sum[r][1]);
        } else {
            std::memcpy(target, sum[r], static_cast<size_t>(n) * sizeof(float));
            add_some(target, added, n);
        }
    }
}

// As multiply_tiles, of which `left` is.
void multiply_dots(const char * left, size_t left_stride, int64_t first, int64_t last, const char * panel, int64_t n,
                   int64_t n_k, const Sink & sink) {
    const int64_t steps = round_up(n_k, tile_k) / tile_k;
    int64_t j = first;
    const auto step = [&](auto kernel, int rows) {
        kernel(left + static_cast<size_t>(j) * left_stride, left_stride, panel, n, steps, sink, j);
        j += rows;
    };
    while (last - j >= rows_at_once) {
        step(multiply_dot_rows<rows_at_once>, rows_at_once);
    }
    while (last - j >= 4) {
        step(multiply_dot_rows<4>, 4);
    }
    while (last > j) {
        step(multiply_dot_rows<1>, 1);
    }
}

const Kernel dot_kernel = { tile_i, 2, tile_k, pack_tiles, multiply_dots };

#endif  // TRIOLLAMA_DOTS

#if TRIOLLAMA_TILES

// `left` is BF16 with k padded to tiles and j to multiples of tile_j.
void multiply_tiles(const char * left, size_t left_stride, int64_t first, int64_t last, const char * panel, int64_t n,
                    int64_t n_k, const Sink & sink) {
    const int64_t steps = round_up(n_k, tile_k) / tile_k;
    alignas(64) float edge[tile_j][tile_i];
    for (int64_t j = first; j < last; j += tile_j) {
        const int64_t rows = std::min(tile_j, last - j);
        const bool whole = rows == tile_j && n == tile_i;
        if (whole && sink.addend) {
            const char * added = reinterpret_cast<const char *>(sink.added(j));
            TILE_LOAD(0, added, sink.addend_stride);
            TILE_LOAD(1, added + 64, sink.addend_stride);
            TILE_LOAD(2, added + 16 * sink.addend_stride, sink.addend_stride);
            TILE_LOAD(3, added + 16 * sink.addend_stride + 64, sink.addend_stride);
        } else {
            TILE_ZERO(0);
            TILE_ZERO(1);
            TILE_ZERO(2);
            TILE_ZERO(3);
        }
        const char * a0 = left + static_cast<size_t>(j) * left_stride;
        const char * a1 = a0 + 16 * left_stride;
        const char * b  = panel;
        for (int64_t s = 0; s < steps; ++s, a0 += 64, a1 += 64, b += 2 * tile_bytes) {
            TILE_LOAD(4, a0, left_stride);
            TILE_LOAD(6, b, 64);
            TILE_MULTIPLY_BF16(0, 4, 6);
            TILE_LOAD(7, b + tile_bytes, 64);
            TILE_MULTIPLY_BF16(1, 4, 7);
            TILE_LOAD(5, a1, left_stride);
            TILE_MULTIPLY_BF16(2, 5, 6);
            TILE_MULTIPLY_BF16(3, 5, 7);
        }
        char * base = whole ? reinterpret_cast<char *>(sink.row(j)) : reinterpret_cast<char *>(edge);
        const size_t stride = whole ? sink.stride : sizeof(edge[0]);
        TILE_STORE(0, base, stride);
        TILE_STORE(1, base + 64, stride);
        TILE_STORE(2, base + 16 * stride, stride);
        TILE_STORE(3, base + 16 * stride + 64, stride);
        if (!whole) {
            for (int64_t r = 0; r < rows; ++r) {
                std::memcpy(sink.row(j + r), edge[r], static_cast<size_t>(n) * sizeof(float));
                add_some(sink.row(j + r), sink.added(j + r), n);
            }
        }
    }
}

const Kernel tile_kernel = { tile_i, 2, tile_k, pack_tiles, multiply_tiles };

#endif  // TRIOLLAMA_TILES

#if TRIOLLAMA_VECTORS

// L as BF16 or F32 rows of all k, from F32 rows of either order; rows and k beyond the end are zero.
template <bool packed> void prepare_left(ggml_tensor * dst, int ith, int nth, void * transposed) {
    const ggml_tensor * x = dst->src[0];
    const int64_t n_k = transposed ? x->ne[1] : x->ne[0], n_j = transposed ? x->ne[0] : x->ne[1];
    const int64_t wide = dst->ne[0];
    constexpr int64_t band = 16;
    const int64_t bands = round_up(dst->ne[1], band) / band, units = bands * dst->ne[2];
    static thread_local Scratch scratch;
    float * buffer = scratch.get<float>(static_cast<size_t>(band * wide));
    for (int64_t u = units * ith / nth; u < units * (ith + 1) / nth; ++u) {
        const int64_t batch = u / bands, first = u % bands * band;
        const int64_t last = std::min(first + band, dst->ne[1]);
        const char * source = static_cast<const char *>(x->data) + static_cast<size_t>(batch) * x->nb[2];
        char * target = static_cast<char *>(dst->data) + static_cast<size_t>(batch) * dst->nb[2];
        if (transposed) {
            for (int64_t k = 0; k < n_k; ++k) {
                const float * row = reinterpret_cast<const float *>(source + static_cast<size_t>(k) * x->nb[1]);
                for (int64_t j = first; j < last; ++j) {
                    buffer[(j - first) * wide + k] = j < n_j ? row[j] : 0.0f;
                }
            }
        }
        for (int64_t j = first; j < last; ++j) {
            float * own = buffer + (j - first) * wide;
            const float * row = own;
            if (!transposed) {
                row = reinterpret_cast<const float *>(source + static_cast<size_t>(j) * x->nb[1]);
                if (j >= n_j || wide != n_k) {
                    std::fill(std::copy(row, row + (j < n_j ? n_k : 0), own), own + wide, 0.0f);
                    row = own;
                }
            } else if (wide != n_k) {
                std::fill(own + n_k, own + wide, 0.0f);
            }
            char * to = target + static_cast<size_t>(j) * dst->nb[1];
#if TRIOLLAMA_DOTS
            if (packed) {
                for (int64_t k = 0; k < wide; k += 32) {
                    _mm512_storeu_si512(to + 2 * k, bf16_pairs(row + k));
                }
                continue;
            }
#endif
            std::memcpy(to, row, static_cast<size_t>(wide) * sizeof(float));
        }
    }
}

// dst = the product of src[0], as R, and src[1], as L with k contiguous, plus src[2] if there is one. `transposed`:
// src[0] has i contiguous.
template <ProductKernel kind> void multiply(ggml_tensor * dst, int ith, int nth, void * transposed) {
    const Kernel & kernel =
#if TRIOLLAMA_TILES
        kind == ProductKernel::tiles ? tile_kernel :
#endif
#if TRIOLLAMA_DOTS
        kind == ProductKernel::dots ? dot_kernel :
#endif
        vector_kernel;
    const ggml_tensor * r = dst->src[0];
    const ggml_tensor * l = dst->src[1];
    const ggml_tensor * added = dst->src[2];
    Right right;
    right.type         = r->type;
    right.k_contiguous = !transposed;
    right.n_k          = transposed ? r->ne[1] : r->ne[0];
    right.n_i          = dst->ne[0];
    right.stride       = r->nb[1];
    right.to_float     = dequantizer(r->type);

    // Where a row is one k, several panels are filled together: long reads, and whole blocks of a quantised type.
    const int64_t together = std::max<int64_t>(kernel.panel_i, r->type == GGML_TYPE_F32 ? 64 : 128);
    const int64_t unit     = transposed ? std::max<int64_t>(together, ggml_blck_size(r->type)) : kernel.panel_i;
    const int64_t k_pad  = round_up(right.n_k, kernel.k_step);
    const size_t  panel_bytes = static_cast<size_t>(kernel.panel_i * k_pad * kernel.element);
    const int64_t n_j    = dst->ne[1], panels = round_up(right.n_i, unit) / unit, batches = dst->ne[2];
    // With fewer panels than threads could share, columns are split as well; the panel is then filled several times.
    const int64_t splits = std::min<int64_t>(round_up(n_j, 32) / 32,
                                             panels * batches >= 2 * nth ? 1 : (2 * nth + panels * batches - 1) / (panels * batches));
    const int64_t share  = round_up((n_j + splits - 1) / splits, 32);
    const int64_t units  = batches * panels * splits, repeat = dst->ne[2] / r->ne[2];

    static thread_local Scratch panel_scratch, row_scratch;
    char *  panel  = panel_scratch.get<char>(panel_bytes * static_cast<size_t>(unit / kernel.panel_i));
    float * buffer = row_scratch.get<float>(static_cast<size_t>(std::max(16 * k_pad, 2 * unit)));
    int64_t packed = -1;
#if TRIOLLAMA_TILES
    std::optional<TileScope> scope;
    if (kind == ProductKernel::tiles) {
        constexpr TileShape whole = { 16, 64 };
        scope.emplace(std::initializer_list<TileShape>{ whole, whole, whole, whole, whole, whole, whole, whole });
    }
#endif
    for (int64_t u = units * ith / nth; u < units * (ith + 1) / nth; ++u) {
        const int64_t batch = u / (panels * splits), at = u / splits % panels, split = u % splits;
        const int64_t first = at * unit, n = std::min(unit, right.n_i - first);
        if (packed != u / splits) {
            right.data = static_cast<const char *>(r->data) + static_cast<size_t>(batch / repeat) * r->nb[2];
            kernel.pack(right, first, n, panel, panel_bytes, buffer);
            packed = u / splits;
        }
        const char * left = static_cast<const char *>(l->data) + static_cast<size_t>(batch) * l->nb[2];
        const auto place = [&](const ggml_tensor * x, int64_t i) {
            return static_cast<char *>(x->data) + static_cast<size_t>(batch) * x->nb[2] + static_cast<size_t>(i) * sizeof(float);
        };
        for (int64_t p = 0; p < n; p += kernel.panel_i) {
            const Sink sink = { place(dst, first + p), dst->nb[1], added ? place(added, first + p) : nullptr,
                                added ? added->nb[1] : 0 };
            kernel.multiply(left, l->nb[1], split * share, std::min((split + 1) * share, n_j),
                            panel + static_cast<size_t>(p / kernel.panel_i) * panel_bytes, std::min(kernel.panel_i, n - p),
                            right.n_k, sink);
        }
    }
}

#endif  // TRIOLLAMA_VECTORS

[[maybe_unused]] bool has_dense_rows(const ggml_tensor * x) { return x->nb[0] == ggml_type_size(x->type); }

}  // namespace

bool has_product_kernel(ProductKernel kernel) {
    switch (kernel) {
        case ProductKernel::portable:
        case ProductKernel::ggml:
            return true;
        case ProductKernel::vector:
#if TRIOLLAMA_VECTORS
            return true;
#else
            return false;
#endif
        case ProductKernel::dots:
#if TRIOLLAMA_DOTS
            return true;
#else
            return false;
#endif
        case ProductKernel::tiles:
#if TRIOLLAMA_TILES
            return tiles_are_granted();
#else
            return false;
#endif
    }
    return false;
}

ProductKernel best_product_kernel(bool exact) {
    if (!exact && has_product_kernel(ProductKernel::tiles)) {
        return ProductKernel::tiles;   // not `dots`: where they were measured, F32 vectors are faster
    }
    return has_product_kernel(ProductKernel::vector) ? ProductKernel::vector : ProductKernel::ggml;
}

bool f32_outruns_quantized() {
#if TRIOLLAMA_VECTORS
    return lanes >= 16;
#else
    return false;
#endif
}

const char * product_kernel_name(ProductKernel kernel) {
    switch (kernel) {
        case ProductKernel::portable: return "portable";
        case ProductKernel::ggml:     return "ggml";
        case ProductKernel::vector:   return "vector";
        case ProductKernel::dots:     return "dots";
        case ProductKernel::tiles:    return "tiles";
    }
    return "";
}

ggml_tensor * undequantized(ggml_tensor * tensor) {
    while ((tensor->op == GGML_OP_CPY || tensor->op == GGML_OP_GET_ROWS) &&
           (tensor->src[0]->op == GGML_OP_NONE || tensor->src[0]->op == GGML_OP_VIEW) && tensor->type == GGML_TYPE_F32 &&
           tensor->src[0]->type != GGML_TYPE_F32 && ggml_are_same_shape(tensor, tensor->src[0])) {
        tensor = tensor->src[0];
    }
    return tensor;
}

// L with k contiguous, as BF16 if `packed`.
ggml_tensor * ProductRewriter::rows_of(ggml_tensor * x, bool transposed, bool packed) {
#if TRIOLLAMA_VECTORS
    ggml_tensor *& rows = prepared[2 * transposed + packed][x];
    if (!rows) {
        const int64_t n_k = transposed ? x->ne[1] : x->ne[0], n_j = transposed ? x->ne[0] : x->ne[1];
        // ggml hands the pointer back to the function; only whether it is null matters.
        void * order = transposed ? static_cast<void *>(context) : nullptr;
#if TRIOLLAMA_DOTS
        if (packed) {
            rows = ggml_custom_4d(context, GGML_TYPE_BF16, round_up(n_k, tile_k), round_up(n_j, tile_j), x->ne[2], 1, &x, 1,
                                  prepare_left<true>, GGML_N_TASKS_MAX, order);
            return rows;
        }
#endif
        rows = ggml_custom_4d(context, GGML_TYPE_F32, n_k, n_j, x->ne[2], 1, &x, 1, prepare_left<false>, GGML_N_TASKS_MAX,
                              order);
    }
    return rows;
#else
    (void) transposed;
    (void) packed;
    return x;
#endif
}

bool ProductRewriter::rewrite(ggml_tensor * node) {
#if TRIOLLAMA_VECTORS
    if (kernel < ProductKernel::vector || (node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_OUT_PROD) || node->ne[3] != 1) {
        return false;
    }
    const bool outer = node->op == GGML_OP_OUT_PROD;
    ggml_tensor * right = node->src[0];
    ggml_tensor * left  = node->src[1];
    bool left_k_contiguous = !outer;
    if (outer && left->op == GGML_OP_TRANSPOSE) {
        left = left->src[0];
        left_k_contiguous = true;
    }
    if (!outer && ggml_is_quantized(right->type) && !weights_too) {
        return false;   // asked for by the graph: meets quantised columns
    }
    right = undequantized(right);
    if (left->type != GGML_TYPE_F32 || node->type != GGML_TYPE_F32 || !has_dense_rows(left) || !has_dense_rows(right) ||
        (right->type != GGML_TYPE_F32 && !ggml_get_type_traits(right->type)->to_float)) {
        return false;
    }
    const int64_t n_k = left_k_contiguous ? left->ne[0] : left->ne[1];
    const bool packed = kernel >= ProductKernel::dots && std::min({ node->ne[0], node->ne[1], n_k }) >= 32;
    if (packed || !left_k_contiguous) {
        left = rows_of(left, !left_k_contiguous, packed);
    }
    void * order = outer ? static_cast<void *>(context) : nullptr;
    ggml_tensor * sources[] = { right, left };
    // Its description is what is wanted: the node itself stays, since others read it.
    const auto compute = !packed                          ? multiply<ProductKernel::vector>
                         : kernel == ProductKernel::tiles ? multiply<ProductKernel::tiles>
                                                          : multiply<ProductKernel::dots>;
    ggml_tensor * product = ggml_custom_4d(context, GGML_TYPE_F32, node->ne[0], node->ne[1], node->ne[2], 1, sources, 2, compute,
                                           GGML_N_TASKS_MAX, order);
    node->op = product->op;
    std::memcpy(node->op_params, product->op_params, sizeof(node->op_params));
    node->src[0] = right;
    node->src[1] = left;
    products.insert(node);
    return true;
#else
    (void) node;
    (void) weights_too;
    return false;
#endif
}

bool ProductRewriter::take_sum(ggml_tensor * node, const std::unordered_map<const ggml_tensor *, int> & readers) {
    if (node->op != GGML_OP_ADD || node->view_src || !ggml_are_same_shape(node->src[0], node->src[1])) {
        return false;
    }
    for (int at : { 1, 0 }) {
        ggml_tensor * product = node->src[at];
        ggml_tensor * other   = node->src[1 - at];
        const bool prepared_too = std::any_of(std::begin(prepared), std::end(prepared),
                                              [&](const auto & some) { return some.count(product) != 0; });
        if (!products.count(product) || readers.at(product) != 1 || prepared_too ||
            product->flags & GGML_TENSOR_FLAG_OUTPUT || other->type != GGML_TYPE_F32 || !has_dense_rows(other)) {
            continue;
        }
        node->op = product->op;
        std::memcpy(node->op_params, product->op_params, sizeof(node->op_params));
        node->src[0] = product->src[0];
        node->src[1] = product->src[1];
        node->src[2] = other;
        products.erase(product);
        return true;
    }
    return false;
}

}  // namespace triollama::native
