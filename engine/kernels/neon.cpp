// ARM with dot products: a quarter of a panel at a time.
#include "kernels/sets.hpp"

#if TRIOLLAMA_ARM_KERNELS
#include "kernels/multiply.hpp"

#include <arm_neon.h>

namespace triollama::native::kernels {

namespace {

struct Neon {
    using Bytes  = uint8x16_t;
    using Ints   = int32x4_t;
    using Floats = float32x4_t;
    static constexpr int  width        = 4;
    static constexpr bool wants_signed = true;   // there is no product of a byte with a sign and one without
    static constexpr int  sums_at_once = 24;

    static Bytes load(const uint8_t * at) { return vld1q_u8(at); }
    static Bytes low(Bytes x) { return vandq_u8(x, vdupq_n_u8(15)); }
    static Bytes high(Bytes x) { return vshrq_n_u8(x, 4); }
    static Bytes flip(Bytes x) { return veorq_u8(x, vdupq_n_u8(128)); }
    static Bytes look_up(Bytes x) { return vqtbl1q_u8(vld1q_u8(iq4_values), x); }
    template <int left, int mask> static Bytes merge(Bytes x, Bytes y) {
        if constexpr (left > 0) {
            y = vshlq_n_u8(y, left);
        } else if constexpr (left < 0) {
            y = vshrq_n_u8(y, -left);
        }
        return vorrq_u8(x, vandq_u8(y, vdupq_n_u8(mask)));
    }

    static Ints zero_ints() { return vdupq_n_s32(0); }
    static Ints ints(int32_t x) { return vdupq_n_s32(x); }
    static Ints dot(Ints sum, Bytes w, const int8_t * a) {
        int32_t four;
        std::memcpy(&four, a, 4);
        return vdotq_s32(sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_s32(vdupq_n_s32(four)));
    }
    static Ints dot_signed(Ints sum, Bytes w, const int8_t * a) { return dot(sum, w, a); }

    static Floats zero() { return vdupq_n_f32(0); }
    static Floats floats(float x) { return vdupq_n_f32(x); }
    static Floats to_floats(Ints x) { return vcvtq_f32_s32(x); }
    static Floats multiply(Floats x, Floats y) { return vmulq_f32(x, y); }
    static Floats fma(Floats x, Floats y, Floats sum) { return vfmaq_f32(sum, x, y); }
    static Floats halves(const uint8_t * at) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at))); }
    static Floats bfloats(const uint8_t * at) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(at))), 16)); }
    static uint8x8_t four_bytes(const uint8_t * at) {
        uint32_t four;
        std::memcpy(&four, at, 4);
        return vreinterpret_u8_u32(vdup_n_u32(four));
    }
    static Floats unsigned_bytes(const uint8_t * at) { return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four_bytes(at))))); }
    static Floats signed_bytes(const uint8_t * at) {
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four_bytes(at))))));
    }
    static void store(float * at, Floats x) { vst1q_f32(at, x); }

    static Floats load_floats(const float * at) { return vld1q_f32(at); }
    static Floats larger(Floats x, Floats y) { return vmaxq_f32(x, y); }
    static Ints   to_ints(Floats x) { return vcvtnq_s32_f32(x); }
    static Floats power_of_two(Ints x) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(x, vdupq_n_s32(127)), 23)); }
    static constexpr int sums = 4;
    template <class Lanes> static void totals(const Lanes (&of)[sums], float * to) {
        for (int i = 0; i < sums; ++i) {
            const float32x4_t four = vaddq_f32(vaddq_f32(of[i].part[0], of[i].part[2]), vaddq_f32(of[i].part[1], of[i].part[3]));
            const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            to[i] = vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
        }
    }

    static void quantize(const float * x, int8_t * q, float * scale, int32_t sums[2]) {
        float32x4_t v[8];
        int32x4_t most = vdupq_n_s32(0);
        for (int i = 0; i < 8; ++i) {
            v[i] = vld1q_f32(x + 4 * i);
            most = vmaxq_s32(most, vandq_s32(vreinterpretq_s32_f32(v[i]), vdupq_n_s32(0x7fffffff)));
        }
        const float32x4_t inverse = vdupq_n_f32(scale_of(vmaxvq_s32(most), scale));
        for (int half = 0; half < 2; ++half) {
            int32x4_t n[4];
            for (int i = 0; i < 4; ++i) {
                n[i] = vcvtnq_s32_f32(vmulq_f32(v[4 * half + i], inverse));
            }
            const int16x8_t low  = vcombine_s16(vqmovn_s32(n[0]), vqmovn_s32(n[1]));
            const int16x8_t high = vcombine_s16(vqmovn_s32(n[2]), vqmovn_s32(n[3]));
            vst1q_s8(q + 16 * half, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
            sums[half] = vaddvq_s32(vaddq_s32(vaddq_s32(n[0], n[1]), vaddq_s32(n[2], n[3])));
        }
    }
};

}  // namespace

constexpr Kernel neon_kernel = kernel_of<Neon>("neon", processor::dot_products);

}  // namespace triollama::native::kernels
#endif
