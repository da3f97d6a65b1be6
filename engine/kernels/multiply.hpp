// The products of panels and tiles, for any instruction set: V says how wide its vectors are and what they can do.
// Included by one file for each, compiled for it; everything is in a namespace of its own there, so that the linker
// mixes none of them up.
#pragma once

#include "kernels/attend.hpp"
#include "kernels/layout.hpp"

#include <cstring>
#include <type_traits>

namespace triollama::native::kernels {
namespace {

// The eight groups of a block, for V::width rows: whole numbers without a sign.
template <class V, Type T> inline void unpack(const uint8_t * planes, typename V::Bytes * w) {
    constexpr Shape s = shapes[T];
    if constexpr (s.low == 8) {
#pragma GCC unroll 8
        for (int g = 0; g < groups; ++g) {
            w[g] = V::load(planes + 64 * g);
        }
    } else {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const auto both = V::load(planes + 64 * v);
            w[v]     = V::low(both);
            w[v + 4] = V::high(both);
        }
        if constexpr (s.table) {
#pragma GCC unroll 8
            for (int g = 0; g < groups; ++g) {
                w[g] = V::look_up(w[g]);
            }
        }
        if constexpr (s.high == 1) {
            const auto bits = V::load(planes + 256);
            w[0] = V::template merge<4, 16>(w[0], bits);
            w[1] = V::template merge<3, 16>(w[1], bits);
            w[2] = V::template merge<2, 16>(w[2], bits);
            w[3] = V::template merge<1, 16>(w[3], bits);
            w[4] = V::template merge<0, 16>(w[4], bits);
            w[5] = V::template merge<-1, 16>(w[5], bits);
            w[6] = V::template merge<-2, 16>(w[6], bits);
            w[7] = V::template merge<-3, 16>(w[7], bits);
        }
        if constexpr (s.high == 2) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                const auto bits = V::load(planes + 256 + 64 * h);
                w[4 * h]     = V::template merge<4, 48>(w[4 * h], bits);
                w[4 * h + 1] = V::template merge<2, 48>(w[4 * h + 1], bits);
                w[4 * h + 2] = V::template merge<0, 48>(w[4 * h + 2], bits);
                w[4 * h + 3] = V::template merge<-2, 48>(w[4 * h + 3], bits);
            }
        }
    }
}

// So few rows take less time than their weights take to come from memory.
constexpr int few_rows = 4;

// Block b of the panel to come. The processor by itself would stop at each page, and at scales, which lie apart.
template <Type T> inline void fetch_ahead(const uint8_t * next, int64_t b) {
    constexpr size_t n = block_bytes(shapes[T]);
    const uint8_t * at = next + static_cast<size_t>(b) * n;
#pragma GCC unroll 16
    for (size_t i = 0; i < n; i += 64) {
        __builtin_prefetch(at + i);
    }
}

// Scales of one block after another, for V::width rows from row c on.
template <class V, Type T> struct Scaler {
    static constexpr Shape s = shapes[T];
    const uint8_t * at;
    int             c;
    typename V::Floats shared{}, shared_min{};   // of 8 blocks
    typename V::Floats scale{}, other{};         // of this block; its minimum, or the scale of its second half

    Scaler(const uint8_t * scales, int c) : at(scales), c(c) {}

    inline void next(int64_t b) {
        if constexpr (s.scales == Scales::half) {
            scale = V::halves(at + 2 * c);
            at += 32;
        } else if constexpr (s.scales == Scales::half_min) {
            scale = V::halves(at + 2 * c);
            other = V::halves(at + 32 + 2 * c);
            at += 64;
        } else if constexpr (s.scales == Scales::super_min) {
            if (b % super == 0) {
                shared     = V::halves(at + 2 * c);
                shared_min = V::halves(at + 32 + 2 * c);
                at += 64;
            }
            scale = V::multiply(shared, V::unsigned_bytes(at + c));
            other = V::multiply(shared_min, V::unsigned_bytes(at + 16 + c));
            at += 32;
        } else {
            if (b % super == 0) {
                shared = V::halves(at + 2 * c);
                at += 32;
            }
            scale = V::multiply(shared, V::signed_bytes(at + c));
            other = V::multiply(shared, V::signed_bytes(at + 16 + c));
            at += 32;
        }
    }
};

