// What we ask of the runtime that ggml's CPU backend computes with: team.hpp, or the system's OpenMP, if it has any.
#pragma once

#include "threads/team.hpp"

// Weak, so that a build without OpenMP links.
#if !defined(TRIOLLAMA_TEAM) && defined(__GNUC__)
extern "C" int omp_in_parallel(void) __attribute__((weak, visibility("default")));
#endif

namespace triollama::native {

// 1: the calling thread is in a parallel computation, 0: it is not, -1: there is no OpenMP that could tell.
inline int in_parallel() {
#if defined(TRIOLLAMA_TEAM)
    return in_team();
#elif defined(__GNUC__)
    return omp_in_parallel ? omp_in_parallel() : -1;
#else
    return -1;
#endif
}

inline bool has_own_threads() {
#if defined(TRIOLLAMA_TEAM)
    return true;
#else
    return false;
#endif
}

// Ends the threads that compute nothing now: when a model is closed, nothing of it is left.
inline void retire_threads() {
#if defined(TRIOLLAMA_TEAM)
    retire_team();
#endif
}

}  // namespace triollama::native
