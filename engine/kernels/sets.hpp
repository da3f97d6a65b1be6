// The instruction sets that kernels are made for, and what they share.
#pragma once

#include "kernels/layout.hpp"
#include "kernels/processor.hpp"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define TRIOLLAMA_X86_KERNELS 1
#endif
#if defined(__aarch64__) && defined(__GNUC__)
#define TRIOLLAMA_ARM_KERNELS 1
#endif

namespace triollama::native::kernels {

// Their bits are those of the portable one, proven where it is said by product_check.cpp and attention_check.cpp, and for
// whole models by test_kernels.py.
extern const Kernel portable_kernel;
#if TRIOLLAMA_X86_KERNELS
extern const Kernel avx2_kernel;        // Intel Xeon, family 6, model 207, as the next three
extern const Kernel avx_vnni_kernel;
extern const Kernel avx512_kernel;
extern const Kernel amx_tiles;          // what it leaves out is as in avx512_kernel
constexpr unsigned avx512_needs = processor::avx2 | processor::avx512 | processor::avx512_vnni;
#endif
#if TRIOLLAMA_ARM_KERNELS
extern const Kernel neon_kernel;        // under emulation (QEMU), and no whole model
#endif

namespace {

// The scale of 32 activations from the bits of the largest magnitude, and by what they are multiplied. Of what is infinite
// as of what is no number the scale is none, so that no product is one: there is no whole number for it.
inline float scale_of(int32_t bits, float * scale) {
    float largest;
    std::memcpy(&largest, &bits, sizeof(largest));
    *scale = largest / 127.0f + (largest - largest);
    return largest < 1e-35f ? 0.0f : 127.0f / largest;   // what is less would divide to infinity
}

}  // namespace
}  // namespace triollama::native::kernels
