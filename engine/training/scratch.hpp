// 64-byte aligned memory of one thread, which grows.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace triollama::native {

class Scratch {
public:
    template <typename T> T * get(size_t count) {
        size_t space = count * sizeof(T) + alignment;
        if (memory.size() < space) {
            memory = std::vector<char>();
            memory = std::vector<char>(space + space / 2);
            space  = memory.size();
        }
        void * at = memory.data();
        return static_cast<T *>(std::align(alignment, count * sizeof(T), at, space));
    }

private:
    static constexpr size_t alignment = 64;
    std::vector<char> memory;
};

}  // namespace triollama::native
