#include "guards/abort.hpp"

#include "guards/model_files.hpp"
#include "threads/openmp.hpp"

#include <cstdio>

namespace triollama {

namespace {

int32_t guarded(int32_t (*compute)(llama_context *, llama_batch), llama_context * ctx, const llama_batch & batch) {
    AbortScope scope;
    if (in_parallel() >= 0) {
        scope.enter();
    }
    const int32_t code = compute(ctx, batch);
    ModelFiles::check(llama_get_model(ctx));
    return code;
}

}  // namespace

int32_t guarded_decode(llama_context * ctx, const llama_batch & batch) { return guarded(llama_decode, ctx, batch); }
int32_t guarded_encode(llama_context * ctx, const llama_batch & batch) { return guarded(llama_encode, ctx, batch); }

void AbortScope::on_abort(const char * message) {
    if (depth > 0 && in_parallel() <= 0) {
        throw native_abort(message);
    }
    // The end of the process: what went wrong must not get lost with the log queue.
    std::fprintf(stderr, "%s\n", message);
    std::fflush(stderr);
}

}  // namespace triollama
