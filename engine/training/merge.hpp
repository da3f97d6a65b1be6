// A full model file with an adapter added into its weights.
#pragma once

#include "training/adapter.hpp"

#include <string>

namespace triollama::native {

// Copies the model file `base` to `path`; each matrix with an adapter becomes W + scale * B A. Its type stays, or is
// `type` unless that is GGML_TYPE_COUNT. Throws unsupported_error for a type that cannot be written,
// format_error if `base` is damaged, file_error if writing fails.
void merge_adapter(const std::string & base, const AdapterSet & adapters, const std::string & path, ggml_type type);

}  // namespace triollama::native
