#include "training/arch.hpp"

#include "guards/errors.hpp"

#include <algorithm>
#include <cmath>
#include <set>

namespace triollama::native {

static const std::vector<Architecture> table = {
    // name     rope                     activation             scaled swa    req.   attn   final  wide
    { "llama",  GGML_ROPE_TYPE_NORMAL, Activation::silu,      false, 0, false,  0.0f,  0.0f,  0,
      "Llama, Mistral, SmolLM; frequency factors, linear and YaRN scaling" },
    { "qwen2",  GGML_ROPE_TYPE_NEOX,   Activation::silu,      false, 0, false,  0.0f,  0.0f,  0,
      "biases on Q, K and V" },
    { "qwen3",  GGML_ROPE_TYPE_NEOX,   Activation::silu,      false, 0, false,  0.0f,  0.0f,  0,
      "norms on Q and K" },
    { "gemma2", GGML_ROPE_TYPE_NEOX,   Activation::gelu_tanh, true,  2, true,  50.0f, 30.0f, 46,
      "soft caps on scores and logits, sliding windows" },
    { "gemma3", GGML_ROPE_TYPE_NEOX,   Activation::gelu_tanh, true,  6, false,  0.0f,  0.0f, 62,
      "norms on Q and K, sliding windows with their own rope base" },
    { "phi3",   GGML_ROPE_TYPE_NEOX,   Activation::silu,      false, 0, false,  0.0f,  0.0f,  0,
      "Q, K and V in one matrix, gate and up in one; longrope up to the original context" },
    { "mistral3", GGML_ROPE_TYPE_NORMAL, Activation::silu,    false, 0, false,  0.0f,  0.0f,  0,
      "Ministral 3; up to the original context" },
    { "smollm3", GGML_ROPE_TYPE_NORMAL, Activation::silu,     false, 0, false,  0.0f,  0.0f,  0,
      "every fourth layer without rotary positions", 4 },
    { "granite", GGML_ROPE_TYPE_NORMAL, Activation::silu,     false, 0, false,  0.0f,  0.0f,  0,
      "scaled embeddings, scores, residuals and logits", 0, true },
    { "qwen2moe", GGML_ROPE_TYPE_NEOX, Activation::silu,      false, 0, false,  0.0f,  0.0f,  0,
      "a mixture of experts, and one that all tokens take; the routed ones stay as they are", 0, false, Routing::among_all },
    { "qwen3moe", GGML_ROPE_TYPE_NEOX, Activation::silu,      false, 0, false,  0.0f,  0.0f,  0,
      "a mixture of experts, which stay as they are; norms on Q and K", 0, false, Routing::among_chosen },
    { "lfm2",   GGML_ROPE_TYPE_NEOX,   Activation::silu,      false, 0, false,  0.0f,  0.0f,  0,
      "attention and short convolutions; norms on Q and K", 0, false, Routing::none, true },
};

const std::vector<Architecture> & trainable_architectures() { return table; }

namespace {

const Architecture & find_architecture(const std::string & name) {
    std::string known;
    for (const Architecture & row : trainable_architectures()) {
        if (name == row.name) {
            return row;
        }
        known += (known.empty() ? "" : ", ") + std::string(row.name);
    }
    throw unsupported_error("architecture '" + name + "' cannot be trained: its layers have no training graph (have: " +
                            known + ")");
}

// Reads keys below "<architecture>.".
struct Keys {
    const GgufMeta & meta;
    std::string      prefix;

    double number(const char * key, double fallback) const {
        return meta.number(prefix + key).value_or(fallback);
    }
    int required(const char * key) const {
        const auto value = meta.number(prefix + key);
        if (!value || *value < 1 || *value > 1 << 30) {
            throw format_error("metadata key " + prefix + key + " is missing or out of range");
        }
        return static_cast<int>(*value);
    }
    // A value that may differ from layer to layer; only one that does not is supported.
    int uniform(const char * key, int fallback) const {
        const auto values = meta.numbers(prefix + key);
        if (!values || values->empty()) {
            return static_cast<int>(number(key, fallback));
        }
        for (const double value : *values) {
            if (value != values->front()) {
                throw unsupported_error("cannot be trained: " + prefix + key + " differs from layer to layer");
            }
        }
        return static_cast<int>(values->front());
    }
};

// Hands out tensors by name and remembers which were asked for.
class TensorTable {
public:
    explicit TensorTable(const std::map<std::string, ggml_tensor *> & tensors) : tensors(tensors) {}

