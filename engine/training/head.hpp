// Output matrix and cross-entropy in one, over labelled positions alone and without ever holding their logits.
//
// The vocabulary is walked in blocks. For each, with z = W h: p = softmax(z), l = log sum exp z, d = W^T p. Two
// partial results merge as in online softmax: with s = sigmoid(l_new - l), d <- d + s (d_new - d) and
// l <- l + softplus(l_new - l). At the end -log p[label] = l - z[label], and its gradient in h is d - W[label].
// Each weight is dequantised once, and memory does not depend on the vocabulary.
#pragma once

#include "training/graph.hpp"
#include "training/model.hpp"

#include <cstdint>
#include <vector>

namespace triollama::native {

struct HeadResult {
    std::vector<float>   nll;         // -log p[label], natural logarithm, one for each position
    std::vector<int32_t> predicted;   // the likeliest token
};

class Head {
public:
    explicit Head(const FrozenModel & model) : model(model) {}

    // `h` is F32 [n_embd, n], after the last norm; `labels` n token ids. Unless `d_h` is null it receives, per
    // position, weights[i] times the gradient of its loss.
    HeadResult run(Executor & executor, const GraphOptions & options, ggml_tensor * h, const std::vector<int32_t> & labels,
                   const std::vector<float> & weights, ggml_tensor * d_h) const;

private:
    const FrozenModel & model;
};

}  // namespace triollama::native
