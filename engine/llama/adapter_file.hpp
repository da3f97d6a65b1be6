// A LoRA file becomes an adapter of a model, and is freed again. Both change a table of the model that every reserve of
// one of its contexts reads: never while a context of the model computes.
#pragma once

#include "decoding/decoder.hpp"
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

// The same between two steps of the thread that drives the model's context. The reply's value is the pointer.
inline ReplyPtr open_adapter_between_steps(Decoder & decoder, llama_model * model, const std::string & path) {
    return decoder.call([model, path](Reply & reply) {
        reply.value = (int64_t) (intptr_t) open_adapter(model, path);
    });
}

inline ReplyPtr free_adapter_between_steps(Decoder & decoder, llama_adapter_lora * adapter) {
    return decoder.call([adapter](Reply &) { free_adapter(adapter); });
}

}  // namespace triollama
