// Which architectures can be trained, and what a layer of each is made of.
// The hyperparameters are read from the file's metadata with the defaults that llama.cpp uses.
#pragma once

#include "llama/gguf_meta.hpp"

#include "ggml.h"

#include <map>
#include <string>
#include <vector>

namespace triollama::native {

enum class Activation { silu, gelu_tanh };

// How much of each expert a token takes: the softmax over the chosen ones' scores, or their part of that over all.
enum class Routing { none, among_chosen, among_all };

// One row of the table: what is fixed by the architecture's name.
struct Architecture {
    const char * name;
    int          rope_mode;          // GGML_ROPE_TYPE_NORMAL pairs neighbours, _NEOX pairs halves
    Activation   activation;
    bool         scaled_embedding;   // token embeddings are multiplied by sqrt(width)
    int          swa_period;         // every n-th layer attends to all; 0: no sliding windows at all
    bool         swa_required;       // windows also when the file does not give one (gemma2: 4096)
    float        attn_softcap;       // default soft cap of attention scores; 0: none
    float        final_softcap;      // default soft cap of the logits; 0: none
    int          wide_scale_layers;  // with this many layers, scores are scaled by sqrt(width / heads)
    const char * notes;
    int          unrotated_period = 0;   // every n-th layer leaves queries and keys unrotated; 0: none does
    bool         scaled = false;         // the file scales embeddings, scores, what layers add, and logits
    Routing      routing = Routing::none;
    bool         convolves = false;      // layers without key-value heads have a short convolution in place of attention
};

// The table; an entry is found by the value of general.architecture.
const std::vector<Architecture> & trainable_architectures();

struct Rope {
    int   mode        = 0;
    int   n_rot       = 0;
    int   n_ctx_orig  = 0;
    float base        = 10000.0f;
    float scale       = 1.0f;
    float ext_factor  = 0.0f;
    float attn_factor = 1.0f;
    float beta_fast   = 32.0f;
    float beta_slow   = 1.0f;
};

struct LayerWeights {
    ggml_tensor * attn_norm = nullptr;
    ggml_tensor * q = nullptr,   * k = nullptr,   * v = nullptr,   * qkv = nullptr,   * o = nullptr;
    ggml_tensor * q_b = nullptr, * k_b = nullptr, * v_b = nullptr, * qkv_b = nullptr, * o_b = nullptr;
    ggml_tensor * q_norm = nullptr, * k_norm = nullptr, * post_attn_norm = nullptr;
    ggml_tensor * ffn_norm = nullptr, * post_ffn_norm = nullptr;
    ggml_tensor * gate = nullptr,   * up = nullptr,   * down = nullptr;   // gate is null where `up` holds both
    ggml_tensor * gate_b = nullptr, * up_b = nullptr, * down_b = nullptr;
    ggml_tensor * router = nullptr;       // of a mixture of experts, in place of gate, up and down
    ggml_tensor * gates = nullptr, * ups = nullptr, * downs = nullptr;   // [.., .., n_expert]
    ggml_tensor * shared_gate = nullptr, * shared_up = nullptr, * shared_down = nullptr;   // an expert that all take
    ggml_tensor * conv = nullptr, * conv_in = nullptr, * conv_out = nullptr;   // in place of attention
    ggml_tensor * shared_share = nullptr;                                // how much of it: sigmoid of a product
    bool sliding = false;
    bool rotated = true;
};

// What a training graph needs to know of the frozen model. The tensors belong to the llama_model.
struct ModelGraphInfo {
    const Architecture * arch = nullptr;
    int   n_layer = 0, n_embd = 0, n_head = 0, n_head_kv = 0, n_head_dim = 0;
    int   n_vocab = 0;
    int   n_expert = 0, n_expert_used = 0;   // of a mixture
    int   n_taps = 0;          // of a convolution: so many tokens, the last one its own
    int   n_ctx_max = 0;       // longest row that may be trained on; 0: no limit known
    int   n_swa = 0;
    float norm_eps = 0.0f;
    float attn_scale = 0.0f, attn_softcap = 0.0f, final_softcap = 0.0f, embedding_scale = 1.0f;
    float residual_scale = 1.0f;   // of what attention and the feed-forward part add
    float output_scale = 1.0f;     // of the logits, before a soft cap
    Rope  rope, rope_swa;
    ggml_tensor * rope_factors = nullptr;   // llama 3 frequency factors, or the short ones of longrope
    ggml_tensor * tok_embd = nullptr, * output_norm = nullptr, * output = nullptr, * output_b = nullptr;
    std::vector<LayerWeights> layers;
};

// `weights` are all the tensors that llama.cpp's own graph of this model reads, by name. Throws unsupported_error,
// naming what is missing, if the architecture is not in the table or uses a tensor this graph would ignore.
ModelGraphInfo describe_model(const GgufMeta & meta, const std::map<std::string, ggml_tensor *> & weights);

}  // namespace triollama::native
