// What fills panels of a matrix and multiplies them, made for one instruction set each, and chosen where it runs.
//
// A product here is C[j][i] = sum over k of L[j][k] R[i][k]: in ggml's terms i runs over the rows of src0, and j over the
// columns of src1. C has i contiguous. L is laid out beforehand, as a node that products share; R, of any type and either
// order, is dequantised in panels of some i and all k, and each panel meets all of L. Each value of C is one
// chain of fused additions over k, whatever the width of the vectors.
#pragma once

#include "ggml.h"
#include "kernels/processor.hpp"

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define TRIOLLAMA_X86_PANELS 1
#endif
#if defined(__aarch64__) && defined(__GNUC__)
#define TRIOLLAMA_ARM_PANELS 1
#endif

namespace triollama::native::panels {

// R of one matrix of the batch.
struct Right {
    const char * data;
    ggml_type type;
    int64_t   n_i, n_k;
    size_t    stride;       // bytes from row to row
    bool      k_contiguous; // a row is one i and all k, else one k and all i
    ggml_to_float_t to_float;   // null for F32
};

// Where products go, i contiguous, and what is added to them: rows that lie alike, or null.
struct Sink {
    char *       out;
    size_t       stride;         // bytes from j to j
    const char * addend;
    size_t       addend_stride;
};

struct Kernel {
    int64_t panel_i;      // i in a panel's unit
    int64_t element;      // bytes of a panel's element, and of L's: floats, or BF16
    int64_t k_step;       // k is padded to a multiple with zeros
    int64_t lanes;        // of the vectors
    int64_t group;        // rows of L side by side: see group_of; 0: one after the other
    unsigned needs;       // of processor.hpp
    ggml_to_float_t (*dequantizer)(ggml_type type);   // null for F32
    // Values [first, first + n) of i and all k into as many panels as that takes, each `panel_bytes` after the last.
    void (*pack)(const Right & right, int64_t first, int64_t n, char * panels, size_t panel_bytes, float * buffer);
    // All j in [first, last) against n <= panel_i values of i. `left` has `left_stride` bytes from j to j, or from group to
    // group so many for each row; `first` begins a group.
    void (*multiply)(const char * left, size_t left_stride, int64_t first, int64_t last, const char * panel, int64_t n,
                     int64_t n_k, const Sink & sink);
    // A group of L from n rows of n_k floats. Null where L is BF16.
    void (*side_by_side)(const float * const * rows, int64_t n, int64_t n_k, float * to);
    // n floats as L's elements; n is a multiple of k_step. Null where those are floats.
    void (*round)(const float * values, char * to, int64_t n);
};

#if TRIOLLAMA_X86_PANELS
extern const Kernel avx2_panels, avx512_panels, dot_panels, tile_panels;
#endif
#if TRIOLLAMA_ARM_PANELS
extern const Kernel neon_panels;
#endif

constexpr int64_t max_group = 16;   // at least every kernel's

// Rows of the next group where `left` are left: as many as are multiplied together. A group has its rows' values of a k
// next to each other, and begins where its first row would, were they not in groups.
static constexpr int64_t group_of(int64_t group, int64_t left) { return left >= group ? group : left >= 8 ? 8 : left >= 4 ? 4 : 1; }

constexpr int64_t tile_k = 32, tile_i = 32, tile_j = 32;   // what tiles take at a time; L's rows are padded to tile_j

}  // namespace triollama::native::panels
