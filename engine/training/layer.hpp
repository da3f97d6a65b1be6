// The forward graph of one transformer layer, made of operations that ggml can differentiate.
#pragma once

#include "training/adapter.hpp"
#include "training/graph.hpp"
#include "training/model.hpp"

#include <unordered_map>

namespace triollama::native {

// What a layer reads besides its input. The tensors outlive the graph.
struct LayerInputs {
    ggml_tensor * positions = nullptr;   // I32 [n_tokens]
    ggml_tensor * mask = nullptr;        // F32 [n_tokens, n_tokens]: 0 where a query may see a key, else -infinity
    ggml_tensor * mask_swa = nullptr;    // the same within the sliding window; null if there is none
    // Of each adapter input: 0 for a dropped element, 1 / (1 - p) for a kept one. Empty without dropout.
    std::unordered_map<const ggml_tensor *, ggml_tensor *> dropout;
};

class LayerBuilder {
public:
    LayerBuilder(const FrozenModel & model, const AdapterSet & adapters) : model(model), adapters(adapters) {}

    // `h` is F32 [n_embd, n_tokens]; so is the result.
    ggml_tensor * layer(Graph & graph, int index, ggml_tensor * h, const LayerInputs & inputs) const;

    ggml_tensor * norm(Graph & graph, ggml_tensor * x, ggml_tensor * weight) const;

private:
    ggml_tensor * attention(Graph & graph, const LayerWeights & w, ggml_tensor * x, const LayerInputs & inputs) const;
    ggml_tensor * feed_forward(Graph & graph, const LayerWeights & w, ggml_tensor * x, const LayerInputs & inputs) const;
    ggml_tensor * linear(Graph & graph, ggml_tensor * weight, ggml_tensor * bias, ggml_tensor * x,
                         const LayerInputs & inputs) const;

    const FrozenModel & model;
    const AdapterSet &  adapters;
};

// tanh, by operations with bounded derivatives: tanh(x) = 2 sigmoid(2x) - 1 and sigmoid(u) = exp(-softplus(-u)).
ggml_tensor * differentiable_tanh(ggml_context * context, ggml_tensor * x);

}  // namespace triollama::native
