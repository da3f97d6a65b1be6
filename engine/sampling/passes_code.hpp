// The passes, written once in the vector extension of GCC and Clang. Each file that includes this is compiled for an
// instruction set of its own, so nothing may leave it: all is in an unnamed namespace, and no template of the standard
// library is called. (GCC's target_clones would not do: it takes vectors apart for the baseline before it clones.)
#pragma once

#include "sampling/passes.hpp"

#include <cstring>
#include <limits>

// Small steps must be inlined into each version, or they would be compiled for the baseline only.
#define TRIOLLAMA_INLINE static inline __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__)
#  pragma GCC diagnostic ignored "-Wpsabi"      // no vector crosses a function that is not inlined
#endif

namespace triollama::native {

namespace {

int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

constexpr float infinity = std::numeric_limits<float>::infinity();

constexpr int lanes = 16;
typedef float   vfloat __attribute__((vector_size(lanes * 4)));
typedef int32_t vint   __attribute__((vector_size(lanes * 4)));

TRIOLLAMA_INLINE vfloat splat(float value) {
    return vfloat{} + value;
}

TRIOLLAMA_INLINE void load(vfloat & v, const float * x) {
    std::memcpy(&v, x, sizeof(v));
}

// n values, filled up with `filler`.
TRIOLLAMA_INLINE void load_some(vfloat & v, const float * x, int32_t n, float filler) {
    if (n == lanes) {
        load(v, x);
    } else {
        v = splat(filler);
        std::memcpy(&v, x, (size_t) n * sizeof(float));
    }
}

TRIOLLAMA_INLINE void store_some(float * x, const vfloat & v, int32_t n) {
    if (n == lanes) {       // of a size that the compiler knows
        std::memcpy(x, &v, sizeof(v));
    } else {
        std::memcpy(x, &v, (size_t) n * sizeof(float));
    }
}

TRIOLLAMA_INLINE double sum_lanes(const vfloat & v) {
    double total = 0.0;
    for (int i = 0; i < lanes; ++i) {
        total += v[i];
    }
    return total;
}

// exp(d) for d <= 0 within 2 units in the last place: d = k ln 2 + r, a polynomial for exp(r), k into the exponent.
// Below -87 the result is 0 (the float would be subnormal), so -inf gives 0.
TRIOLLAMA_INLINE void exp_lanes(vfloat & d) {
    const vint   normal = d > splat(-87.0f);
    const vfloat x      = normal ? d : splat(-87.0f);
    const vfloat magic  = splat(12582912.0f);           // 1.5 * 2^23: adding it rounds to an integer
    const vfloat biased = x * 1.44269504f + magic;
    const vfloat k      = biased - magic;
    const vfloat r      = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    vfloat p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vint bits;
    std::memcpy(&bits, &biased, sizeof(bits));
    vint scaled;
    std::memcpy(&scaled, &p, sizeof(scaled));
    scaled += bits << 23;
    vfloat result;
    std::memcpy(&result, &scaled, sizeof(result));
    d = normal ? result : splat(0.0f);
}

bool scan_blocks(const float * x, int32_t n, float * maxima) {
    vint nan = {};
    for (int32_t start = 0, block = 0; start < n; start += block_size, ++block) {
        const int32_t length = least(block_size, n - start);
        vfloat best0 = splat(-infinity);
        vfloat best1 = best0;
        int32_t i = 0;
        for (; i + 2 * lanes <= length; i += 2 * lanes) {
            vfloat a;
            vfloat b;
            load(a, x + start + i);
            load(b, x + start + i + lanes);
            nan  |= (a != a) | (b != b);
            best0 = a > best0 ? a : best0;
            best1 = b > best1 ? b : best1;
        }
        for (; i < length; i += lanes) {
            vfloat a;
            load_some(a, x + start + i, least(lanes, length - i), -infinity);
            nan  |= a != a;
            best0 = a > best0 ? a : best0;
        }
        best0 = best0 > best1 ? best0 : best1;
        float best = best0[0];
        for (int lane = 1; lane < lanes; ++lane) {
            best = best0[lane] > best ? best0[lane] : best;
        }
        maxima[block] = best;
    }
    for (int lane = 0; lane < lanes; ++lane) {
        if (nan[lane]) {
            return true;
        }
    }
    return false;
}

double exp_blocks(const float * x, int32_t n, float shift, float * weights, double * block_sums) {
    double total = 0.0;
    for (int32_t start = 0, block = 0; start < n; start += block_size, ++block) {
        const int32_t length = least(block_size, n - start);
        vfloat sum = {};
        for (int32_t i = 0; i < length; i += lanes) {
            const int32_t m = least(lanes, length - i);
            vfloat d;
            load_some(d, x + start + i, m, -infinity);
            d -= shift;
            exp_lanes(d);
            sum += d;
            if (weights) {
                store_some(weights + start + i, d, m);
            }
        }
        const double block_sum = sum_lanes(sum);
        if (block_sums) {
            block_sums[block] = block_sum;
        }
        total += block_sum;
    }
    return total;
}

ExpSums exp_distance_blocks(const float * x, int32_t n, float shift) {
    ExpSums total = { 0.0, 0.0 };
    for (int32_t start = 0; start < n; start += block_size) {
        const int32_t length = least(block_size, n - start);
        vfloat sum      = {};
        vfloat distance = {};
        for (int32_t i = 0; i < length; i += lanes) {
            const int32_t m = least(lanes, length - i);
            vfloat d;
            load_some(d, x + start + i, m, -infinity);
            d -= shift;
            vfloat w = d;
            exp_lanes(w);
            sum += w;
            distance += w * (d > splat(-87.0f) ? d : splat(0.0f));     // 0 * -inf would be NaN
        }
        total.sum          += sum_lanes(sum);
        total.sum_distance += sum_lanes(distance);
    }
    return total;
}

RawMoments moment_blocks(const float * x, int32_t n, float shift) {
    RawMoments total = { 0.0, 0.0, 0.0 };
    for (int32_t start = 0; start < n; start += block_size) {
        const int32_t length = least(block_size, n - start);
        vfloat number  = {};
        vfloat sum     = {};
        vfloat squares = {};
        for (int32_t i = 0; i < length; i += lanes) {
            const int32_t m = least(lanes, length - i);
            vfloat v;
            load_some(v, x + start + i, m, -infinity);
            const vint   finite = v > splat(-infinity);
            const vfloat d      = finite ? v - shift : splat(0.0f);
            number  += finite ? splat(1.0f) : splat(0.0f);
            sum     += d;
            squares += d * d;
        }
        total.n       += sum_lanes(number);
        total.sum     += sum_lanes(sum);
        total.squares += sum_lanes(squares);
    }
    return total;
}

void divide_row(const float * x, int32_t n, float divisor, float * out) {
    for (int32_t i = 0; i < n; ++i) {
        out[i] = x[i] / divisor;
    }
}

void mask_row(const float * x, int32_t n, float threshold, float * out) {
    for (int32_t i = 0; i < n; ++i) {
        out[i] = x[i] < threshold ? -infinity : x[i];
    }
}

void reward_row(const float * x, const float * weights, int32_t n, float total, float target, float * out) {
    for (int32_t i = 0; i < n; i += lanes) {
        const int32_t m = least(lanes, n - i);
        vfloat v;
        vfloat w;
        load_some(v, x + i, m, -infinity);
        load_some(w, weights + i, m, 0.0f);
        vfloat distance = (w / total - target) * (1.0f / 0.3f);
        distance = distance < splat(0.0f) ? -distance : distance;
        vfloat reward = 5.0f - 10.0f * distance * distance / (1.0f + distance);
        reward = v > splat(-infinity) ? reward : splat(-infinity);
        store_some(out + i, reward, m);
    }
}

constexpr Passes passes = {
    scan_blocks, exp_blocks, exp_distance_blocks, moment_blocks, divide_row, mask_row, reward_row,
};

}  // namespace

}  // namespace triollama::native
