// The same arithmetic without vectors: what the others are compared with, and what runs where none of them can.
#include "kernels/multiply.hpp"
#include "kernels/sets.hpp"

#include "ggml.h"

#include <cmath>

namespace triollama::native::kernels {
namespace {

struct Portable {
    static constexpr int  width        = 4;
    static constexpr bool wants_signed = false;
    static constexpr int  sums_at_once = 8;
    struct Bytes { uint8_t v[4 * width]; };
    struct Ints { int32_t v[width]; };
    struct Floats { float v[width]; };

    template <class To, class F> static To each(F f) {
        To to;
        for (int i = 0; i < static_cast<int>(sizeof(to.v) / sizeof(to.v[0])); ++i) {
            to.v[i] = f(i);
        }
        return to;
    }
    static uint8_t byte(int x) { return static_cast<uint8_t>(x); }

    static Bytes load(const uint8_t * at) { return each<Bytes>([&](int i) { return at[i]; }); }
    static Bytes low(Bytes x) { return each<Bytes>([&](int i) { return byte(x.v[i] & 15); }); }
    static Bytes high(Bytes x) { return each<Bytes>([&](int i) { return byte(x.v[i] >> 4); }); }
    static Bytes flip(Bytes x) { return x; }
    static Bytes look_up(Bytes x) { return each<Bytes>([&](int i) { return iq4_values[x.v[i]]; }); }
    template <int left, int mask> static Bytes merge(Bytes x, Bytes y) {
        return each<Bytes>([&](int i) { return byte(x.v[i] | ((left > 0 ? y.v[i] << (left > 0 ? left : 0) : y.v[i] >> (left < 0 ? -left : 0)) & mask)); });
    }
    static Ints zero_ints() { return ints(0); }
    static Ints ints(int32_t x) { return each<Ints>([&](int) { return x; }); }
    static Ints dot(Ints sum, Bytes w, const int8_t * a) {
        return each<Ints>([&](int i) {
            const uint8_t * of_row = w.v + 4 * i;
            return sum.v[i] + of_row[0] * a[0] + of_row[1] * a[1] + of_row[2] * a[2] + of_row[3] * a[3];
        });
    }
    static Ints dot_signed(Ints sum, Bytes w, const int8_t * a) { return dot(sum, w, a); }
    static Floats zero() { return floats(0); }
    static Floats floats(float x) { return each<Floats>([&](int) { return x; }); }
    static Floats to_floats(Ints x) { return each<Floats>([&](int i) { return static_cast<float>(x.v[i]); }); }
    static Floats multiply(Floats x, Floats y) { return each<Floats>([&](int i) { return x.v[i] * y.v[i]; }); }
    static Floats fma(Floats x, Floats y, Floats sum) {
        return each<Floats>([&](int i) { return std::fma(x.v[i], y.v[i], sum.v[i]); });
    }
    static Floats halves(const uint8_t * at) {
        return each<Floats>([&](int i) {
            ggml_fp16_t half;
            std::memcpy(&half, at + 2 * i, sizeof(half));
            return ggml_fp16_to_fp32(half);
        });
    }
    static Floats bfloats(const uint8_t * at) {
        return each<Floats>([&](int i) {
            ggml_bf16_t value;
            std::memcpy(&value, at + 2 * i, sizeof(value));
            return ggml_bf16_to_fp32(value);
        });
    }
    static Floats unsigned_bytes(const uint8_t * at) { return each<Floats>([&](int i) { return static_cast<float>(at[i]); }); }
    static Floats signed_bytes(const uint8_t * at) {
        return each<Floats>([&](int i) { return static_cast<float>(static_cast<int8_t>(at[i])); });
    }
    static void store(float * at, Floats x) { std::memcpy(at, x.v, sizeof(x.v)); }

    static Floats load_floats(const float * at) { return each<Floats>([&](int i) { return at[i]; }); }
    static Floats larger(Floats x, Floats y) { return each<Floats>([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; }); }
    static Ints to_ints(Floats x) {
        return each<Ints>([&](int i) {
            const float whole = std::nearbyint(x.v[i]);
            return whole > -1e9f && whole < 1e9f ? static_cast<int32_t>(whole) : INT32_MIN;   // NaN
        });
    }
    static Floats power_of_two(Ints x) {
        return each<Floats>([&](int i) {
            const uint32_t bits = (static_cast<uint32_t>(x.v[i]) + 127) << 23;
            float power;
            std::memcpy(&power, &bits, sizeof(power));
            return power;
        });
    }
    static constexpr int sums = 4;
    template <class Lanes> static void totals(const Lanes (&of)[sums], float * to) {
        for (int i = 0; i < sums; ++i) {
            to[i] = of[i].total();
        }
    }

    static void quantize(const float * x, int8_t * q, float * scale, int32_t sums[2]) {
        int32_t most = 0;
        for (int i = 0; i < block; ++i) {
            int32_t bits;
            std::memcpy(&bits, x + i, sizeof(bits));
            bits &= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        const float inverse = scale_of(most, scale);
        sums[0] = sums[1] = 0;
        for (int i = 0; i < block; ++i) {
            const float value = std::nearbyint(x[i] * inverse);
            q[i] = value >= -127 && value <= 127 ? static_cast<int8_t>(value) : int8_t(-128);   // NaN, beside a scale that is
            sums[i / 16] += q[i];
        }
    }
};

}  // namespace

constexpr Kernel portable_kernel = kernel_of<Portable>("portable", 0);

}  // namespace triollama::native::kernels
