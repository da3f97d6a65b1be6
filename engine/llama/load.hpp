// llama_model_load_from_file and llama_init_from_model, made safe: see load.cpp.
#pragma once

#include "guards/model_files.hpp"

#include "llama.h"

#include <string>

namespace triollama::native {

// How weights are rearranged for speed (CPU): in no way; for ggml's kernels alone; for ours, and ggml's where those round
// each row by itself (llama/exact.hpp); for ours, and ggml's for the types that ours do not know.
enum class Repack { none, ggml, exact, all };

// Checks each part of the model, opens it in `files`, and loads it. nullptr: see llama.cpp's log. Throws format_error,
// file_error, invalid_argument for an override of another type, model_changed. params.use_extra_bufts is set by `repack`.
llama_model * load_model(ModelFiles & files, const std::string & path, llama_model_params params, Repack repack);

// nullptr: see llama.cpp's log. Throws format_error where the graph of the model's architecture cannot be built from its
// file, or could not be computed, and invalid_argument where a cache of these types cannot hold its heads.
llama_context * make_context(llama_model * model, const llama_context_params & params);

}  // namespace triollama::native
