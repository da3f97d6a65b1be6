// What we ask of the OpenMP runtime that ggml's CPU backend computes with, if it was built with one.
//
// The symbols are weak, so that a build without OpenMP links. A runtime keeps a team of threads for each thread that
// ever computed, and libgomp, once its teams together have more threads than there are cores, lets them sleep sooner
// at barriers: about a quarter of the speed goes, though only one team may be computing.
#pragma once

#if defined(__GNUC__)
extern "C" int omp_in_parallel(void) __attribute__((weak, visibility("default")));
extern "C" int omp_pause_resource_all(int kind) __attribute__((weak, visibility("default")));
#endif

namespace triollama {

// 1: the calling thread is in a parallel computation, 0: it is not, -1: there is no OpenMP that could tell.
inline int in_parallel() {
#if defined(__GNUC__)
    return omp_in_parallel ? omp_in_parallel() : -1;
#else
    return -1;
#endif
}

// Ends the calling thread's team. The next computation makes another, in about 0.1 ms.
inline void release_team() {
#if defined(__GNUC__)
    constexpr int hard = 2;     // omp_pause_hard
    if (omp_pause_resource_all && in_parallel() == 0) {
        omp_pause_resource_all(hard);
    }
#endif
}

}  // namespace triollama