    ggml_tensor * find(const std::string & name) {
        const auto it = tensors.find(name);
        if (it == tensors.end()) {
            return nullptr;
        }
        used.insert(name);
        return it->second;
    }

    ggml_tensor * need(const std::string & name) {
        ggml_tensor * tensor = find(name);
        if (!tensor) {
            throw unsupported_error("cannot be trained: tensor " + name + " is missing");
        }
        return tensor;
    }

    // Norms, biases and rope factors take part in element-wise operations, which want F32.
    ggml_tensor * vector(const std::string & name, int64_t n) {
        ggml_tensor * tensor = find(name);
        if (tensor && (tensor->type != GGML_TYPE_F32 || ggml_nelements(tensor) != n)) {
            throw unsupported_error("cannot be trained: " + name + " should be " + std::to_string(n) +
                                    " F32 values, and is " + std::to_string(ggml_nelements(tensor)) + " of " +
                                    ggml_type_name(tensor->type));
        }
        return tensor;
    }

    ggml_tensor * matrix(const std::string & name, int64_t n_in, int64_t n_out, bool required = true) {
        ggml_tensor * tensor = required ? need(name) : find(name);
        return tensor ? shaped(tensor, name, n_in, n_out, 1) : nullptr;
    }

    // So many of them, in one tensor.
    ggml_tensor * matrices(const std::string & name, int64_t n_in, int64_t n_out, int64_t n) {
        return shaped(need(name), name, n_in, n_out, n);
    }

    void refuse_unused() const {
        for (const auto & [name, tensor] : tensors) {
            if (used.count(name)) {
                continue;
            }
            const char * what = name.find("_exps") != std::string::npos || name.find("ffn_gate_inp") != std::string::npos
                                    ? " (mixture of experts)"
                                : name.find("ssm_") != std::string::npos ? " (state-space layers)"
                                                                         : "";
            throw unsupported_error("cannot be trained: the training graph has no place for tensor " + name + what);
        }
    }

private:
    static ggml_tensor * shaped(ggml_tensor * tensor, const std::string & name, int64_t n_in, int64_t n_out, int64_t n) {
        if (tensor->ne[0] != n_in || tensor->ne[1] != n_out || tensor->ne[2] != n) {
            const auto shape = [](int64_t a, int64_t b, int64_t c) {
                return "[" + std::to_string(a) + ", " + std::to_string(b) + ", " + std::to_string(c) + "]";
            };
            throw unsupported_error("cannot be trained: " + name + " has shape " +
                                    shape(tensor->ne[0], tensor->ne[1], tensor->ne[2]) + ", expected " +
                                    shape(n_in, n_out, n));
        }
        return tensor;
    }

    const std::map<std::string, ggml_tensor *> & tensors;
    std::set<std::string> used;
};

Rope read_rope(const Keys & keys, const Architecture & arch, int n_head_dim, bool & longrope) {
    Rope rope;
    rope.mode  = arch.rope_mode;
    rope.n_rot = static_cast<int>(keys.number("rope.dimension_count", n_head_dim));
    if (rope.n_rot < 2 || rope.n_rot > n_head_dim || rope.n_rot % 2) {
        throw unsupported_error("cannot be trained: rope.dimension_count is " + std::to_string(rope.n_rot) +
                                " with heads of " + std::to_string(n_head_dim));
    }
    rope.base       = static_cast<float>(keys.number("rope.freq_base", 10000.0));
    rope.n_ctx_orig = static_cast<int>(keys.number("rope.scaling.original_context_length",
                                                   keys.number("context_length", 0)));

    const std::string scaling = keys.meta.text(keys.prefix + "rope.scaling.type").value_or("linear");
    longrope = scaling == "longrope";
    if (scaling != "none" && scaling != "linear" && scaling != "yarn" && !longrope) {
        throw unsupported_error("cannot be trained: rope scaling '" + scaling + "' is not known");
    }
    const double factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0));
    rope.scale = factor == 0.0 || scaling == "none" ? 1.0f : static_cast<float>(1.0 / factor);
    if (scaling == "yarn") {
        // ggml multiplies by 1 + 0.1 ln(factor) when extrapolating. Below a factor of 1 no such correction is wanted.
        rope.ext_factor  = 1.0f;
        const float f    = 1.0f / rope.scale;
        const auto magnitude = [f](float by) { return f <= 1.0f ? 1.0f : 1.0f + 0.1f * by * std::log(f); };
        float want = magnitude(1.0f);
        if (std::string(arch.name) == "mistral3") {
            rope.beta_fast = static_cast<float>(keys.number("rope.scaling.yarn_beta_fast", rope.beta_fast));
            rope.beta_slow = static_cast<float>(keys.number("rope.scaling.yarn_beta_slow", rope.beta_slow));
            const double all = keys.number("rope.scaling.yarn_log_multiplier", 0.0);
            want /= all == 0.0 ? 1.0f : magnitude(static_cast<float>(all));
        }
        rope.attn_factor = want / (1.0f + 0.1f * std::log(f));
    }
    rope.attn_factor *= static_cast<float>(keys.number("rope.scaling.attn_factor", 1.0));
    return rope;
}

