// The frozen base of a training run: its own mapping of the model file, never repacked, and the tensors found in it.
#pragma once

#include "guards/model_files.hpp"
#include "training/arch.hpp"

#include "llama-cpp.h"

#include <atomic>
#include <string>

namespace triollama::native {

class FrozenModel {
public:
    // Maps the file. With `n_gpu_layers` > 0 that many layers are copied to the GPU, if there is one.
    // Throws as ModelFiles::load, format_error if llama.cpp cannot load it, unsupported_error if it cannot be trained.
    FrozenModel(const std::string & path, int n_gpu_layers, int n_threads);

    // What they were when they were mapped; check() after computing tells whether they still are.
    const ModelFiles & model_files() const { return files; }

    const ModelGraphInfo & info() const { return graph_info; }
    size_t weight_bytes() const { return n_bytes; }

    // The weight of this name, or null.
    ggml_tensor * weight(const std::string & name) const;
    const std::map<std::string, ggml_tensor *> & weights() const { return tensors; }

    // Names of the matrices within a layer, such as "attn_q": all that can carry an adapter.
    std::vector<std::string> linear_targets() const;

private:
    llama_model_ptr model;
    ModelFiles files;           // after the model, so that it is destroyed before it
    std::map<std::string, ggml_tensor *> tensors;
    ModelGraphInfo graph_info;
    size_t n_bytes = 0;
};

}  // namespace triollama::native
