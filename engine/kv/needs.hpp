// What a model and a context would allocate, found by llama.cpp itself: it lays out everything and allocates nothing.
#pragma once

#include "llama/load.hpp"

#include "llama.h"

#include <cstdint>
#include <string>
#include <vector>

namespace triollama::native {

struct Needs {
    std::string device;         // as ggml names it; "CPU" for all host memory
    uint64_t weights = 0, cache = 0, compute = 0;       // bytes
    uint64_t free = 0, total = 0;                       // of the device, as its backend tells
};

// Host memory first. Throws what load_model and make_context throw, and format_error where they give nothing.
std::vector<Needs> memory_needs(
    const std::string & path, llama_model_params model_params, Repack repack, const llama_context_params & context_params);

// The same of a context that exists: what is allocated.
std::vector<Needs> memory_held(const llama_context * ctx);

}  // namespace triollama::native
