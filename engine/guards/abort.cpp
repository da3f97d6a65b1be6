#include "guards/abort.hpp"

#include "guards/adapter_lock.hpp"
#include "guards/model_files.hpp"
#include "threads/openmp.hpp"

#include <cstdio>
#include <utility>

namespace triollama::native {

namespace {

int32_t compute_guarded(int32_t (*compute)(llama_context *, llama_batch), llama_context * ctx, const llama_batch & batch) {
    const ReadingAdapters table(llama_get_model(ctx));
    AbortScope scope;
    if (in_parallel() >= 0) {
        scope.enter();
    }
    const int32_t code = compute(ctx, batch);
    ModelFiles::check(llama_get_model(ctx));
    return code;
}

}  // namespace

int32_t guarded_decode(llama_context * ctx, const llama_batch & batch) { return compute_guarded(llama_decode, ctx, batch); }
int32_t guarded_encode(llama_context * ctx, const llama_batch & batch) { return compute_guarded(llama_encode, ctx, batch); }

void AbortScope::begin() {
    depth += in_parallel() >= 0;
    thrown.clear();
}

std::string AbortScope::end() {
    depth -= in_parallel() >= 0;
    return std::exchange(thrown, {});
}

void AbortScope::on_abort(const char * message) {
    if (depth > 0 && in_parallel() <= 0) {
        thrown = message;
        throw native_abort(message);
    }
    // The end of the process: what went wrong must not get lost with the log queue.
    std::fprintf(stderr, "%s\n", message);
    std::fflush(stderr);
}

}  // namespace triollama::native
