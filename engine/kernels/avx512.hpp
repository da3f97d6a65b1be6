// What AVX-512 with VNNI does for kernels/multiply.hpp: a group of 16 rows is one vector. Included where it is compiled
// for it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace triollama::native::kernels {
namespace {

struct Avx512 {
    using Bytes  = __m512i;
    using Ints   = __m512i;
    using Floats = __m512;
    static constexpr int  width        = 16;
    static constexpr bool wants_signed = false;
    static constexpr int  sums_at_once = 16;   // of vectors, beside what they are made of

    static Bytes load(const uint8_t * at) { return _mm512_loadu_si512(at); }
    static Bytes low(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
    static Bytes high(Bytes x) { return low(_mm512_srli_epi16(x, 4)); }
    static Bytes flip(Bytes x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
    static Bytes look_up(Bytes x) {
        const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(iq4_values));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), x);
    }
    // x, and of y the bits of `mask` after a shift to the left.
    template <int left, int mask> static Bytes merge(Bytes x, Bytes y) {
        if constexpr (left > 0) {
            y = _mm512_slli_epi16(y, left);
        } else if constexpr (left < 0) {
            y = _mm512_srli_epi16(y, -left);
        }
        return _mm512_ternarylogic_epi32(x, y, _mm512_set1_epi8(mask), 0xf8);   // x | (y & mask)
    }

    static Ints zero_ints() { return _mm512_setzero_si512(); }
    static Ints ints(int32_t x) { return _mm512_set1_epi32(x); }
    static Ints dot(Ints sum, Bytes w, const int8_t * a) {
        int32_t four;
        std::memcpy(&four, a, 4);
        return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(four));
    }
    static Ints dot_signed(Ints sum, Bytes w, const int8_t * a) { return dot(sum, w, a); }

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats floats(float x) { return _mm512_set1_ps(x); }
    static Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
    static Floats multiply(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
    static Floats fma(Floats x, Floats y, Floats sum) { return _mm512_fmadd_ps(x, y, sum); }
    static Floats halves(const uint8_t * at) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at))); }
    static Floats bfloats(const uint8_t * at) {
        const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
    }
    static Floats unsigned_bytes(const uint8_t * at) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at))));
    }
    static Floats signed_bytes(const uint8_t * at) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at))));
    }
    static void store(float * at, Floats x) { _mm512_storeu_ps(at, x); }

    static Floats load_floats(const float * at) { return _mm512_loadu_ps(at); }
    static Floats larger(Floats x, Floats y) { return _mm512_max_ps(x, y); }   // y, if one of them is no number
    static Ints   to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
    static Floats power_of_two(Ints x) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(127)), 23));
    }
    // Sixteen sums over their lanes at once: pairs of vectors are folded into one, down to one whose lanes are the sums.
    static constexpr int sums = 16;
    template <class Lanes> static void totals(const Lanes (&of)[sums], float * to) {
        const auto halves_of = [](Floats x, Floats y) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
        };
        const auto quarters_of = [](Floats x, Floats y) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
        };
        Floats four[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            four[i] = quarters_of(halves_of(of[i].part[0], of[4 + i].part[0]), halves_of(of[8 + i].part[0], of[12 + i].part[0]));
        }
        const auto pairs_of = [](Floats x, Floats y) {
            return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
        };
        const Floats x = pairs_of(four[0], four[1]), y = pairs_of(four[2], four[3]);
        store(to, _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd)));
    }

    // Wraps around, of what is no number; _mm512_reduce_add_epi32 ends by a sum of signed integers, which must not.
    static int32_t sum_of(__m512i x) {
        const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        const __m128i two  = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
    }

    static void quantize(const float * x, int8_t * q, float * scale, int32_t sums[2]) {
        const __m512 x0 = _mm512_loadu_ps(x), x1 = _mm512_loadu_ps(x + 16);
        // As whole numbers, so that a NaN is the largest.
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        const __m512i largest = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(x0), magnitude),
                                                 _mm512_and_si512(_mm512_castps_si512(x1), magnitude));
        const int32_t bits = _mm512_reduce_max_epi32(largest);
        const float inverse = scale_of(bits, scale);
        const __m512i q0 = _mm512_cvtps_epi32(_mm512_mul_ps(x0, _mm512_set1_ps(inverse)));
        const __m512i q1 = _mm512_cvtps_epi32(_mm512_mul_ps(x1, _mm512_set1_ps(inverse)));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(q), _mm512_cvtsepi32_epi8(q0));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(q + 16), _mm512_cvtsepi32_epi8(q1));
        sums[0] = sum_of(q0);
        sums[1] = sum_of(q1);
    }
};

}  // namespace
}  // namespace triollama::native::kernels
