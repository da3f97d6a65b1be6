// A LoRA file becomes an adapter of a model, and is freed again. Both change a table of the model that every reserve of
// one of its contexts reads: never while a context of the model computes.
#pragma once

#include "guards/abort.hpp"
#include "guards/errors.hpp"
#include "guards/log.hpp"

#include "llama.h"

#include <cstdint>
#include <string>

namespace triollama {

// Throws format_error if llama.cpp refuses the file, native_abort where it would have ended the process.
inline llama_adapter_lora * open_adapter(llama_model * model, const std::string & path) {
    LogQueue::instance().forget_problem();
    AbortScope scope;
    scope.enter();
    llama_adapter_lora * adapter = llama_adapter_lora_init(model, path.c_str());
    if (!adapter) {
        throw format_error(LogQueue::instance().problem());
    }
    return adapter;
}

inline void free_adapter(llama_adapter_lora * adapter) { llama_adapter_lora_free(adapter); }

}  // namespace triollama
