#include "llama/exact.hpp"

#include "ggml-backend.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "llama-context.h"

#include <cstdint>

#ifdef TRIOLLAMA_WRAPS_PRODUCTS
extern "C" {
#ifdef TRIOLLAMA_WRAPS_LLAMAFILE
bool __real_llamafile_sgemm(const ggml_compute_params *, int64_t, int64_t, int64_t, const void *, int64_t, const void *, int64_t,
                            void *, int64_t, int, int, int);

bool __wrap_llamafile_sgemm(const ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * a, int64_t lda,
                            const void * b, int64_t ldb, void * c, int64_t ldc, int type_a, int type_b, int type_c) {
    return !params->use_ref && __real_llamafile_sgemm(params, m, n, k, a, lda, b, ldb, c, ldc, type_a, type_b, type_c);
}
#endif

bool __real_ggml_compute_forward_mul_mat_tiled(const ggml_compute_params *, ggml_tensor *);
bool __real_ggml_compute_forward_mul_mat_id_tiled(const ggml_compute_params *, ggml_tensor *, int64_t, int64_t, const int32_t *,
                                                  char *);

bool __wrap_ggml_compute_forward_mul_mat_tiled(const ggml_compute_params * params, ggml_tensor * dst) {
    return !params->use_ref && __real_ggml_compute_forward_mul_mat_tiled(params, dst);
}

bool __wrap_ggml_compute_forward_mul_mat_id_tiled(const ggml_compute_params * params, ggml_tensor * dst, int64_t expert,
                                                  int64_t n_rows, const int32_t * rows, char * scratch) {
    return !params->use_ref && __real_ggml_compute_forward_mul_mat_id_tiled(params, dst, expert, n_rows, rows, scratch);
}
}
#endif

namespace triollama::native {

std::string make_exact(llama_context * ctx) {
#ifdef TRIOLLAMA_WRAPS_PRODUCTS
    const ggml_backend_sched_t sched = ctx->get_sched();
    const int                  n     = ggml_backend_sched_get_n_backends(sched);
    for (int i = 0; i < n; i++) {
        const ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (!ggml_backend_is_cpu(backend)) {
            return std::string("backend ") + ggml_backend_name(backend) + " rounds as it likes";
        }
    }
    for (int i = 0; i < n; i++) {
        ggml_backend_cpu_set_use_ref(ggml_backend_sched_get_backend(sched, i), true);
    }
    return {};
#else
    (void) ctx;
    return "this build's linker could not lead around the kernels that round many rows together (Linux with GNU ld or lld)";
#endif
}

}  // namespace triollama::native
