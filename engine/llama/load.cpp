// A model is loaded, its graph built, and looked at before anything is computed.
//
// Much of what a file says is checked by llama.cpp only in the kernels, where many threads compute and nothing can be
// undone: a failed assertion there ends the process. The graph that llama.cpp builds to reserve memory holds what became
// of the file's numbers, whatever keys they came from, so it is there that they are looked at.
#include "llama/load.hpp"

#include "guards/abort.hpp"
#include "guards/adapter_lock.hpp"
#include "guards/errors.hpp"
#include "guards/fault.hpp"
#include "kernels/buffer.hpp"
#include "llama/exact.hpp"
#include "llama/gguf_check.hpp"

#include "llama-context.h"
#include "llama-cpp.h"
#include "llama-graph.h"
#include "llama-model.h"

#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

namespace triollama::native {

namespace {

[[noreturn]] void refuse(const ggml_tensor * node, const std::string & what) {
    throw format_error(std::string(ggml_op_name(node->op)) + " in " + (node->name[0] ? node->name : "its graph") + ": " + what);
}

float real(const ggml_tensor * node, int i) {
    float value;
    std::memcpy(&value, node->op_params + i, sizeof(value));
    return value;
}

void check_rope(const ggml_tensor * node) {
    const int32_t n_dims = node->op_params[1];
    const int32_t mode   = node->op_params[2];
    const int32_t offset = node->op_params[15];
    const int64_t width  = node->src[0]->ne[0];
    if (n_dims < 1 || n_dims % 2 != 0 || offset < 0 || offset % 2 != 0 || offset + int64_t(n_dims) > width) {
        refuse(node, std::to_string(n_dims) + " rotary dimensions in a head of " + std::to_string(width)
            + "; they must be even and fit");
    }
    if (mode & GGML_ROPE_TYPE_MROPE) {
        const int32_t * sections = node->op_params + 11;
        if (sections[0] <= 0 && sections[1] <= 0 && sections[2] <= 0) {
            refuse(node, "rope.dimension_sections is missing, or all 0");
        }
        if (mode == GGML_ROPE_TYPE_VISION && n_dims != width / 2) {
            refuse(node, std::to_string(n_dims) + " rotary dimensions in a head of " + std::to_string(width)
                + "; they must be half");
        }
    }
}

void check_graph(ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        switch (node->op) {
            case GGML_OP_ROPE:
                check_rope(node);
                break;
            case GGML_OP_NORM: case GGML_OP_RMS_NORM: case GGML_OP_L2_NORM:
                if (!(real(node, 0) >= 0)) {
                    refuse(node, "the epsilon is " + std::to_string(real(node, 0)));
                }
                break;
            default:
                break;
        }
    }
}

bool multiple_of_block(uint32_t width, ggml_type type) { return width % (uint32_t) ggml_blck_size(type) == 0; }

// With flash attention llama.cpp refuses these too; without, it computes with heads that all lie in one place.
void check_cache(const llama_model & model, ggml_type type_k, ggml_type type_v) {
    const llama_hparams & h = model.hparams;
    auto cannot_store = [](const char * what, uint32_t width, ggml_type type) {
        throw std::invalid_argument(std::string(what) + " of " + std::to_string(width)
            + " values a head cannot be stored in blocks of type " + ggml_type_name(type));
    };
    for (uint32_t il = 0; il < h.n_layer(); il++) {
        if (h.is_recr(il) || !h.has_kv(il)) {
            continue;
        }
        if (const uint32_t width = h.n_embd_head_k(il); !multiple_of_block(width, type_k)) {
            cannot_store("keys", width, type_k);
        }
        if (const uint32_t width = h.n_embd_head_v(il); !h.is_mla() && !multiple_of_block(width, type_v)) {
            cannot_store("values", width, type_v);
        }
    }
}

}  // namespace

llama_model * load_model(ModelFiles & files, const std::string & path, llama_model_params params, Repack repack) {
    files.open(path);
    for (const std::string & part : check_model(path, !params.vocab_only, params.kv_overrides)) {
        if (part != path) {
            files.open(part);
        }
    }
    llama_model_ptr model;
    {
        const MappingScope mapping = files.mapping();
        params.use_extra_bufts = repack != Repack::none;
        std::optional<ExactWeights> exact;
        if (repack == Repack::exact) {
            exact.emplace(params);
        }
        std::optional<kernels::WithoutKernels> without;
        if (repack == Repack::ggml) {
            without.emplace();
        }
        AbortScope aborts;
        aborts.enter();
        FaultScope faults;
        faults.enter();
        model.reset(llama_model_load_from_file(path.c_str(), params));
        if (!model && faults.fault()) {
            throw format_error(faults.fault());
        }
    }
    if (model) {
        files.adopt(model.get());
    }
    return model.release();
}

llama_context * make_context(llama_model * model, const llama_context_params & params) {
    check_cache(*model, params.type_k, params.type_v);
    llama_context_ptr context;
    const ReadingAdapters table(model);
    AbortScope aborts;
    aborts.enter();
    FaultScope faults;
    faults.enter();
    context.reset(llama_init_from_model(model, params));
    if (faults.fault()) {
        throw format_error(faults.fault());
    }
    if (context) {
        const llm_graph_result * built = context->get_gf_res_reserve();
        if (built && built->get_gf()) {
            check_graph(built->get_gf());
        }
    }
    return context.release();
}

}  // namespace triollama::native
