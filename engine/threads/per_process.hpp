// What all threads of the process share, and a forked child must have anew: another thread may be in the middle of it
// while this one forks, and the child would wait for its lock for ever.
#pragma once

#include <new>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace triollama::native {

// One T, made while the extension is loaded: were it made at the first call, a child could be forked in the middle of
// that. Never destroyed, since threads outlive main.
template <class T> class PerProcess {
public:
    static T & only() {
        alignas(T) static unsigned char place[sizeof(T)];
        static T * const made = [] {
#if !defined(_WIN32)
            pthread_atfork(nullptr, nullptr, [] { new (place) T; });
#endif
            return new (place) T;
        }();
        (void) &at_load;
        return *made;
    }

private:
    static inline T & at_load = only();
};

template <class T> T & per_process() { return PerProcess<T>::only(); }

}  // namespace triollama::native
