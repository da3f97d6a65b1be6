// A look at a GGUF file before llama.cpp loads it, for what would end the process later.
#pragma once

#include <map>
#include <string>

namespace triollama {

// Throws format_error if the file is no well-formed GGUF file: cut short, counts, types or sizes that cannot be, tensors
// outside the file. With `model`, also if it holds values that llama.cpp accepts and then fails on while it computes,
// where nothing can be undone: rotary dimensions wider than a head, norms that are not F32, a negative epsilon.
// Throws std::runtime_error if the file cannot be read. Reads the metadata only.
// `overrides` are numbers by key that llama.cpp will read in place of the file's.
void check_gguf(const std::string & path, bool model, const std::map<std::string, double> & overrides = {});

}  // namespace triollama
