// Metadata of a GGUF file, read without trusting it: a missing key or another type is an empty optional,
// never an assertion.
#pragma once

#include "ggml-cpp.h"
#include "gguf.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace triollama::native {

struct GgufTensor {
    std::string name;
    std::string type;               // as ggml names it, "q4_K"
    std::vector<int64_t> shape;     // ne[0] first
    uint64_t bytes;
};

class GgufMeta {
public:
    // Throws format_error if `path` is no GGUF file.
    explicit GgufMeta(const std::string & path);

    std::optional<std::string> text(const std::string & key) const;
    std::optional<double>      number(const std::string & key) const;   // integers, floats and booleans
    std::optional<std::vector<double>> numbers(const std::string & key) const;   // arrays of them

    std::vector<std::string> keys() const;
    std::vector<GgufTensor>  tensors() const;

private:
    gguf_context_ptr gguf;
};

}  // namespace triollama::native
