// Attention over the cells of a cache, in an order that depends on nothing but the row and what it sees:
//     score  = scale * sum of q k, sixteen partial sums over the width, each by fused multiply-adds, added pairwise
//              (l and l + 8, then + 4, + 2, + 1)
//     weight = exp(score - the largest of the row)
//     total  = sixteen partial sums of the weights, by their place among the cells that the row sees, added likewise
//     out    = sum of weight v in order of cells, each by a fused multiply-add, times 1 / total
// So a row's numbers are the same in any company, however a prompt is cut and wherever in the cache its cells lie.
#pragma once

#include <cstddef>
#include <cstdint>

struct ggml_tensor;

namespace triollama::native::kernels {

class Team;

// What some rows see of one head: keys or values in halves or floats, `width` a multiple of 16.
struct Cells {
    const char *    data;
    size_t          stride;   // bytes
    const int32_t * list;     // which cells
    int64_t         n;
    int64_t         width;
};

// What an instruction set gives.
struct Attend {
    // to[r * stride + i] = rows[r * width ..] times cell i, for m rows.
    void (*scores[2])(const Cells & keys, const float * rows, int64_t m, float * to, int64_t stride);
    // out[r * width ..] += p[r * stride + i] times cell i, in order of i.
    void (*gather[2])(const Cells & values, const float * p, int64_t stride, int64_t m, float * out);
    // Times scale; the largest, not less than `least`.
    float (*scaled)(float * scores, int64_t n, float scale, float least);
    // To weights; their total.
    float (*soften)(float * scores, int64_t n, float largest);
    // exp(x)
    float (*exponential)(float x);
    // Halves to floats; n is a multiple of 16.
    void (*widen)(const void * halves, int64_t n, float * to);
};

enum : int { in_floats, in_halves };

// Whether attention of this graph's node can be computed here.
bool can_attend(const ggml_tensor * node);

// Called by all threads. `ordered`: what a row sees is taken in the order of positions, as `extra` of the tensor that a
// layer's keys lie in tells (llama_kv_cells, see llama/exact.cpp): cells that sequences share lie as there was room. In
// memory of attend_bytes, which all share.
void attend(const ggml_tensor * node, bool ordered, Team & team, void * memory);
size_t attend_bytes(const ggml_tensor * node, int n_threads);

// Whether `extra` can be found from this node.
bool tells_order(const ggml_tensor * node);

}  // namespace triollama::native::kernels
