// Memory for the threads of a computation, reserved when its graph is planned. In those threads nothing is allocated: what
// fails there can be told to nobody, and ends the process.
#pragma once

#include <cstddef>
#include <cstdint>

namespace triollama::native::kernels {

// Hands out one part after another. Without memory it only counts: what is planned and what is used is the same code.
class Workspace {
public:
    static constexpr size_t alignment = 64;

    Workspace() = default;
    explicit Workspace(void * memory) : begin((reinterpret_cast<uintptr_t>(memory) + alignment - 1) / alignment * alignment) {}

    template <class T> T * take(int64_t n) {
        const uintptr_t at = begin + used;
        used += (static_cast<size_t>(n) * sizeof(T) + alignment - 1) / alignment * alignment;
        return begin ? reinterpret_cast<T *>(at) : nullptr;
    }

    // What a Workspace with memory needs.
    size_t bytes() const { return used ? used + alignment : 0; }

private:
    uintptr_t begin = 0;
    size_t    used = 0;
};

}  // namespace triollama::native::kernels
