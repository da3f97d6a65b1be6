// The exceptions of our own native code. raise.hpp turns each into its Python class.
#pragma once

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

namespace triollama::native {

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

// What a model computes no longer counts: its file was cut, or written to.
struct model_changed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What the operating system refused to do with a file; errno says why.
struct file_error : std::runtime_error {
    explicit file_error(const std::string & path, int code = errno)
        : std::runtime_error(path + ": " + std::strerror(code)), path(path), code(code) {}

    std::string path;
    int code;
};

// What the native library, or hardware, cannot do.
struct unsupported_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// llama.cpp failed in the middle of something: the context can only be freed.
struct broken_context : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace triollama::native