void read_sliding_windows(const Keys & keys, ModelGraphInfo & model) {
    if (!model.arch->swa_period) {
        return;
    }
    model.n_swa = static_cast<int>(keys.number("attention.sliding_window", model.arch->swa_required ? 4096 : 0));
    if (model.n_swa <= 0) {
        model.n_swa = 0;
        return;
    }
    const auto pattern = keys.meta.numbers(keys.prefix + "attention.sliding_window_pattern");
    const int  period  = static_cast<int>(keys.number("attention.sliding_window_pattern", model.arch->swa_period));
    for (int l = 0; l < model.n_layer; ++l) {
        model.layers[l].sliding = pattern ? static_cast<size_t>(l) < pattern->size() && (*pattern)[l] != 0
                                          : period == 0 || l % period < period - 1;
    }
}

void read_feed_forward(TensorTable & table, const std::string & p, const ModelGraphInfo & model, LayerWeights & w) {
    if (model.n_expert) {
        w.router = table.matrix(p + "ffn_gate_inp.weight", model.n_embd, model.n_expert);
        const int64_t n_ff = table.need(p + "ffn_gate_exps.weight")->ne[1];
        w.gates = table.matrices(p + "ffn_gate_exps.weight", model.n_embd, n_ff, model.n_expert);
        w.ups   = table.matrices(p + "ffn_up_exps.weight", model.n_embd, n_ff, model.n_expert);
        w.downs = table.matrices(p + "ffn_down_exps.weight", n_ff, model.n_embd, model.n_expert);
        w.shared_share = table.vector(p + "ffn_gate_inp_shexp.weight", model.n_embd);
        if (w.shared_share) {
            const int64_t n_shared = table.need(p + "ffn_gate_shexp.weight")->ne[1];
            w.shared_gate = table.matrix(p + "ffn_gate_shexp.weight", model.n_embd, n_shared);
            w.shared_up   = table.matrix(p + "ffn_up_shexp.weight", model.n_embd, n_shared);
            w.shared_down = table.matrix(p + "ffn_down_shexp.weight", n_shared, model.n_embd);
        }
        return;
    }
    w.down = table.need(p + "ffn_down.weight");
    const int64_t n_ff = w.down->ne[0];
    table.matrix(p + "ffn_down.weight", n_ff, model.n_embd);
    w.gate = table.matrix(p + "ffn_gate.weight", model.n_embd, n_ff, false);
    w.up   = table.matrix(p + "ffn_up.weight", model.n_embd, w.gate ? n_ff : 2 * n_ff);
    w.gate_b = table.vector(p + "ffn_gate.bias", n_ff);
    w.up_b   = table.vector(p + "ffn_up.bias", w.up->ne[1]);
    w.down_b = table.vector(p + "ffn_down.bias", model.n_embd);
}

}  // namespace