// R rows of N vectors to columns from `first` on, of which there are n. They all leave their registers before anything is
// called: sums that live on beside a call have none from the beginning.
template <class V, int R, int N>
inline void store_sums(const typename V::Floats (&sums)[R][N], const Row * rows, int64_t n_rows, int64_t first, int64_t n) {
    float made[R][N * V::width];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) {
            V::store(made[r] + i * V::width, sums[r][i]);
        }
    }
    if (n <= 0) {
        return;
    }
    const size_t bytes = n < N * V::width ? static_cast<size_t>(n) * sizeof(float) : sizeof(made[0]);
    for (int r = 0; r < R && r < n_rows; ++r) {
        std::memcpy(rows[r].out + first, made[r], bytes);
    }
}

// A panel with a tile of R rows: columns [first, first + n).
template <class V, Type T, int R>
void multiply_panel(const uint8_t * panel, int64_t n_blocks, const uint8_t * tile, const Row * rows, int64_t n_rows, int64_t first, int64_t n) {
    constexpr Shape s = shapes[T];
    constexpr bool flipped = is_wide(s) && V::wants_signed;   // w is then 128 less, which is what `zero` would take off
    for (int c = 0; c < panel_rows; c += V::width) {
        typename V::Floats sum[R][1];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            sum[r][0] = V::zero();
        }
        const uint8_t * planes = panel + 4 * c;
        const uint8_t * a = tile;
        Scaler<V, T> scaler(panel + static_cast<size_t>(n_blocks) * plane_bytes(s), c);
        for (int64_t b = 0; b < n_blocks; ++b, planes += plane_bytes(s), a += tile_bytes(s, R)) {
            if (R <= few_rows && c == 0) {
                fetch_ahead<T>(panel + panel_bytes(s, n_blocks), b);
            }
            typename V::Bytes w[groups];
            unpack<V, T>(planes, w);
            if constexpr (flipped) {
#pragma GCC unroll 8
                for (int g = 0; g < groups; ++g) {
                    w[g] = V::flip(w[g]);
                }
            }
            scaler.next(b);
            const float   * scales = reinterpret_cast<const float *>(a + R * block);
            const int32_t * adds   = reinterpret_cast<const int32_t *>(scales + R);
            const float   * sums   = scales + R;
            const auto product = [&](int from, int to, int r, int32_t add) __attribute__((always_inline)) {
                auto whole = has_min(s) || flipped ? V::zero_ints() : V::ints(add);
                const int8_t * q = reinterpret_cast<const int8_t *>(a) + r * block;
#pragma GCC unroll 8
                for (int g = from; g < to; ++g) {
                    whole = flipped ? V::dot_signed(whole, w[g], q + 4 * g) : V::dot(whole, w[g], q + 4 * g);
                }
                return V::to_floats(whole);
            };
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const auto of_row = V::floats(scales[r]);
                if constexpr (has_halves(s)) {
                    sum[r][0] = V::fma(product(0, 4, r, adds[r]), V::multiply(scaler.scale, of_row), sum[r][0]);
                    sum[r][0] = V::fma(product(4, 8, r, adds[R + r]), V::multiply(scaler.other, of_row), sum[r][0]);
                } else {
                    sum[r][0] = V::fma(product(0, 8, r, adds[r]), V::multiply(scaler.scale, of_row), sum[r][0]);
                }
                if constexpr (has_min(s)) {
                    sum[r][0] = V::fma(scaler.other, V::floats(sums[r]), sum[r][0]);
                }
            }
        }
        store_sums<V>(sum, rows, n_rows, first + c, n - c);
    }
}

template <class V, Type T, int R>
void multiply(const uint8_t * panels, int64_t n_blocks, const uint8_t * tiles, const Row * rows, int64_t n_rows, int64_t first,
              int64_t last, uint8_t *) {
    for (; first < last; first += panel_rows, panels += panel_bytes(shapes[T], n_blocks)) {
        const uint8_t * tile = tiles;
        for (int64_t at = 0; at < n_rows; at += R, tile += static_cast<size_t>(n_blocks) * tile_bytes(shapes[T], R)) {
            multiply_panel<V, T, R>(panels, n_blocks, tile, rows + at, n_rows - at, first, last - first);
        }
    }
}

// Of weights that are floats: P panels behind one another with R rows of a tile of `size`.
template <class V, Type T, int R, int P>
__attribute__((noinline)) void multiply_floats(const uint8_t * panels, int64_t n_blocks, const float * a, int size, const Row * rows,
                                               int64_t n_rows, int64_t first, int64_t last) {
    constexpr int    N = panel_rows / V::width;
    constexpr size_t k_bytes = panel_rows * sizeof(uint16_t);
    const size_t of_panel = panel_bytes(shapes[T], n_blocks);
    typename V::Floats sum[R][P * N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < P * N; ++i) {
            sum[r][i] = V::zero();
        }
    }
    for (int64_t b = 0; b < n_blocks; ++b, a += size * block) {
        const uint8_t * at = panels + static_cast<size_t>(b) * plane_bytes(shapes[T]);
        if constexpr (R <= few_rows) {
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) {
                fetch_ahead<T>(panels + static_cast<size_t>(P + p) * of_panel, b);
            }
        }
