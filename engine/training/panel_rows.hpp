// What every instruction set's panels share.
//
// Nothing here may leave the file that includes it, which is compiled for an instruction set of its own: all is in an
// unnamed namespace, and no template of the standard library is called.
#pragma once

#include "training/panels.hpp"

#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace triollama::native::panels {
namespace {

// Values [first, first + n) of a row, in `buffer` unless they are F32 where they lie.
const float * read(const Right & right, int64_t row, int64_t first, int64_t n, float * buffer) {
    const char * at = right.data + static_cast<size_t>(row) * right.stride + ggml_row_size(right.type, first);
    if (!right.to_float) {
        return reinterpret_cast<const float *>(at);
    }
    right.to_float(at, buffer, n);
    return buffer;
}

float * row_of(const Sink & sink, int64_t j) {
    return reinterpret_cast<float *>(sink.out + static_cast<size_t>(j) * sink.stride);
}

const float * added_to(const Sink & sink, int64_t j) {
    return sink.addend ? reinterpret_cast<const float *>(sink.addend + static_cast<size_t>(j) * sink.addend_stride) : nullptr;
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void add_some(float * to, const float * added, int64_t n) {
    for (int64_t i = 0; added && i < n; ++i) {
        to[i] += added[i];
    }
}

#if defined(__AVX512F__)

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

ggml_to_float_t dequantizer(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:  return nullptr;
        case GGML_TYPE_Q8_0: return dequantize_q8_0;
        case GGML_TYPE_Q5_0: return dequantize_q5_0;
        default:             return ggml_get_type_traits(type)->to_float;
    }
}

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

#else

ggml_to_float_t dequantizer(ggml_type type) {
    return type == GGML_TYPE_F32 ? nullptr : ggml_get_type_traits(type)->to_float;
}

#endif

}  // namespace
}  // namespace triollama::native::panels