ModelGraphInfo describe_model(const GgufMeta & meta, const std::map<std::string, ggml_tensor *> & weights) {
    ModelGraphInfo model;
    model.arch = &find_architecture(meta.text("general.architecture").value_or(""));
    const Keys keys{ meta, std::string(model.arch->name) + "." };

    model.n_layer   = keys.required("block_count");
    model.n_embd    = keys.required("embedding_length");
    model.n_head    = keys.uniform("attention.head_count", 0);
    const auto kv_heads = meta.numbers(keys.prefix + "attention.head_count_kv");
    model.layers.resize(model.n_layer);
    std::vector<bool> convolves(model.n_layer, false);
    if (model.arch->convolves && kv_heads && kv_heads->size() == convolves.size()) {
        model.n_head_kv = static_cast<int>(*std::max_element(kv_heads->begin(), kv_heads->end()));
        model.n_taps    = keys.required("shortconv.l_cache");
        for (int l = 0; l < model.n_layer; ++l) {
            const double n = (*kv_heads)[static_cast<size_t>(l)];
            convolves[l] = n == 0.0;
            if (n != 0.0 && n != model.n_head_kv) {
                throw unsupported_error("cannot be trained: layers have different numbers of key-value heads");
            }
        }
    } else {
        model.n_head_kv = keys.uniform("attention.head_count_kv", model.n_head);
    }
    if (model.n_head < 1 || model.n_head_kv < 1 || model.n_head % model.n_head_kv) {
        throw unsupported_error("cannot be trained: " + std::to_string(model.n_head) + " heads on " +
                                std::to_string(model.n_head_kv) + " key-value heads");
    }
    model.n_head_dim = static_cast<int>(keys.number("attention.key_length", model.n_embd / model.n_head));
    if (keys.number("attention.value_length", model.n_embd / model.n_head) != model.n_head_dim) {
        throw unsupported_error("cannot be trained: keys and values differ in width");
    }
    model.norm_eps  = static_cast<float>(keys.number("attention.layer_norm_rms_epsilon", 1e-5));
    model.n_ctx_max = 0;

    bool longrope = false;
    model.rope     = read_rope(keys, *model.arch, model.n_head_dim, longrope);
    model.rope_swa = model.rope;
    if (std::string(model.arch->name) == "gemma3") {
        model.rope_swa.base  = static_cast<float>(keys.number("rope.freq_base_swa", 10000.0));
        model.rope_swa.scale = 1.0f;
    } else {
        model.rope_swa.base = static_cast<float>(keys.number("rope.freq_base_swa", model.rope.base));
    }
    read_sliding_windows(keys, model);

    const double wide  = static_cast<double>(model.n_embd / model.n_head);
    const double scale = model.arch->wide_scale_layers == model.n_layer ? wide : model.n_head_dim;
    const double given = model.arch->rope_mode == GGML_ROPE_TYPE_NORMAL ? keys.number("attention.scale", 0.0) : 0.0;
    model.attn_scale   = static_cast<float>(given != 0.0 ? given : 1.0 / std::sqrt(scale));
    if (model.arch->attn_softcap != 0.0f) {
        model.attn_softcap = static_cast<float>(keys.number("attn_logit_softcapping", model.arch->attn_softcap));
    }
    if (model.arch->scaled_embedding) {
        model.embedding_scale = std::sqrt(static_cast<float>(model.n_embd));
        model.final_softcap   = static_cast<float>(keys.number("final_logit_softcapping", model.arch->final_softcap));
    }

    if (model.arch->scaled) {
        const auto scale = [&](const char * key) {
            const double value = keys.number(key, 0.0);
            return value == 0.0 ? 1.0f : static_cast<float>(value);
        };
        model.embedding_scale = scale("embedding_scale");
        model.residual_scale  = scale("residual_scale");
        model.output_scale    = 1.0f / scale("logit_scale");
    }
    for (int l = 0; l < model.n_layer; ++l) {
        const int period = model.arch->unrotated_period;
        model.layers[l].rotated = !(period && (l + 1) % period == 0) &&
                                  !(model.arch->scaled && keys.number("rope.scaling.finetuned", 1.0) == 0.0);
    }
    if (model.arch->routing != Routing::none) {
        model.n_expert      = keys.required("expert_count");
        model.n_expert_used = keys.required("expert_used_count");
        if (model.n_expert_used > model.n_expert) {
            throw format_error(std::to_string(model.n_expert_used) + " experts of " + std::to_string(model.n_expert));
        }
    }

    TensorTable table(weights);
    model.tok_embd    = table.need("token_embd.weight");
    model.output      = table.need("output.weight");   // the caller enters tied embeddings under both names
    model.n_vocab     = static_cast<int>(model.output->ne[1]);
    model.output_b    = table.vector("output.bias", model.n_vocab);
    model.output_norm = table.vector(model.arch->convolves ? "token_embd_norm.weight" : "output_norm.weight", model.n_embd);
    if (!model.output_norm) {
        throw unsupported_error("cannot be trained: tensor output_norm.weight is missing");
    }
    model.rope_factors = table.vector("rope_freqs.weight", model.rope.n_rot / 2);
    if (longrope) {
        // llama.cpp takes the long factors once a context exceeds the original one; the graph here has the short ones.
        model.rope_factors = table.vector("rope_factors_short.weight", model.rope.n_rot / 2);
        model.n_ctx_max    = model.rope.n_ctx_orig;
        table.find("rope_factors_long.weight");
    }
    if (std::string(model.arch->name) == "mistral3" && keys.number("attention.temperature_scale", 0.0) != 0.0) {
        model.n_ctx_max = model.rope.n_ctx_orig;   // further on, queries grow with their position
    }

    const int64_t n_q = static_cast<int64_t>(model.n_head) * model.n_head_dim;
    const int64_t n_kv = static_cast<int64_t>(model.n_head_kv) * model.n_head_dim;
    for (int l = 0; l < model.n_layer; ++l) {
        const std::string p = "blk." + std::to_string(l) + ".";
        LayerWeights & w = model.layers[l];
        const auto norm = [&](const char * name, int64_t n, bool required) {
            ggml_tensor * tensor = table.vector(p + name, n);
            if (!tensor && required) {
                throw unsupported_error("cannot be trained: tensor " + p + name + " is missing");
            }
            return tensor;
        };
        w.attn_norm      = norm("attn_norm.weight", model.n_embd, true);
        w.ffn_norm       = norm("ffn_norm.weight", model.n_embd, true);
        w.post_attn_norm = norm("post_attention_norm.weight", model.n_embd, model.arch->scaled_embedding);
        w.post_ffn_norm  = norm("post_ffw_norm.weight", model.n_embd, model.arch->scaled_embedding);
        if (convolves[l]) {
            w.conv     = table.vector(p + "shortconv.conv.weight", static_cast<int64_t>(model.n_taps) * model.n_embd);
            w.conv_in  = table.matrix(p + "shortconv.in_proj.weight", model.n_embd, 3 * model.n_embd);
            w.conv_out = table.matrix(p + "shortconv.out_proj.weight", model.n_embd, model.n_embd);
            if (!w.conv) {
                throw unsupported_error("cannot be trained: tensor " + p + "shortconv.conv.weight is missing");
            }
            read_feed_forward(table, p, model, w);
            continue;
        }
        w.q_norm         = norm("attn_q_norm.weight", model.n_head_dim, false);
        w.k_norm         = norm("attn_k_norm.weight", model.n_head_dim, w.q_norm != nullptr);

        w.qkv = table.matrix(p + "attn_qkv.weight", model.n_embd, n_q + 2 * n_kv, false);
        if (w.qkv) {
            w.qkv_b = table.vector(p + "attn_qkv.bias", n_q + 2 * n_kv);
        } else {
            w.q   = table.matrix(p + "attn_q.weight", model.n_embd, n_q);
            w.k   = table.matrix(p + "attn_k.weight", model.n_embd, n_kv);
            w.v   = table.matrix(p + "attn_v.weight", model.n_embd, n_kv);
            w.q_b = table.vector(p + "attn_q.bias", n_q);
            w.k_b = table.vector(p + "attn_k.bias", n_kv);
            w.v_b = table.vector(p + "attn_v.bias", n_kv);
        }
        w.o   = table.matrix(p + "attn_output.weight", n_q, model.n_embd);
        w.o_b = table.vector(p + "attn_output.bias", model.n_embd);

        read_feed_forward(table, p, model, w);
    }
    table.refuse_unused();
    return model;
}

}  // namespace triollama::native