#pragma GCC unroll 2
        for (int k = 0; k < block; ++k, at += k_bytes) {
            const auto weights = [&](int i) __attribute__((always_inline)) {
                const uint8_t * values = at + static_cast<size_t>(i / N) * of_panel + i % N * V::width * 2;
                return shapes[T].of == GGML_TYPE_F16 ? V::halves(values) : V::bfloats(values);
            };
            // What there is less of stays in registers.
            if constexpr (R < P * N) {
                typename V::Floats x[R];
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    x[r] = V::floats(a[r * block + k]);
                }
#pragma GCC unroll 16
                for (int i = 0; i < P * N; ++i) {
                    const auto w = weights(i);
#pragma GCC unroll 16
                    for (int r = 0; r < R; ++r) {
                        sum[r][i] = V::fma(w, x[r], sum[r][i]);
                    }
                }
            } else {
                typename V::Floats w[P * N];
#pragma GCC unroll 16
                for (int i = 0; i < P * N; ++i) {
                    w[i] = weights(i);
                }
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    const auto x = V::floats(a[r * block + k]);
#pragma GCC unroll 16
                    for (int i = 0; i < P * N; ++i) {
                        sum[r][i] = V::fma(w[i], x, sum[r][i]);
                    }
                }
            }
        }
    }
    store_sums<V>(sum, rows, n_rows, first, last - first);
}

// The rows of a tile by as many at a time as have their sums in registers.
template <class V, Type T, int Size, int P, int Done = 0>
inline void multiply_float_tile(const uint8_t * panels, int64_t n_blocks, const float * tile, const Row * rows, int64_t n_rows, int64_t first,
                                int64_t last) {
    if constexpr (Done < Size) {
        constexpr int at_once = V::sums_at_once * V::width / panel_rows;
        constexpr int times = (Size - Done + at_once - 1) / at_once, R = (Size - Done + times - 1) / times;
        if (Done < n_rows) {
            multiply_floats<V, T, R, P>(panels, n_blocks, tile + Done * block, Size, rows + Done, n_rows - Done, first, last);
            multiply_float_tile<V, T, Size, P, Done + R>(panels, n_blocks, tile, rows, n_rows, first, last);
        }
    }
}

template <class V, Type T, int Size>
void multiply_all_floats(const uint8_t * panels, int64_t n_blocks, const uint8_t * tiles, const Row * rows, int64_t n_rows, int64_t first,
                         int64_t last, uint8_t *) {
    constexpr int fit = V::sums_at_once * V::width / panel_rows / Size, P = fit > 4 ? 4 : fit < 1 ? 1 : fit;
    const auto step = [&](auto panels_at_once) __attribute__((always_inline)) {
        constexpr int64_t n = decltype(panels_at_once)::value;
        const float * tile = reinterpret_cast<const float *>(tiles);
        for (int64_t at = 0; at < n_rows; at += Size, tile += n_blocks * Size * block) {
            multiply_float_tile<V, T, Size, n>(panels, n_blocks, tile, rows + at, n_rows - at, first, last);
        }
        panels += n * panel_bytes(shapes[T], n_blocks);
        first += n * panel_rows;
    };
    while (last - first > (P - 1) * panel_rows) {
        step(std::integral_constant<int, P>());
    }
    while (first < last) {
        step(std::integral_constant<int, 1>());
    }
}

template <class V, int T, int R> constexpr auto multiply_of() {
    if constexpr (is_float(shapes[T])) {
        return multiply_all_floats<V, Type(T), R>;
    } else {
        return multiply<V, Type(T), R>;
    }
}

template <class V, int T = 0> constexpr void fill(Kernel & kernel) {
    if constexpr (T < n_types) {
        kernel.multiply[T][0] = multiply_of<V, T, 1>();
        kernel.multiply[T][1] = multiply_of<V, T, 2>();
        kernel.multiply[T][2] = multiply_of<V, T, 4>();
        kernel.multiply[T][3] = multiply_of<V, T, 8>();
        kernel.multiply[T][4] = multiply_of<V, T, 16>();
        fill<V, T + 1>(kernel);
    }
}

template <class V> constexpr Kernel kernel_of(const char * name, unsigned needs) {
    Kernel made = { name, needs, V::quantize, {}, {}, attend_with<V>() };
    fill<V>(made);
    return made;
}

}  // namespace
}  // namespace triollama::native::kernels
