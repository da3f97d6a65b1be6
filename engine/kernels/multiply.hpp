// The product of a panel and a tile, for any instruction set: V says how wide its vectors are and what they can do.
// Included by one file for each, compiled for it; everything is in a namespace of its own there, so that the linker
// mixes none of them up.
#pragma once

#include "kernels/layout.hpp"

#include <cstring>

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

template <class V, Type T, int R>
void multiply(const uint8_t * panel, int64_t n_blocks, const uint8_t * tile, const Row * rows, int64_t n_rows, int64_t first,
              int n) {
    constexpr Shape s = shapes[T];
    constexpr bool flipped = is_wide(s) && V::wants_signed;   // w is then 128 less, which is what `zero` would take off
    for (int c = 0; c < panel_rows; c += V::width) {
        typename V::Floats sum[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            sum[r] = V::zero();
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
                    sum[r] = V::fma(product(0, 4, r, adds[r]), V::multiply(scaler.scale, of_row), sum[r]);
                    sum[r] = V::fma(product(4, 8, r, adds[R + r]), V::multiply(scaler.other, of_row), sum[r]);
                } else {
                    sum[r] = V::fma(product(0, 8, r, adds[r]), V::multiply(scaler.scale, of_row), sum[r]);
                }
                if constexpr (has_min(s)) {
                    sum[r] = V::fma(scaler.other, V::floats(sums[r]), sum[r]);
                }
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            if (r < n_rows && c < n) {
                float * out = rows[r].out + first + c;
                if (n - c >= V::width) {
                    V::store(out, sum[r]);
                } else {
                    float edge[V::width];
                    V::store(edge, sum[r]);
                    std::memcpy(out, edge, static_cast<size_t>(n - c) * sizeof(float));
                }
            }
        }
    }
}

// Fills the table of a kernel.
template <class V, int T = 0> constexpr void fill(Kernel & kernel) {
    if constexpr (T < n_types) {
        kernel.multiply[T][0] = multiply<V, Type(T), 1>;
        kernel.multiply[T][1] = multiply<V, Type(T), 2>;
        kernel.multiply[T][2] = multiply<V, Type(T), 4>;
        kernel.multiply[T][3] = multiply<V, Type(T), 8>;
        kernel.multiply[T][4] = multiply<V, Type(T), 16>;
        fill<V, T + 1>(kernel);
    }
}

}  // namespace
}  // namespace triollama::native::kernels
