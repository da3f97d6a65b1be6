// The forward graph of one transformer layer, made of operations that ggml can differentiate.
#pragma once

#include "training/adapter.hpp"
#include "training/graph.hpp"
#include "training/model.hpp"

#include <unordered_map>
#include <vector>

namespace triollama::native {

// What a layer reads besides its input. The tensors outlive the graph.
struct LayerInputs {
    ggml_tensor * positions = nullptr;   // I32 [n_tokens]
    ggml_tensor * mask = nullptr;        // F32 [n_tokens, n_tokens]: 0 where a query may see a key, else -infinity
    ggml_tensor * mask_swa = nullptr;    // the same within the sliding window; null if there is none
    // Of a convolution, for each token before a token's own: where it lies (I32 [n_tokens]), and 1 or, where the text
    // does not reach back so far, 0 (F32 [1, n_tokens]).
    std::vector<ggml_tensor *> past, has_past;
    ggml_tensor * adapted = nullptr;     // F32 [1, n_tokens]: 1 where adapters take part, else 0; null: everywhere
    // Of each adapter input: 0 for a dropped element, 1 / (1 - p) for a kept one. Empty without dropout.
    std::unordered_map<const ggml_tensor *, ggml_tensor *> dropout;
    // Of some weights: where what they make of their input is kept from the way forward for the way back.
    std::unordered_map<const ggml_tensor *, ggml_tensor *> kept;
};

class LayerBuilder {
public:
    LayerBuilder(const FrozenModel & model, const AdapterSet & adapters) : model(model), adapters(adapters) {}

    // `h` is F32 [n_embd, n_tokens]; so is the result.
    ggml_tensor * layer(Graph & graph, int index, ggml_tensor * h, const LayerInputs & inputs) const;

    // A layer with a mixture of experts, but for these: see Experts.
    struct Routed {
        ggml_tensor * base;     // [n_embd, n_tokens]: what the experts' outputs are added to
        ggml_tensor * x;        // their input, of the same shape
        ggml_tensor * shares;   // [n_expert, n_tokens]: how much of each a token takes; without `chosen` the scores
    };
    // `chosen`, of the shape of the shares: 0 for the experts that a token takes and -infinity for the others, or where
    // shares are parts of all (Routing::among_all) 1 and 0.
    Routed route(Graph & graph, int index, ggml_tensor * h, const LayerInputs & inputs, ggml_tensor * chosen) const;

    // What the output matrix is multiplied with.
    ggml_tensor * last_norm(Graph & graph, ggml_tensor * h) const;

private:
    ggml_tensor * norm(Graph & graph, ggml_tensor * x, ggml_tensor * weight) const;
    ggml_tensor * attended(Graph & graph, const LayerWeights & w, ggml_tensor * h, const LayerInputs & inputs) const;
    ggml_tensor * shared_expert(Graph & graph, const LayerWeights & w, ggml_tensor * x, const LayerInputs & inputs) const;
    ggml_tensor * attention(Graph & graph, const LayerWeights & w, ggml_tensor * x, const LayerInputs & inputs) const;
    ggml_tensor * convolution(Graph & graph, const LayerWeights & w, ggml_tensor * x, const LayerInputs & inputs) const;
    ggml_tensor * feed_forward(Graph & graph, const LayerWeights & w, ggml_tensor * x, const LayerInputs & inputs) const;
    ggml_tensor * linear(Graph & graph, ggml_tensor * weight, ggml_tensor * bias, ggml_tensor * x,
                         const LayerInputs & inputs) const;

    const FrozenModel & model;
    const AdapterSet &  adapters;
};

// By operations with bounded derivatives: sigmoid(x) = exp(-softplus(-x)) and tanh(x) = 2 sigmoid(2x) - 1.
ggml_tensor * differentiable_sigmoid(ggml_context * context, ggml_tensor * x);
ggml_tensor * differentiable_tanh(ggml_context * context, ggml_tensor * x);

}  // namespace triollama::native
