// The passes over a row of logits, for each instruction set. What they give is the same in all of them, to the bit: nothing
// is fused, and sixteen sums run beside each other whatever the width of the vectors.
#pragma once

#include "sampling/select.hpp"

#include <cstdint>

namespace triollama::native {

// Count, sum and sum of squares of (x - shift) over the finite logits.
struct RawMoments {
    double n;
    double sum;
    double squares;
};

struct Passes {
    bool (*scan)(const float * x, int32_t n, float * maxima);   // whether something is NaN
    double (*weights)(const float * x, int32_t n, float shift, float * weights, double * block_sums);
    ExpSums (*sums)(const float * x, int32_t n, float shift);
    RawMoments (*moments)(const float * x, int32_t n, float shift);
    void (*divide)(const float * x, int32_t n, float divisor, float * out);
    void (*mask)(const float * x, int32_t n, float threshold, float * out);
    void (*reward)(const float * x, const float * weights, int32_t n, float total, float target, float * out);
};

extern const Passes baseline_passes;
#if defined(__x86_64__) && defined(__GNUC__)
#define TRIOLLAMA_X86_PASSES 1
extern const Passes avx2_passes, avx512_passes;     // for processors that have it
#endif

}  // namespace triollama::native
