#include "training/model.hpp"

#include "guards/errors.hpp"
#include "llama/compute.hpp"
#include "llama/load.hpp"

#include "ggml-backend.h"

namespace triollama::native {

namespace {

// llama.cpp has no public way to list a model's tensors. What it reads in one decode are the leaves of its graph
// that lie in buffers of weights, and the callback for graph nodes shows those.
struct Harvest {
    std::map<std::string, ggml_tensor *> tensors;
    ggml_tensor * embedding = nullptr;   // what token rows are read from; may share its name with the output matrix

    static bool visit(ggml_tensor * node, bool ask, void * self) {
        if (ask) {
            static_cast<Harvest *>(self)->see(node);
        }
        return false;   // the values of nodes are of no interest
    }

    void see(ggml_tensor * node) {
        for (ggml_tensor * source : node->src) {
            if (!source || source->op != GGML_OP_NONE || !source->buffer || source->view_src ||
                ggml_backend_buffer_get_usage(source->buffer) != GGML_BACKEND_BUFFER_USAGE_WEIGHTS) {
                continue;
            }
            if (node->op == GGML_OP_GET_ROWS && std::string(source->name) == "token_embd.weight") {
                embedding = source;
            } else {
                tensors[source->name] = source;
            }
        }
    }
};

}  // namespace

FrozenModel::FrozenModel(const std::string & path, int n_gpu_layers, int n_threads) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = n_gpu_layers;
    // Repacked weights have neither a backward pass nor a way back to F32.
    model.reset(load_model(files, path, params, Repack::none));
    if (!model) {
        throw format_error(path + ": llama.cpp cannot load this model");
    }
    const GgufMeta meta(path);

    Harvest harvest;
    llama_context_params context_params = llama_context_default_params();
    context_params.n_ctx = context_params.n_batch = context_params.n_ubatch = 32;
    context_params.n_threads = context_params.n_threads_batch = n_threads;
    context_params.flash_attn_type   = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    context_params.cb_eval           = Harvest::visit;
    context_params.cb_eval_user_data = &harvest;
    context_params.no_perf           = true;
    {
        const llama_context_ptr context(make_context(model.get(), context_params));
        llama_token token = 0;
        if (!context || guarded_decode(context.get(), llama_batch_get_one(&token, 1)) != 0) {
            throw unsupported_error(path + ": cannot be trained: llama.cpp cannot evaluate it");
        }
    }
    if (!harvest.embedding) {
        throw unsupported_error(path + ": cannot be trained: its graph does not read token_embd.weight");
    }
    tensors = std::move(harvest.tensors);
    if (!tensors.count("output.weight")) {
        // Tied: the same matrix, or on a GPU its copy, is the output.
        const auto it = tensors.find("token_embd.weight");
        tensors["output.weight"] = it == tensors.end() ? harvest.embedding : it->second;
    }
    tensors["token_embd.weight"] = harvest.embedding;

    graph_info = describe_model(meta, tensors);
    n_bytes    = llama_model_size(model.get());
}

ggml_tensor * FrozenModel::weight(const std::string & name) const {
    const auto it = tensors.find(name);
    return it == tensors.end() ? nullptr : it->second;
}

std::vector<std::string> FrozenModel::linear_targets() const {
    std::vector<std::string> names;
    for (const char * name :
         { "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
           "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp", "shortconv.in_proj", "shortconv.out_proj" }) {
        for (int l = 0; l < graph_info.n_layer; ++l) {
            if (weight("blk." + std::to_string(l) + "." + name + ".weight")) {
                names.emplace_back(name);
                break;
            }
        }
    }
    return names;
}

}  // namespace triollama::native
