#include "llama/gguf_file.hpp"

#include "guards/checksum.hpp"
#include "guards/errors.hpp"

#include <algorithm>

namespace triollama::native {

namespace {

constexpr size_t block_size = 1 << 20;

}  // namespace

// Every function throws file_error where the system refuses, and where the disk gives back something else.

GgufFile::GgufFile(const std::string & path, const gguf_context * gguf)
    : path(path), file(std::fopen(path.c_str(), "wb")), alignment(gguf_get_alignment(gguf)) {
    if (!file) {
        throw file_error(path);
    }
    std::setvbuf(file.get(), nullptr, _IONBF, 0);   // no byte is late to fail
    std::vector<uint8_t> head(gguf_get_meta_size(gguf));
    gguf_get_meta_data(gguf, head.data());
    write(head.data(), head.size());
}

void GgufFile::add(const void * data, size_t size) {
    const std::vector<uint8_t> zeros((alignment - size % alignment) % alignment, 0);
    write(data, size);
    write(zeros.data(), zeros.size());
}

void GgufFile::write(const void * data, size_t size) {
    const uint8_t * from = static_cast<const uint8_t *>(data);
    while (size > 0) {
        const size_t part = std::min(size, block_size - block.size());
        block.insert(block.end(), from, from + part);
        from += part;
        size -= part;
        if (block.size() == block_size) {
            flush();
        }
    }
}

void GgufFile::flush() {
    errno = 0;
    if (std::fwrite(block.data(), 1, block.size(), file.get()) != block.size()) {
        throw file_error(path, errno ? errno : EIO);
    }
    sums.push_back(state_checksum(block.data(), block.size()));
    block.clear();
}

void GgufFile::finish() {
    if (!block.empty()) {
        flush();
    }
    if (std::fclose(file.release()) != 0) {
        throw file_error(path);
    }
    file.reset(std::fopen(path.c_str(), "rb"));
    if (!file) {
        throw file_error(path);
    }
    block.resize(block_size);
    for (const uint32_t sum : sums) {
        const size_t n = std::fread(block.data(), 1, block_size, file.get());
        if (n == 0 || state_checksum(block.data(), n) != sum) {
            throw file_error(path, EIO);
        }
    }
    if (std::fgetc(file.get()) != EOF) {
        throw file_error(path, EIO);
    }
}

}  // namespace triollama::native
