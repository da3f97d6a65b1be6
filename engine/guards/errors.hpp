// The exceptions of our own native code. raise.hpp turns each into its Python class.
#pragma once

#include <stdexcept>

namespace triollama {

// What a Sampler throws when its grammar is at fault: cannot be parsed, or allows no continuation.
struct grammar_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A blob that is damaged or belongs elsewhere.
struct state_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A file that is not what it should be (model, adapter).
struct format_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What the native library, or hardware, cannot do.
struct unsupported_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// llama.cpp failed in the middle of something: the context can only be freed.
struct broken_context : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace triollama
