// How deep the calling thread may still go. Programs may give their threads stacks that llama.cpp does not fit into,
// and one that overflows ends the process.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace triollama::native {

// Bytes below the caller; SIZE_MAX where it cannot be told.
inline size_t stack_left() {
#if defined(__linux__) || defined(__APPLE__)
    struct Bounds {
        uintptr_t low = 0, high = 0;

        Bounds() {
#if defined(__APPLE__)
            high = reinterpret_cast<uintptr_t>(pthread_get_stackaddr_np(pthread_self()));
            low  = high - pthread_get_stacksize_np(pthread_self());
#else
            pthread_attr_t attributes;
            void * begin = nullptr;
            size_t size = 0;
            if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
                if (pthread_attr_getstack(&attributes, &begin, &size) == 0) {
                    low  = reinterpret_cast<uintptr_t>(begin);
                    high = low + size;
                }
                pthread_attr_destroy(&attributes);
            }
#endif
        }
    };
    static thread_local const Bounds bounds;
    const uintptr_t here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    if (here > bounds.low && here < bounds.high) {      // and not on a stack of somebody's own
        return here - bounds.low;
    }
#endif
    return SIZE_MAX;
}

}  // namespace triollama::native
