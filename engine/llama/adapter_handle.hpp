// A LoRA file becomes an adapter of a model, and is freed again: between the computations of the model, which wait.
#pragma once

#include "guards/abort.hpp"
#include "guards/adapter_lock.hpp"
#include "guards/errors.hpp"
#include "guards/log.hpp"

#include "llama.h"

#include <cstdint>
#include <string>

namespace triollama::native {

// Throws format_error if llama.cpp refuses the file, or would have ended the process.
inline llama_adapter_lora * open_adapter(llama_model * model, const std::string & path) {
    LogQueue::forget_problem();
    llama_adapter_lora * adapter = nullptr;
    const ChangingAdapters alone(model);
    try {
        adapter = guarded([&] { return llama_adapter_lora_init(model, path.c_str()); });
    } catch (const native_abort & e) {
        throw format_error(e.what());
    }
    if (!adapter) {
        throw format_error(LogQueue::problem());
    }
    return adapter;
}

inline void free_adapter(const llama_model * model, llama_adapter_lora * adapter) {
    const ChangingAdapters alone(model);
    llama_adapter_lora_free(adapter);
}

// Does not wait: if the model computes, the adapter is freed with it, since it lists it.
inline void free_adapter_now(const llama_model * model, llama_adapter_lora * adapter) {
    if (const ChangingAdapters alone{model, ChangingAdapters::When::now}) {
        llama_adapter_lora_free(adapter);
    }
}

}  // namespace triollama::native
