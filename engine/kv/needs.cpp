#include "kv/needs.hpp"

#include "guards/errors.hpp"
#include "guards/log.hpp"
#include "guards/model_files.hpp"
#include "llama/load.hpp"

#include "ggml-backend.h"
#include "llama-cpp.h"
#include "llama-ext.h"

namespace triollama::native {

std::vector<Needs> memory_held(const llama_context * ctx) {
    std::vector<Needs> found(1);
    found[0].device = "CPU";
    for (const auto & [type, memory] : llama_get_memory_breakdown(ctx)) {
        ggml_backend_dev_t device = ggml_backend_buft_is_host(type) ? nullptr : ggml_backend_buft_get_device(type);
        if (device && ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            device = nullptr;       // weights that were rearranged are no host memory to ggml
        }
        Needs * needs = &found[0];
        if (device) {
            const std::string name = ggml_backend_dev_name(device);
            for (needs = &found[0]; needs != found.data() + found.size() && needs->device != name; ++needs) {
            }
            if (needs == found.data() + found.size()) {
                found.push_back({name});
                needs = &found.back();
                size_t free = 0, total = 0;
                ggml_backend_dev_memory(device, &free, &total);
                needs->free  = free;
                needs->total = total;
            }
        }
        needs->weights += memory.model;
        needs->cache   += memory.context;
        needs->compute += memory.compute;
    }
    return found;
}

std::vector<Needs> memory_needs(
    const std::string & path, llama_model_params model_params, Repack repack, const llama_context_params & context_params) {
    model_params.no_alloc  = true;
    model_params.load_mode = LLAMA_LOAD_MODE_NONE;
    llama_model_ptr model;
    ModelFiles files;               // is gone before the model: see there
    LogQueue::forget_problem();
    model.reset(load_model(files, path, model_params, repack));
    if (!model) {
        throw format_error(LogQueue::problem());
    }
    const llama_context_ptr ctx(make_context(model.get(), context_params));
    if (!ctx) {
        throw format_error(LogQueue::problem());
    }
    return memory_held(ctx.get());
}

}  // namespace triollama::native
