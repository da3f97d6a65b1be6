#include "kv/shift.hpp"

#include "guards/abort.hpp"
#include "guards/adapter_lock.hpp"
#include "guards/errors.hpp"
#include "guards/log.hpp"
#include "llama/compute.hpp"
#include "threads/openmp.hpp"

#include "llama-context.h"
#include "llama-cpp.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <cmath>
#include <exception>

namespace triollama::native {

namespace {

// A cache holds the layers that slide, those that do not, or all.
enum class Layers { all, sliding, others };

bool rotates_whole_heads(const llama_kv_cache & cache) {
    const ggml_init_params params = {ggml_tensor_overhead(), nullptr, true};
    const ggml_context_ptr scratch(ggml_init(params));
    return cache.build_input_k_rot(scratch.get()) != nullptr;
}

std::string why_not(const llama_context & ctx, const llama_kv_cache & cache, Layers layers, ggml_type type_k) {
    const llama_model & model = ctx.get_model();
    const llama_hparams & h = model.hparams;
    const llama_cparams & c = ctx.get_cparams();
    if (h.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return {};                          // then a position is a number and nothing else
    }
    bool rotated = false;
    for (uint32_t il = 0; il < h.n_layer(); il++) {
        if (!h.has_kv(il) || !h.has_rope(il) || (layers != Layers::all && h.is_swa(il) != (layers == Layers::sliding))) {
            continue;
        }
        rotated = true;
        // Every key of the cache goes through the rotation, most of them by nothing, and is multiplied by this again.
        const float scale = c.yarn_attn_factor *
            (c.yarn_ext_factor != 0.0f ? 1.0f + 0.1f * std::log(1.0f / model.get_rope_freq_scale(c, (int) il)) : 1.0f);
        if (!(std::fabs(scale - 1.0f) < 1e-6f)) {
            return "its keys are scaled (by YaRN, LongRoPE or an attention factor), and moving them would scale all of them again";
        }
        // Quantised keys are stored as a product with a Hadamard matrix of whole heads, which has to be undone.
        if (ggml_is_quantized(type_k) && h.n_rot((int) il) != h.n_embd_head_k((int) il)) {
            return "with quantised keys, heads must be rotated whole";
        }
    }
    if (!rotated) {
        return "one of its caches holds no layer that knows positions";
    }
    if (type_k != GGML_TYPE_F32 && type_k != GGML_TYPE_F16 && !ggml_is_quantized(type_k)) {
        return std::string("llama.cpp cannot rotate keys of type ") + ggml_type_name(type_k);
    }
    if (ggml_is_quantized(type_k) && !rotates_whole_heads(cache)) {
        return std::string("llama.cpp rotates keys of type ") + ggml_type_name(type_k) + " only where a head's width is a multiple of 64";
    }
    return {};
}

std::string why_not(const llama_context & ctx, const llama_kv_cache_iswa & cache, ggml_type type_k) {
    const std::string others = why_not(ctx, *cache.get_base(), Layers::others, type_k);
    return others.empty() ? why_not(ctx, *cache.get_swa(), Layers::sliding, type_k) : others;
}

void update(llama_context * ctx) {
    const ReadingAdapters table(llama_get_model(ctx));
    AbortScope scope;
    if (in_parallel() >= 0) {
        scope.enter();
    }
    ctx->sched_reserve();                   // as llama_decode does
    ctx->memory_update(false);
    // It only logs a failure. What is still to be done tells.
    if (ctx->get_memory()->init_update(ctx, false)->get_status() != LLAMA_MEMORY_STATUS_NO_UPDATE) {
        const std::string problem = LogQueue::problem();
        throw broken_context("llama.cpp could not move positions" + (problem.empty() ? "" : ": " + problem));
    }
    if (!LogQueue::problem().empty()) {
        lay_out_again(ctx);                 // there was no memory for the largest graph, which it reserves afterwards
    }
}

}  // namespace

std::string why_no_shift(const llama_context * ctx, ggml_type type_k) {
    llama_memory_i * memory = ctx->get_memory();
    if (!memory) {
        return "it has no memory: the model only encodes";
    }
    if (dynamic_cast<const llama_memory_recurrent *>(memory) || dynamic_cast<const llama_memory_hybrid *>(memory) ||
        dynamic_cast<const llama_memory_hybrid_iswa *>(memory)) {
        return "recurrent state cannot be cut";
    }
    if (!memory->get_can_shift()) {
        return "llama.cpp does not know how to, for this model or with swa_full=False";
    }
    if (const auto * cache = dynamic_cast<const llama_kv_cache *>(memory)) {
        return why_not(*ctx, *cache, Layers::all, type_k);
    }
    if (const auto * cache = dynamic_cast<const llama_kv_cache_iswa *>(memory)) {
        return why_not(*ctx, *cache, type_k);
    }
    return "it is of a kind for which moving them is not proven";
}

void settle(llama_context * ctx, ggml_abort_callback callback, void * data) {
    LogQueue::forget_problem();
    llama_set_abort_callback(ctx, nullptr, nullptr);
    try {
        update(ctx);
    } catch (const broken_context &) {
        throw;
    } catch (const std::exception & e) {
        throw broken_context(e.what());
    }
    llama_set_abort_callback(ctx, callback, data);
}

}  // namespace triollama::native
