#include "llama/exact.hpp"

#include "ggml-backend.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "kernels/attention.hpp"
#include "llama-context.h"
#include "llama-cpp.h"
#include "llama-graph.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <cstdint>
#include <cstring>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace {

thread_local bool exact_weights = false;

bool rounds_each_row_alone(ggml_backend_buffer_type_t type) {
    return ggml_backend_buft_is_host(type) || std::strcmp(ggml_backend_buft_name(type), "AMX") == 0 ||
           std::strcmp(ggml_backend_buft_name(type), "triollama") == 0;   // kernels/buffer.cpp
}

namespace kernels = triollama::native::kernels;

// Tells attention the positions of cells, by the tensors in which keys lie.
void order(const llama_kv_cache & cache) {
    const std::vector<uint32_t> layers = cache.get_layer_ids();
    const ggml_init_params params = {layers.size() * ggml_tensor_overhead(), nullptr, true};
    const ggml_context_ptr scratch(ggml_init(params));
    llama_kv_cache::slot_info place;
    place.s0 = place.s1 = 0;
    for (const uint32_t layer : layers) {
        cache.get_k(scratch.get(), static_cast<int32_t>(layer), 1, place)->view_src->extra = const_cast<llama_kv_cells *>(&cache.get_cells(0));
    }
}

bool attention_is_ours(ggml_cgraph * graph, bool ordered) {
#ifdef TRIOLLAMA_KERNELS
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        const bool masked = node->op == GGML_OP_SOFT_MAX && node->src[1];   // attention in products
        if (masked || (node->op == GGML_OP_FLASH_ATTN_EXT && !(kernels::can_attend(node) && (!ordered || kernels::tells_order(node))))) {
            return false;
        }
    }
    return true;
#else
    (void) graph, (void) ordered;
    return false;
#endif
}

using Caches = std::vector<const llama_kv_cache *>;

// The caches of a context whose rows see the same cells however they are cut; nothing for kinds that choose among cells.
std::optional<Caches> caches_of(const llama_memory_i * memory) {
    const auto both = [](const llama_kv_cache_iswa & cache) { return Caches{ cache.get_base(), cache.get_swa() }; };
    if (!memory || dynamic_cast<const llama_memory_recurrent *>(memory)) {
        return Caches{};
    }
    if (const auto * cache = dynamic_cast<const llama_kv_cache *>(memory)) {
        return Caches{ cache };
    }
    if (const auto * sliding = dynamic_cast<const llama_kv_cache_iswa *>(memory)) {
        return both(*sliding);
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid *>(memory)) {
        return Caches{ hybrid->get_mem_attn() };
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa *>(memory)) {
        return both(*hybrid->get_mem_attn());
    }
    return std::nullopt;
}

}  // namespace

#ifdef TRIOLLAMA_WRAPS_PRODUCTS
extern "C" {
#ifdef TRIOLLAMA_WRAPS_LLAMAFILE
#if defined(__x86_64__) && defined(NDEBUG)     // elsewhere they decline up to seven rows; its assertions know no such strides
constexpr bool SAME_FOR_ANY_NUMBER_OF_ROWS = true;
#else
constexpr bool SAME_FOR_ANY_NUMBER_OF_ROWS = false;
#endif

bool __real_llamafile_sgemm(const ggml_compute_params *, int64_t, int64_t, int64_t, const void *, int64_t, const void *, int64_t,
                            void *, int64_t, int, int, int);

// Each number of these products is a sum of its own, in an order that depends on its length only. But they decline a row
// that is alone, which ggml's kernel then adds up otherwise: here it is computed twice, from and to the same place.
bool __wrap_llamafile_sgemm(const ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * a, int64_t lda,
                            const void * b, int64_t ldb, void * c, int64_t ldc, int type_a, int type_b, int type_c) {
    if (params->use_ref && !SAME_FOR_ANY_NUMBER_OF_ROWS) {
        return false;
    }
    if (params->use_ref && n == 1) {
        return __real_llamafile_sgemm(params, m, 2, k, a, lda, b, 0, c, 0, type_a, type_b, type_c);
    }
    return __real_llamafile_sgemm(params, m, n, k, a, lda, b, ldb, c, ldc, type_a, type_b, type_c);
}
#endif

void * __real_ggml_backend_reg_get_proc_address(ggml_backend_reg_t, const char *);

static thread_local ggml_backend_dev_get_extra_bufts_t all_types = nullptr;

static ggml_backend_buffer_type_t * exact_types(ggml_backend_dev_t device) {
    thread_local std::vector<ggml_backend_buffer_type_t> found;
    found.clear();
    for (ggml_backend_buffer_type_t * type = all_types(device); type && *type; type++) {
        if (rounds_each_row_alone(*type)) {
            found.push_back(*type);
        }
    }
    found.push_back(nullptr);
    return found.data();
}

// The loader asks by this name how weights may be rearranged.
void * __wrap_ggml_backend_reg_get_proc_address(ggml_backend_reg_t reg, const char * name) {
    void * found = __real_ggml_backend_reg_get_proc_address(reg, name);
    if (!exact_weights || !found || std::strcmp(name, "ggml_backend_dev_get_extra_bufts") != 0) {
        return found;
    }
    all_types = (ggml_backend_dev_get_extra_bufts_t) found;
    return (void *) exact_types;
}
}
#endif

