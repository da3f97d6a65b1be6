#include "training/panels.hpp"

#if TRIOLLAMA_X86_PANELS

#include "kernels/tiles.hpp"
#include "training/panel_rows.hpp"

namespace triollama::native::panels {

namespace {

// A tile is 16 rows of 64 bytes. tdpbf16ps adds to C, 16 x 16 floats, the product of A, 16 rows of 32 values of k, and
// B, whose row p holds for each of 16 columns the values 2 p and 2 p + 1 of k.
constexpr size_t  tile_bytes   = 1024;
constexpr int     rows_at_once = 12;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

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
                    std::memset(own, 0, static_cast<size_t>(padded) * sizeof(float));
                    continue;
                }
                rows[r] = read(right, first + from + r, 0, n_k, own);
                if (padded != n_k) {
                    if (rows[r] != own) {
                        std::memcpy(own, rows[r], static_cast<size_t>(n_k) * sizeof(float));
                        rows[r] = own;
                    }
                    std::memset(own + n_k, 0, static_cast<size_t>(padded - n_k) * sizeof(float));
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
                std::memset(own, 0, static_cast<size_t>(wide) * sizeof(float));
                continue;
            }
            rows[r] = read(right, k + r, first, n, own);
            if (wide != n) {
                if (rows[r] != own) {
                    std::memcpy(own, rows[r], static_cast<size_t>(n) * sizeof(float));
                    rows[r] = own;
                }
                std::memset(own + n, 0, static_cast<size_t>(wide - n) * sizeof(float));
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
        float * target = row_of(sink, first + r);
        const float * added = added_to(sink, first + r);
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

void round_row(const float * values, char * to, int64_t n) {
    for (int64_t k = 0; k < n; k += 32) {
        _mm512_storeu_si512(to + 2 * k, bf16_pairs(values + k));
    }
}

constexpr unsigned dots_need = processor::avx2 | processor::avx512 | processor::avx512_bf16;

#if TRIOLLAMA_HAS_TILES

// `left` is BF16 with k padded to tiles and j to multiples of tile_j.
void multiply_tiles(const char * left, size_t left_stride, int64_t first, int64_t last, const char * panel, int64_t n,
                    int64_t n_k, const Sink & sink) {
    const int64_t steps = round_up(n_k, tile_k) / tile_k;
    alignas(64) float edge[tile_j][tile_i];
    for (int64_t j = first; j < last; j += tile_j) {
        const int64_t rows = least(tile_j, last - j);
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
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
        const bool whole = rows == tile_j && n == tile_i && !sink.addend;
        char * base = whole ? reinterpret_cast<char *>(row_of(sink, j)) : reinterpret_cast<char *>(edge);
        const size_t stride = whole ? sink.stride : sizeof(edge[0]);
        TILE_STORE(0, base, stride);
        TILE_STORE(1, base + 64, stride);
        TILE_STORE(2, base + 16 * stride, stride);
        TILE_STORE(3, base + 16 * stride + 64, stride);
        if (!whole) {
            for (int64_t r = 0; r < rows; ++r) {
                std::memcpy(row_of(sink, j + r), edge[r], static_cast<size_t>(n) * sizeof(float));
                add_some(row_of(sink, j + r), added_to(sink, j + r), n);
            }
        }
    }
}

#endif

}  // namespace

constexpr Kernel dot_panels = { tile_i, 2, tile_k, 16, 0, dots_need, dequantizer, pack_tiles, multiply_dots, nullptr, round_row };

#if TRIOLLAMA_HAS_TILES
constexpr Kernel tile_panels = { tile_i, 2, tile_k, 16, 0, dots_need | processor::tiles, dequantizer, pack_tiles, multiply_tiles, nullptr, round_row };
#endif

}  // namespace triollama::native::panels

#endif
