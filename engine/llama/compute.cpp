#include "llama/compute.hpp"

#include "guards/abort.hpp"
#include "guards/adapter_lock.hpp"
#include "guards/model_files.hpp"
#include "threads/openmp.hpp"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "llama-context.h"

#include <new>

namespace triollama::native {

namespace {

// As ggml-cpu.cpp has it; nobody else is told.
struct CpuContext {
    int               n_threads;
    ggml_threadpool_t threadpool;
    uint8_t *         work_data;
    size_t            work_size;
};

int32_t compute(int32_t (*call)(llama_context *, llama_batch), llama_context * ctx, const llama_batch & batch) {
    const ReadingAdapters table(llama_get_model(ctx));
    AbortScope scope;
    if (in_parallel() >= 0) {
        scope.enter();
    }
    int32_t code;
    try {
        code = call(ctx, batch);
    } catch (const std::bad_alloc &) {
        forget_work(ctx->get_sched());
        throw;
    }
    if (code == -2) {
        lay_out_again(ctx);
    }
    ModelFiles::check(llama_get_model(ctx));
    return code;
}

}  // namespace

int32_t guarded_decode(llama_context * ctx, const llama_batch & batch) { return compute(llama_decode, ctx, batch); }
int32_t guarded_encode(llama_context * ctx, const llama_batch & batch) { return compute(llama_encode, ctx, batch); }

void forget_work(ggml_backend_sched_t sched) {
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); i++) {
        const ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_is_cpu(backend)) {
            auto * context = static_cast<CpuContext *>(backend->context);
            context->work_data = nullptr;
            context->work_size = 0;
        }
    }
}

// That this layer's input is not asked for is how it is anyway; being told so makes it reserve.
void lay_out_again(llama_context * ctx) { ctx->set_embeddings_layer_inp(0, false); }

}  // namespace triollama::native
