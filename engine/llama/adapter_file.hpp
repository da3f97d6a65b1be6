// A LoRA file becomes an adapter of a model, and is freed again. Both change a table of the model that every reserve of
// one of its contexts reads: never while a context of the model computes.
#pragma once

#include "guards/abort.hpp"
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

inline void free_adapter(llama_adapter_lora * adapter) { llama_adapter_lora_free(adapter); }

}  // namespace triollama::native
