// What all threads of the process share, and a forked child must have anew: another thread may be in the middle of it
// while this one forks, and the child would wait for its lock for ever.
#pragma once

#include <new>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace triollama::native {

// One T, made at the first call and never destroyed, since threads outlive main.
template <class T> T & per_process() {
    alignas(T) static unsigned char place[sizeof(T)];
    static T * const only = [] {
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, [] { new (place) T; });
#endif
        return new (place) T;
    }();
    return *only;
}

}  // namespace triollama::native
