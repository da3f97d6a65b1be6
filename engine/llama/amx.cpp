// Upstream's AMX products take the n-th matrix of weights for the n-th matrix of activations, also where all of these are
// multiplied with one: they read behind the weights. Models with recurrent layers do that, once as many sequences as
// make a matrix each are in a batch. The activations are contiguous, so their rows are those of one matrix.
#if defined(TRIOLLAMA_WRAPS_PRODUCTS) && defined(__x86_64__)

#include "ggml.h"

struct ggml_compute_params;

extern "C" {

// ggml_backend_amx_mul_mat of ggml/src/ggml-cpu/amx/mmq.h, where the build has it.
[[gnu::weak]] void __real__Z24ggml_backend_amx_mul_matPK19ggml_compute_paramsP11ggml_tensor(
    const ggml_compute_params * params, ggml_tensor * dst);

void __wrap__Z24ggml_backend_amx_mul_matPK19ggml_compute_paramsP11ggml_tensor(const ggml_compute_params * params,
                                                                             ggml_tensor * dst) {
    const auto flat = [](const ggml_tensor * x) {
        ggml_tensor made = *x;
        made.ne[1] = ggml_nrows(x);
        made.ne[2] = made.ne[3] = 1;
        made.nb[2] = made.nb[3] = made.nb[1] * static_cast<size_t>(made.ne[1]);
        return made;
    };
    const ggml_tensor * weights = dst->src[0];
    if (weights->ne[2] * weights->ne[3] > 1 || dst->ne[2] * dst->ne[3] == 1) {
        __real__Z24ggml_backend_amx_mul_matPK19ggml_compute_paramsP11ggml_tensor(params, dst);
        return;
    }
    ggml_tensor activations = flat(dst->src[1]);
    ggml_tensor product = flat(dst);
    product.src[1] = &activations;
    __real__Z24ggml_backend_amx_mul_matPK19ggml_compute_paramsP11ggml_tensor(params, &product);
}

}

#endif
