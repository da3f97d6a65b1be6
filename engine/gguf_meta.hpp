// Metadata of a GGUF file, read without trusting it: a missing key or another type is an empty optional,
// never an assertion.
#pragma once

#include "ggml-cpp.h"
#include "gguf.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace triollama {

class GgufMeta {
public:
    // Throws format_error if `path` is no GGUF file.
    explicit GgufMeta(const std::string & path);

    std::optional<std::string> text(const std::string & key) const;
    std::optional<double>      number(const std::string & key) const;   // integers, floats and booleans
    std::optional<std::vector<double>> numbers(const std::string & key) const;   // arrays of them

private:
    gguf_context_ptr gguf;
};

}  // namespace triollama
