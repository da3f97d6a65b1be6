// llama_model_load_from_file and llama_init_from_model, made safe: see load.cpp.
#pragma once

#include "guards/model_files.hpp"

#include "llama.h"

#include <string>

namespace triollama::native {

// Checks each part of the model, opens it in `files`, and loads it. nullptr: see llama.cpp's log. Throws format_error,
// file_error, invalid_argument for an override of another type, model_changed. `exact`: see ExactWeights; `with_kernels`:
// see kernels/buffer.hpp; params.use_extra_bufts must be set then.
llama_model * load_model(ModelFiles & files, const std::string & path, llama_model_params params, bool exact = false,
                         bool with_kernels = false);

// nullptr: see llama.cpp's log. Throws format_error where the graph of the model's architecture cannot be built from its
// file, or could not be computed, and invalid_argument where a cache of these types cannot hold its heads.
llama_context * make_context(llama_model * model, const llama_context_params & params);

}  // namespace triollama::native
