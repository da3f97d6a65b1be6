// What AVX2 does for kernels/multiply.hpp: half a panel at a time. With AVX-VNNI one instruction does what takes three.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace triollama::native::kernels {
namespace {

struct Avx2 {
    using Bytes  = __m256i;
    using Ints   = __m256i;
    using Floats = __m256;
    static constexpr int  width        = 8;
    static constexpr bool wants_signed = true;   // pairs of products beyond 63 x 127 would saturate
    static constexpr int  sums_at_once = 12;

    static Bytes load(const uint8_t * at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)); }
    static Bytes low(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
    static Bytes high(Bytes x) { return low(_mm256_srli_epi16(x, 4)); }
    static Bytes flip(Bytes x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }
    static Bytes look_up(Bytes x) {
        const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(iq4_values));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), x);
    }
    template <int left, int mask> static Bytes merge(Bytes x, Bytes y) {
        if constexpr (left > 0) {
            y = _mm256_slli_epi16(y, left);
        } else if constexpr (left < 0) {
            y = _mm256_srli_epi16(y, -left);
        }
        return _mm256_or_si256(x, _mm256_and_si256(y, _mm256_set1_epi8(mask)));
    }

    static Ints zero_ints() { return _mm256_setzero_si256(); }
    static Ints ints(int32_t x) { return _mm256_set1_epi32(x); }
    static Bytes four(const int8_t * a) {
        int32_t values;
        std::memcpy(&values, a, 4);
        return _mm256_set1_epi32(values);
    }
    static Ints add_pairs(Ints sum, __m256i products) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
    }
    static Ints dot(Ints sum, Bytes w, const int8_t * a) { return add_pairs(sum, _mm256_maddubs_epi16(w, four(a))); }
    static Ints dot_signed(Ints sum, Bytes w, const int8_t * a) {
        return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four(a), w)));
    }

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats floats(float x) { return _mm256_set1_ps(x); }
    static Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
    static Floats multiply(Floats x, Floats y) { return _mm256_mul_ps(x, y); }
    static Floats fma(Floats x, Floats y, Floats sum) { return _mm256_fmadd_ps(x, y, sum); }
    static Floats halves(const uint8_t * at) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at))); }
    static Floats bfloats(const uint8_t * at) {
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i *>(at));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
    }
    static Floats unsigned_bytes(const uint8_t * at) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(at))));
    }
    static Floats signed_bytes(const uint8_t * at) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(at))));
    }
    static void store(float * at, Floats x) { _mm256_storeu_ps(at, x); }

    static Floats load_floats(const float * at) { return _mm256_loadu_ps(at); }
    static Floats larger(Floats x, Floats y) { return _mm256_max_ps(x, y); }   // y, if one of them is no number
    static Ints   to_ints(Floats x) { return _mm256_cvtps_epi32(x); }
    static Floats power_of_two(Ints x) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(127)), 23));
    }
    // Four sums over their lanes, each of two vectors.
    static constexpr int sums = 4;
    template <class Lanes> static void totals(const Lanes (&of)[sums], float * to) {
        __m128 four[sums];
#pragma GCC unroll 4
        for (int i = 0; i < sums; ++i) {
            const __m256 eight = _mm256_add_ps(of[i].part[0], of[i].part[1]);
            four[i] = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        }
        const auto pairs_of = [](__m128 x, __m128 y) { return _mm_add_ps(_mm_shuffle_ps(x, y, 0x44), _mm_shuffle_ps(x, y, 0xee)); };
        const __m128 x = pairs_of(four[0], four[1]), y = pairs_of(four[2], four[3]);
        _mm_storeu_ps(to, _mm_add_ps(_mm_shuffle_ps(x, y, 0x88), _mm_shuffle_ps(x, y, 0xdd)));
    }

    static int32_t largest(__m256i x) {
        __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
        return _mm_cvtsi128_si32(m);
    }
    static int32_t total(__m256i x) {
        __m128i t = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
        t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1));
        return _mm_cvtsi128_si32(t);
    }

    static void quantize(const float * x, int8_t * q, float * scale, int32_t sums[2]) {
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
        __m256 v[4];
        __m256i most = _mm256_setzero_si256();
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
        }
        const __m256 inverse = _mm256_set1_ps(scale_of(largest(most), scale));
        __m256i n[4];
        for (int i = 0; i < 4; ++i) {
            n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
        }
        sums[0] = total(_mm256_add_epi32(n[0], n[1]));
        sums[1] = total(_mm256_add_epi32(n[2], n[3]));
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(q), _mm256_permutevar8x32_epi32(packed, order));
    }
};

}  // namespace
}  // namespace triollama::native::kernels
