#include "llama/profile.hpp"

#include "ggml.h"
#include "llama-context.h"

namespace triollama::native {

namespace {

std::string kind_of(const ggml_tensor * node) {
    const ggml_tensor * a = node->src[0];
    const bool custom = node->op == GGML_OP_CUSTOM;     // of training
    if (node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_MUL_MAT_ID && !(custom && node->src[1])) {
        if (custom && node->type == GGML_TYPE_I32) {
            return ggml_op_name(GGML_OP_ARGMAX);
        }
        return custom ? std::string("REORDER ") + ggml_type_name(node->type) : ggml_op_desc(node);
    }
    const int64_t n_k = node->ne[0] == a->ne[1] ? a->ne[0] : a->ne[1];
    return std::string(custom ? "PRODUCT" : ggml_op_name(node->op)) + " " + ggml_type_name(a->type) + " " +
           std::to_string(node->ne[0]) + "x" + std::to_string(n_k) + "x" + std::to_string(ggml_nrows(node));
}

}  // namespace

Profile::Profile(ggml_backend_sched_t sched) : sched(sched) { watch(visit); }

Profile::Profile(llama_context * ctx) : sched(ctx->get_sched()), ctx(ctx) { watch(visit); }

Profile::~Profile() { watch(nullptr); }

void Profile::watch(ggml_backend_sched_eval_callback callback) {
    void * self = callback ? this : nullptr;
    if (ctx) {      // sets it for each graph that it makes, from what it was made with
        auto & params = const_cast<llama_cparams &>(ctx->get_cparams());
        params.cb_eval           = callback;
        params.cb_eval_user_data = self;
    }
    if (sched) {
        ggml_backend_sched_set_eval_callback(sched, callback, self);
    }
}

bool Profile::visit(ggml_tensor * node, bool ask, void * self) {
    Profile & profile = *static_cast<Profile *>(self);
    if (ask) {
        profile.started = ggml_time_us();
    } else {
        Timing & timing = profile.found[kind_of(node)];
        timing.seconds += 1e-6 * static_cast<double>(ggml_time_us() - profile.started);
        ++timing.calls;
    }
    return true;
}

}  // namespace triollama::native
