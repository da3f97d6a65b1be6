#include "training/layer.hpp"

#include <cmath>

namespace triollama::native {

ggml_tensor * differentiable_sigmoid(ggml_context * context, ggml_tensor * x) {
    return ggml_exp(context, ggml_scale(context, ggml_softplus(context, ggml_scale(context, x, -1.0f)), -1.0f));
}

ggml_tensor * differentiable_tanh(ggml_context * context, ggml_tensor * x) {
    return ggml_scale_bias(context, differentiable_sigmoid(context, ggml_scale(context, x, 2.0f)), 2.0f, -1.0f);
}

namespace {

// Columns [first, first + n) of every row, as a tensor of its own.
ggml_tensor * part(ggml_context * c, ggml_tensor * x, int64_t first, int64_t n) {
    return ggml_cont(c, ggml_view_2d(c, x, n, x->ne[1], x->nb[1], static_cast<size_t>(first) * ggml_element_size(x)));
}

ggml_tensor * rotate(ggml_context * c, ggml_tensor * x, ggml_tensor * positions, ggml_tensor * factors, const Rope & r) {
    return ggml_rope_ext(c, x, positions, factors, r.n_rot, r.mode, r.n_ctx_orig, r.base, r.scale, r.ext_factor,
                         r.attn_factor, r.beta_fast, r.beta_slow);
}

// The tanh form of GELU. With d = c (1 + 0.044715 g^2), c = 2 sqrt(2 / pi) and u = g d:
// gelu(g) = g sigmoid(u) = silu(u) / d, and d >= c > 0.
ggml_tensor * gelu_tanh(ggml_context * c, ggml_tensor * g) {
    const float factor = 1.5957691216057308f;
    ggml_tensor * d = ggml_scale_bias(c, ggml_sqr(c, g), 0.044715f * factor, factor);
    return ggml_div(c, ggml_silu(c, ggml_mul(c, g, d)), d);
}

ggml_tensor * add_residual(ggml_context * c, ggml_tensor * h, ggml_tensor * change, const ModelGraphInfo & m) {
    return ggml_add(c, m.residual_scale == 1.0f ? change : ggml_scale(c, change, m.residual_scale), h);
}

}  // namespace

ggml_tensor * LayerBuilder::norm(Graph & graph, ggml_tensor * x, ggml_tensor * weight) const {
    return ggml_mul(graph.context(), ggml_rms_norm(graph.context(), x, model.info().norm_eps), weight);
}

// W x + bias, and beside it scale * B A dropout(x) if W has an adapter.
ggml_tensor * LayerBuilder::linear(Graph & graph, ggml_tensor * weight, ggml_tensor * bias, ggml_tensor * x,
                                   const LayerInputs & inputs) const {
    ggml_context * c = graph.context();
    ggml_tensor * y = graph.product(weight, x);
    if (const LoraPair * lora = adapters.find(weight)) {
        const auto mask = inputs.dropout.find(weight);
        if (mask != inputs.dropout.end()) {
            x = ggml_mul(c, x, mask->second);
        }
        ggml_tensor * low = ggml_scale(c, ggml_mul_mat(c, lora->a, x), adapters.config().scale());
        if (inputs.adapted) {
            low = ggml_mul(c, low, inputs.adapted);
        }
        y = ggml_add(c, y, ggml_mul_mat(c, lora->b, low));
    }
    if (bias) {
        y = ggml_add(c, y, bias);
    }
    if (const auto kept = inputs.kept.find(weight); kept != inputs.kept.end()) {
        graph.keep(y, kept->second);
    }
    return y;
}

ggml_tensor * LayerBuilder::attention(Graph & graph, const LayerWeights & w, ggml_tensor * x,
                                      const LayerInputs & inputs) const {
    ggml_context * c = graph.context();
    const ModelGraphInfo & m = model.info();
    const int64_t n_tokens = x->ne[1];
    const int64_t n_q  = static_cast<int64_t>(m.n_head) * m.n_head_dim;
    const int64_t n_kv = static_cast<int64_t>(m.n_head_kv) * m.n_head_dim;

    ggml_tensor * q, * k, * v;
    if (w.qkv) {
        ggml_tensor * qkv = linear(graph, w.qkv, w.qkv_b, x, inputs);
        q = part(c, qkv, 0, n_q);
        k = part(c, qkv, n_q, n_kv);
        v = part(c, qkv, n_q + n_kv, n_kv);
    } else {
        q = linear(graph, w.q, w.q_b, x, inputs);
        k = linear(graph, w.k, w.k_b, x, inputs);
        v = linear(graph, w.v, w.v_b, x, inputs);
    }
    q = ggml_reshape_3d(c, q, m.n_head_dim, m.n_head, n_tokens);
    k = ggml_reshape_3d(c, k, m.n_head_dim, m.n_head_kv, n_tokens);
    v = ggml_reshape_3d(c, v, m.n_head_dim, m.n_head_kv, n_tokens);
    if (w.q_norm) {
        q = norm(graph, q, w.q_norm);
        k = norm(graph, k, w.k_norm);
    }
    if (w.rotated) {
        const Rope & rope = w.sliding ? m.rope_swa : m.rope;
        q = rotate(c, q, inputs.positions, m.rope_factors, rope);
        k = rotate(c, k, inputs.positions, m.rope_factors, rope);
    }

    q = ggml_cont(c, ggml_permute(c, q, 0, 2, 1, 3));            // [head_dim, n_tokens, n_head]
    k = ggml_cont(c, ggml_permute(c, k, 0, 2, 1, 3));
    v = ggml_cont(c, ggml_permute(c, v, 1, 2, 0, 3));            // [n_tokens, head_dim, n_head_kv]

    ggml_tensor * scores = ggml_mul_mat(c, k, q);                // [keys, queries, n_head]
    float scale = m.attn_scale;
    if (m.attn_softcap != 0.0f) {
        scores = ggml_scale(c, scores, m.attn_scale / m.attn_softcap);
        scores = ggml_scale(c, differentiable_tanh(c, scores), m.attn_softcap);
        scale  = 1.0f;
    }
    scores = ggml_soft_max_ext(c, scores, w.sliding ? inputs.mask_swa : inputs.mask, scale, 0.0f);
    ggml_tensor * mixed = ggml_mul_mat(c, v, scores);            // [head_dim, n_tokens, n_head]
    mixed = ggml_cont_2d(c, ggml_permute(c, mixed, 0, 2, 1, 3), n_q, n_tokens);
    return linear(graph, w.o, w.o_b, mixed, inputs);
}

// Of x three projections b, c and v: c times, channel by channel, a sum over b v of the last few tokens.
ggml_tensor * LayerBuilder::convolution(Graph & graph, const LayerWeights & w, ggml_tensor * x,
                                        const LayerInputs & inputs) const {
    ggml_context * c = graph.context();
    const int64_t n = model.info().n_embd, n_taps = model.info().n_taps;
    const auto tap = [&](int64_t i) {   // a weight for each channel; the last is the token's own
        ggml_tensor * column = ggml_view_2d(c, w.conv, 1, n, static_cast<size_t>(n_taps) * sizeof(float),
                                            static_cast<size_t>(i) * sizeof(float));
        return ggml_reshape_1d(c, ggml_cont(c, column), n);
    };
    ggml_tensor * projected = linear(graph, w.conv_in, nullptr, x, inputs);
    ggml_tensor * gated = ggml_mul(c, part(c, projected, 0, n), part(c, projected, 2 * n, n));
    ggml_tensor * sum   = ggml_mul(c, gated, tap(n_taps - 1));
    for (int64_t back = 1; back < n_taps; ++back) {
        const size_t i = static_cast<size_t>(back - 1);
        ggml_tensor * before = ggml_mul(c, ggml_get_rows(c, gated, inputs.past[i]), inputs.has_past[i]);
        sum = ggml_add(c, sum, ggml_mul(c, before, tap(n_taps - 1 - back)));
    }
    return linear(graph, w.conv_out, nullptr, ggml_mul(c, part(c, projected, n, n), sum), inputs);
}

ggml_tensor * LayerBuilder::feed_forward(Graph & graph, const LayerWeights & w, ggml_tensor * x,
                                         const LayerInputs & inputs) const {
    ggml_context * c = graph.context();
    ggml_tensor * up = linear(graph, w.up, w.up_b, x, inputs);
    ggml_tensor * gate;
    if (w.gate) {
        gate = linear(graph, w.gate, w.gate_b, x, inputs);
    } else {
        const int64_t n_ff = up->ne[0] / 2;
        gate = part(c, up, 0, n_ff);
        up   = part(c, up, n_ff, n_ff);
    }
    ggml_tensor * inner = model.info().arch->activation == Activation::gelu_tanh
                              ? ggml_mul(c, gelu_tanh(c, gate), up)
                              : ggml_swiglu_split(c, gate, up);
    return linear(graph, w.down, w.down_b, inner, inputs);
}

// sigmoid(share . x) of what the shared expert makes of x.
ggml_tensor * LayerBuilder::shared_expert(Graph & graph, const LayerWeights & w, ggml_tensor * x,
                                          const LayerInputs & inputs) const {
    ggml_context * c = graph.context();
    ggml_tensor * inner = ggml_swiglu_split(c, linear(graph, w.shared_gate, nullptr, x, inputs),
                                            linear(graph, w.shared_up, nullptr, x, inputs));
    ggml_tensor * share = differentiable_sigmoid(c, ggml_mul_mat(c, w.shared_share, x));
    return ggml_mul(c, linear(graph, w.shared_down, nullptr, inner, inputs), share);
}

// h and what attention, or a convolution in its place, adds to it.
ggml_tensor * LayerBuilder::attended(Graph & graph, const LayerWeights & w, ggml_tensor * h,
                                     const LayerInputs & inputs) const {
    ggml_tensor * x = norm(graph, h, w.attn_norm);
    ggml_tensor * change = w.conv ? convolution(graph, w, x, inputs) : attention(graph, w, x, inputs);
    if (w.post_attn_norm) {
        change = norm(graph, change, w.post_attn_norm);
    }
    return add_residual(graph.context(), h, change, model.info());
}

ggml_tensor * LayerBuilder::layer(Graph & graph, int index, ggml_tensor * h, const LayerInputs & inputs) const {
    const LayerWeights & w = model.info().layers[static_cast<size_t>(index)];
    h = attended(graph, w, h, inputs);
    ggml_tensor * change = feed_forward(graph, w, norm(graph, h, w.ffn_norm), inputs);
    if (w.post_ffn_norm) {
        change = norm(graph, change, w.post_ffn_norm);
    }
    return add_residual(graph.context(), h, change, model.info());
}

LayerBuilder::Routed LayerBuilder::route(Graph & graph, int index, ggml_tensor * h, const LayerInputs & inputs,
                                         ggml_tensor * chosen) const {
    ggml_context * c = graph.context();
    const LayerWeights & w = model.info().layers[static_cast<size_t>(index)];
    Routed routed;
    routed.base   = attended(graph, w, h, inputs);
    routed.x      = norm(graph, routed.base, w.ffn_norm);
    routed.shares = linear(graph, w.router, nullptr, routed.x, inputs);
    if (chosen) {
        routed.shares = model.info().arch->routing == Routing::among_chosen
                            ? ggml_soft_max_ext(c, routed.shares, chosen, 1.0f, 0.0f)
                            : ggml_mul(c, ggml_soft_max(c, routed.shares), chosen);
    }
    if (w.shared_share) {
        routed.base = ggml_add(c, shared_expert(graph, w, routed.x, inputs), routed.base);
    }
    return routed;
}

ggml_tensor * LayerBuilder::last_norm(Graph & graph, ggml_tensor * h) const {
    ggml_tensor * x = norm(graph, h, model.info().output_norm);
    const float scale = model.info().output_scale;
    return scale == 1.0f ? x : ggml_scale(graph.context(), x, scale);
}

}  // namespace triollama::native
