// Layers with a mixture of experts: a token goes through a few of them, as their router says. ggml has no derivative of
// products with chosen matrices, so each expert takes the tokens that chose it, and its way back is written out. Experts
// have no adapter; gradients flow through them, and through their shares into the router's input.
#pragma once

#include "training/layer.hpp"

#include <vector>

namespace triollama::native {

class Experts {
public:
    // For rows of so many tokens.
    Experts(const FrozenModel & model, const LayerBuilder & builder, int64_t n_tokens, ggml_backend_buffer_type_t type);

    size_t bytes() const { return store.bytes(); }

    // As LayerBuilder::layer, into `out`.
    void forward(Executor & executor, const GraphOptions & options, int layer, ggml_tensor * h, const LayerInputs & inputs,
                 ggml_tensor * out);

    // The gradient in `h`, unless it is null, into `d_h`, and those of the adapters to what they have.
    void backward(Executor & executor, const GraphOptions & options, int layer, ggml_tensor * h, const LayerInputs & inputs,
                  ggml_tensor * d_out, ggml_tensor * one,
                  const std::unordered_map<ggml_tensor *, ggml_tensor *> & accumulators, bool needs_d_h, ggml_tensor * d_h);

private:
    // Tokens that chose an expert, and how much of it they take.
    struct Group {
        std::vector<int32_t> tokens;
        std::vector<float>   shares;
    };

    // The layer up to its experts, with their input in `x` and who takes which as the result.
    std::vector<Group> choose(Executor & executor, const GraphOptions & options, int layer, ggml_tensor * h,
                              const LayerInputs & inputs, ggml_tensor * base);
    void enter(const Group & group);   // its tokens and shares, for the next graph
    ggml_tensor * add_rows(Graph & graph, ggml_tensor * sum, ggml_tensor * change, ggml_tensor * rows) const;

    const ModelGraphInfo & info;
    const LayerBuilder &   builder;
    const int64_t          n_tokens;
    TensorStore            store;
    ggml_tensor * x, * d_x;                     // [n_embd, n_tokens]
    ggml_tensor * scores, * chosen, * d_shares; // [n_expert, n_tokens]
    ggml_tensor * rows, * row_shares, * d_row_shares;   // of one expert: the first so many of [n_tokens]
};

}  // namespace triollama::native
