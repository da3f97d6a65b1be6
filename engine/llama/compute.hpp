// llama_decode and llama_encode, made safe.
#pragma once

#include "ggml-backend.h"
#include "llama.h"

#include <cstdint>

namespace triollama::native {

// Inside an AbortScope. After an exception the context can only be freed, and after model_changed the model: see
// guards/model_files.hpp. After a code it goes on as before.
int32_t guarded_decode(llama_context * ctx, const llama_batch & batch);
int32_t guarded_encode(llama_context * ctx, const llama_batch & batch);

// For whoever catches a std::bad_alloc out of ggml's computing: the CPU's backend frees its work buffer before it asks for a
// larger one, and would free it again.
void forget_work(ggml_backend_sched_t sched);

// Where llama.cpp finds no memory for a graph it frees the buffers that were too small, and takes them to be there when the
// next graph is alike. After this the next computation reserves them anew, and throws if it cannot.
void lay_out_again(llama_context * ctx);

}  // namespace triollama::native
