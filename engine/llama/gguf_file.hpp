// A GGUF file as it is written: nothing counts as written until it was read back.
#pragma once

#include "gguf.h"

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

namespace triollama::native {

class GgufFile {
public:
    // Writes the metadata and tensor table of `gguf` over what is at `path`; the tensors follow, in its order.
    GgufFile(const std::string & path, const gguf_context * gguf);

    void add(const void * data, size_t size);   // the next tensor's bytes

    // Closes the file, reads it again and compares. What was added is not in the file before.
    void finish();

private:
    struct Close {
        void operator()(FILE * file) const { std::fclose(file); }
    };

    void write(const void * data, size_t size);
    void flush();

    std::string path;
    std::unique_ptr<FILE, Close> file;
    size_t alignment;
    std::vector<uint8_t> block;      // what is yet to be written, less than a block
    std::vector<uint32_t> sums;      // of each block that was
};

}  // namespace triollama::native
