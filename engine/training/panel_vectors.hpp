// Panels of floats. The file that includes this is compiled for an instruction set of its own: see panel_rows.hpp.
#pragma once

#include "training/panel_rows.hpp"

namespace triollama::native::panels {
namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16, rows_at_once = 12;
#elif defined(__AVX2__)
constexpr int lanes = 8, rows_at_once = 6;
#else
constexpr int lanes = 4, rows_at_once = 8;
#endif
static_assert(rows_at_once <= max_group);
constexpr int vector_i = 2 * lanes;
typedef float vec __attribute__((vector_size(lanes * sizeof(float))));
typedef float unaligned_vec __attribute__((vector_size(lanes * sizeof(float)), aligned(4), may_alias));

// panel[k][vector_i]
void pack_vectors(const Right & right, int64_t first, int64_t n, char * panels, size_t panel_bytes, float * buffer) {
    if (!right.k_contiguous) {
        for (int64_t k = 0; k < right.n_k; ++k) {
            const float * row = read(right, k, first, n, buffer);
            for (int64_t i = 0; i < n; i += vector_i) {
                float * to = reinterpret_cast<float *>(panels + static_cast<size_t>(i / vector_i) * panel_bytes) + k * vector_i;
                const int64_t some = least(vector_i, n - i);
                std::memcpy(to, row + i, static_cast<size_t>(some) * sizeof(float));
                std::memset(to + some, 0, static_cast<size_t>(vector_i - some) * sizeof(float));
            }
        }
        return;
    }
    constexpr int together = lanes == 16 ? 16 : 8;   // rows read side by side, so that writes fill lines
    float * panel = reinterpret_cast<float *>(panels);
    for (int64_t i = 0; i < vector_i; i += together) {
        const float * rows[together];
        for (int64_t r = 0; r < together; ++r) {
            rows[r] = i + r < n ? read(right, first + i + r, 0, right.n_k, buffer + r * right.n_k) : nullptr;
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

void put_side_by_side(const float * const * rows, int64_t n, int64_t n_k, float * to) {
    int64_t k = 0;
#if defined(__AVX512F__)
    for (; n > 1 && k + lanes <= n_k; k += lanes) {
        __m512i square[lanes];
        for (int64_t r = 0; r < lanes; ++r) {
            square[r] = r < n ? _mm512_loadu_si512(rows[r] + k) : _mm512_setzero_si512();
        }
        transpose_16(square);
        for (int64_t i = 0; i < lanes; ++i) {
            _mm512_mask_storeu_epi32(to + (k + i) * n, static_cast<__mmask16>((1 << n) - 1), square[i]);
        }
    }
#endif
    for (; k < n_k; ++k) {
        for (int64_t r = 0; r < n; ++r) {
            to[k * n + r] = rows[r][k];
        }
    }
}

// `vectors`: how many of a panel's two have values.
template <int rows, int vectors>
void multiply_rows(const float * left, const float * panel, int64_t n, int64_t n_k, const Sink & sink, int64_t first) {
    vec sum[rows][vectors] = {};
    for (int64_t k = 0; k < n_k; ++k) {
        vec b[vectors];
        for (int v = 0; v < vectors; ++v) {
            b[v] = *reinterpret_cast<const vec *>(panel + k * vector_i + v * lanes);
        }
        for (int r = 0; r < rows; ++r) {
            const float a = left[k * rows + r];
            for (int v = 0; v < vectors; ++v) {
                sum[r][v] += a * b[v];
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        float * target = row_of(sink, first + r);
        const float * added = added_to(sink, first + r);
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
    for (int64_t j = first, rows; j < last; j += rows) {
        rows = group_of(rows_at_once, last - j);
        const auto multiply = rows == rows_at_once ? multiply_rows<rows_at_once, vectors>
                              : rows == 8          ? multiply_rows<8, vectors>
                              : rows == 4          ? multiply_rows<4, vectors>
                                                   : multiply_rows<1, vectors>;
        multiply(reinterpret_cast<const float *>(left + static_cast<size_t>(j) * left_stride), panel, n, n_k, sink, j);
    }
}

void multiply_vectors(const char * left, size_t left_stride, int64_t first, int64_t last, const char * memory, int64_t n,
                      int64_t n_k, const Sink & sink) {
    const float * panel = reinterpret_cast<const float *>(memory);
    (n <= lanes ? multiply_panel<1> : multiply_panel<2>)(left, left_stride, first, last, panel, n, n_k, sink);
}

}  // namespace
}  // namespace triollama::native::panels
