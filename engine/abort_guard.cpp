#include "abort_guard.hpp"

#include <cstdio>

// There if the CPU backend was built with OpenMP. Its own thread pool cannot say whether a computation runs.
#if defined(__GNUC__)
extern "C" int omp_in_parallel(void) __attribute__((weak, visibility("default")));
#endif

namespace triollama {

namespace {

// 1: in a parallel computation, 0: not, -1: cannot tell.
int in_parallel() {
#if defined(__GNUC__)
    return omp_in_parallel ? omp_in_parallel() : -1;
#else
    return -1;
#endif
}

}  // namespace

int32_t guarded_decode(llama_context * ctx, const llama_batch & batch) {
    AbortScope scope;
    if (in_parallel() >= 0) {
        scope.enter();
    }
    return llama_decode(ctx, batch);
}

int32_t guarded_encode(llama_context * ctx, const llama_batch & batch) {
    AbortScope scope;
    if (in_parallel() >= 0) {
        scope.enter();
    }
    return llama_encode(ctx, batch);
}

void AbortScope::on_abort(const char * message) {
    if (depth > 0 && in_parallel() <= 0) {
        throw native_abort(message);
    }
    // The end of the process: what went wrong must not get lost with the log queue.
    std::fprintf(stderr, "%s\n", message);
    std::fflush(stderr);
}

}  // namespace triollama