namespace triollama::native {

ExactWeights::ExactWeights(llama_model_params & params) {
#ifdef TRIOLLAMA_WRAPS_PRODUCTS
    (void) params;
    exact_weights = true;
#else
    params.use_extra_bufts = false;
#endif
}

ExactWeights::~ExactWeights() { exact_weights = false; }

std::string rearranged(const llama_model * model) {
    std::set<std::string> names;
    for (const auto & [name, tensor] : llama_internal_get_tensor_map(model)) {
        if (tensor->buffer && !ggml_backend_buffer_is_host(tensor->buffer)) {
            names.insert(ggml_backend_buffer_name(tensor->buffer));
        }
    }
    std::string all;
    for (const std::string & name : names) {
        all += (all.empty() ? "" : "+") + name;
    }
    return all;
}

bool has_flash_attention(const llama_context * ctx) { return ctx->get_cparams().flash_attn; }

std::string make_exact(llama_context * ctx) {
#ifdef TRIOLLAMA_WRAPS_PRODUCTS
    const ggml_backend_sched_t sched = ctx->get_sched();
    const int                  n     = ggml_backend_sched_get_n_backends(sched);
    for (int i = 0; i < n; i++) {
        const ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (!ggml_backend_is_cpu(backend)) {
            return std::string("backend ") + ggml_backend_name(backend) + " rounds as it likes";
        }
    }
    for (const auto & [name, tensor] : llama_internal_get_tensor_map(&ctx->get_model())) {
        if (tensor->buffer && !rounds_each_row_alone(ggml_backend_buffer_get_type(tensor->buffer))) {
            return std::string(ggml_backend_buffer_name(tensor->buffer)) + ", as which " + name +
                   " is loaded, rounds rows together; load the Model with repack=\"exact\"";
        }
    }
    const bool flash = ctx->get_cparams().flash_attn, shared = ctx->get_cparams().kv_unified;
    if (shared && !flash) {
        return "this model attends without llama.cpp's flash attention; take kv_unified=False and flash_attn=\"off\"";
    }
    if (flash) {
        const std::optional<Caches> caches = caches_of(ctx->get_memory());
        if (shared && caches) {     // separate ones lie in order
            for (const llama_kv_cache * cache : *caches) {
                order(*cache);
            }
        }
        if (!caches || !attention_is_ours(ctx->get_gf_res_reserve()->get_gf(), shared && !caches->empty())) {
            return "this model attends in a way that our kernels do not know; take kv_unified=False and flash_attn=\"off\"";
        }
    }
    for (int i = 0; i < n; i++) {
        ggml_backend_cpu_set_use_ref(ggml_backend_sched_get_backend(sched, i), true);
    }
    return {};
#else
    (void) ctx;
    return "this build's linker could not lead around the kernels that round many rows together (Linux with GNU ld or lld)";
#endif
}

}  // namespace triollama::native
