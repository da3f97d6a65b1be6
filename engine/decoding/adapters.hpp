// Adapters come and go between two steps of the thread that drives a context of their model.
#pragma once

#include "decoding/decoder.hpp"
#include "llama/adapter_handle.hpp"

namespace triollama::native {

// The reply's value is the pointer.
inline ReplyPtr open_adapter_between_steps(Decoder & decoder, llama_model * model, const std::string & path) {
    return decoder.call([model, path](Reply & reply) {
        reply.value = (int64_t) (intptr_t) open_adapter(model, path);
    });
}

inline ReplyPtr free_adapter_between_steps(
    Decoder & decoder, const llama_model * model, llama_adapter_lora * adapter) {
    return decoder.call([model, adapter](Reply &) { free_adapter(model, adapter); });
}

}  // namespace triollama::native
