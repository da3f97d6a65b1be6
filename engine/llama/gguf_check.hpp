// A look at a GGUF file before llama.cpp loads it, for what would end the process later.
#pragma once

#include "llama.h"

#include <string>
#include <vector>

namespace triollama::native {

// Throws format_error if the file is no well-formed GGUF file: cut short, counts, types or sizes that cannot be, tensors
// outside the file. Throws file_error if it cannot be read. Reads the metadata only.
void check_gguf(const std::string & path);

// The same of each part of a model; returns their paths. With `weights`, format_error also if it holds values that
// llama.cpp accepts and then fails on while it computes, where nothing can be undone: rotary dimensions wider than a head,
// norms that are not F32, a negative epsilon. `overrides`, ending with an empty key or NULL, count in place of the
// file's values; throws invalid_argument for one that llama.cpp would ignore, because its type is another.
std::vector<std::string> check_model(const std::string & path, bool weights, const llama_model_kv_override * overrides);

}  // namespace triollama::native
