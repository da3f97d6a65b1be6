#include "training/experts.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace triollama::native {

namespace {

constexpr size_t max_expert_nodes = 128;
constexpr size_t max_layer_nodes  = 2048;

ggml_tensor * matrix_of(Graph & graph, ggml_tensor * matrices, size_t index) {
    return ggml_view_2d(graph.context(), matrices, matrices->ne[0], matrices->ne[1], matrices->nb[1],
                        index * matrices->nb[2]);
}

// The first n of [1, n_tokens] or [n_tokens].
ggml_tensor * first(Graph & graph, ggml_tensor * values, size_t n) {
    return ggml_view_1d(graph.context(), values, static_cast<int64_t>(n), 0);
}

}  // namespace

Experts::Experts(const FrozenModel & model, const LayerBuilder & builder, int64_t n_tokens, ggml_backend_buffer_type_t type)
    : info(model.info()), builder(builder), n_tokens(n_tokens), store(16) {
    for (ggml_tensor ** tensor : { &x, &d_x }) {
        *tensor = store.add(GGML_TYPE_F32, info.n_embd, n_tokens);
    }
    for (ggml_tensor ** tensor : { &scores, &chosen, &d_shares }) {
        *tensor = store.add(GGML_TYPE_F32, info.n_expert, n_tokens);
    }
    rows         = store.add(GGML_TYPE_I32, n_tokens);
    row_shares   = store.add(GGML_TYPE_F32, n_tokens);
    d_row_shares = store.add(GGML_TYPE_F32, n_tokens);
    store.allocate(type);
}

std::vector<Experts::Group> Experts::choose(Executor & executor, const GraphOptions & options, int layer, ggml_tensor * h,
                                            const LayerInputs & inputs, ggml_tensor * base) {
    {
        Graph graph(max_layer_nodes, false, options);
        const LayerBuilder::Routed routed = builder.route(graph, layer, h, inputs, nullptr);
        graph.store(routed.x, x);
        graph.store(routed.shares, scores);
        if (base) {
            graph.store(routed.base, base);
        }
        executor.run(graph);
    }
    const bool   among_all = info.arch->routing == Routing::among_all;
    const size_t n = static_cast<size_t>(info.n_expert), n_used = static_cast<size_t>(info.n_expert_used);
    std::vector<float> found(static_cast<size_t>(ggml_nelements(scores)));
    ggml_backend_tensor_get(scores, found.data(), 0, ggml_nbytes(scores));
    std::vector<float>  mask(found.size(), among_all ? 0.0f : -INFINITY);
    std::vector<Group>  groups(n);
    std::vector<size_t> order(n);
    for (size_t token = 0; token < static_cast<size_t>(n_tokens); ++token) {
        const float * score = found.data() + token * n;
        std::iota(order.begin(), order.end(), size_t(0));
        std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(n_used), order.end(),
                          [&](size_t a, size_t b) { return score[a] > score[b] || (score[a] == score[b] && a < b); });
        const float peak = score[order[0]];
        double sum = 0.0;
        for (size_t i = 0; i < (among_all ? n : n_used); ++i) {
            sum += std::exp(static_cast<double>(score[order[i]] - peak));
        }
        for (size_t i = 0; i < n_used; ++i) {
            const size_t expert = order[i];
            mask[token * n + expert] = among_all ? 1.0f : 0.0f;
            groups[expert].tokens.push_back(static_cast<int32_t>(token));
            groups[expert].shares.push_back(
                static_cast<float>(std::exp(static_cast<double>(score[expert] - peak)) / sum));
        }
    }
    ggml_backend_tensor_set(chosen, mask.data(), 0, ggml_nbytes(chosen));
    return groups;
}

void Experts::enter(const Group & group) {
    ggml_backend_tensor_set(rows, group.tokens.data(), 0, group.tokens.size() * sizeof(int32_t));
    ggml_backend_tensor_set(row_shares, group.shares.data(), 0, group.shares.size() * sizeof(float));
}

// Adds to some columns of `sum`, in place.
ggml_tensor * Experts::add_rows(Graph & graph, ggml_tensor * sum, ggml_tensor * change, ggml_tensor * rows) const {
    ggml_context * c = graph.context();
    return ggml_set_rows(c, sum, ggml_add(c, ggml_get_rows(c, sum, rows), change), rows);
}

void Experts::forward(Executor & executor, const GraphOptions & options, int layer, ggml_tensor * h,
                      const LayerInputs & inputs, ggml_tensor * out) {
    const LayerWeights & w = info.layers[static_cast<size_t>(layer)];
    const std::vector<Group> groups = choose(executor, options, layer, h, inputs, out);
    for (size_t i = 0; i < groups.size(); ++i) {
        const size_t n = groups[i].tokens.size();
        if (!n) {
            continue;
        }
        enter(groups[i]);
        Graph graph(max_expert_nodes, false, options);
        ggml_context * c = graph.context();
        ggml_tensor * at    = first(graph, rows, n);
        ggml_tensor * input = ggml_get_rows(c, x, at);
        ggml_tensor * inner = ggml_swiglu_split(c, graph.product(matrix_of(graph, w.gates, i), input),
                                                graph.product(matrix_of(graph, w.ups, i), input));
        ggml_tensor * made  = graph.product(matrix_of(graph, w.downs, i), inner);
        ggml_tensor * share = ggml_reshape_2d(c, first(graph, row_shares, n), 1, static_cast<int64_t>(n));
        graph.compute(add_rows(graph, out, ggml_mul(c, made, share), at));
        executor.run(graph);
    }
}

// Of an expert on x, with s its share: g = G x, u = U x, i = silu(g) u, and s D i is added. From the gradient d in the sum
// follow d_s = d . D i, d_i = s D' d, d_g = silu'(g) u d_i, d_u = silu(g) d_i and d_x = G' d_g + U' d_u.
void Experts::backward(Executor & executor, const GraphOptions & options, int layer, ggml_tensor * h,
                       const LayerInputs & inputs, ggml_tensor * d_out, ggml_tensor * one,
                       const std::unordered_map<ggml_tensor *, ggml_tensor *> & accumulators, bool needs_d_h,
                       ggml_tensor * d_h) {
    const LayerWeights & w = info.layers[static_cast<size_t>(layer)];
    const std::vector<Group> groups = choose(executor, options, layer, h, inputs, nullptr);
    ggml_backend_tensor_memset(d_x, 0, 0, ggml_nbytes(d_x));
    std::vector<float> gradients(static_cast<size_t>(ggml_nelements(d_shares)), 0.0f), some(static_cast<size_t>(n_tokens));
    for (size_t i = 0; i < groups.size(); ++i) {
        const size_t n = groups[i].tokens.size();
        if (!n) {
            continue;
        }
        enter(groups[i]);
        Graph graph(max_expert_nodes, false, options);
        ggml_context * c = graph.context();
        ggml_tensor * at    = first(graph, rows, n);
        ggml_tensor * input = ggml_get_rows(c, x, at);
        ggml_tensor * gates = matrix_of(graph, w.gates, i), * ups = matrix_of(graph, w.ups, i);
        ggml_tensor * downs = matrix_of(graph, w.downs, i);
        ggml_tensor * g     = graph.product(gates, input);
        ggml_tensor * u     = graph.product(ups, input);
        ggml_tensor * made  = graph.product(downs, ggml_swiglu_split(c, g, u));
        ggml_tensor * share = ggml_reshape_2d(c, first(graph, row_shares, n), 1, static_cast<int64_t>(n));
        ggml_tensor * d     = ggml_get_rows(c, d_out, at);
        graph.store(ggml_reshape_1d(c, ggml_sum_rows(c, ggml_mul(c, made, d)), static_cast<int64_t>(n)),
                    first(graph, d_row_shares, n));
        ggml_tensor * d_inner = graph.transposed_product(downs, ggml_mul(c, d, share));
        ggml_tensor * d_g     = ggml_silu_back(c, ggml_mul(c, d_inner, u), g);
        ggml_tensor * d_u     = ggml_mul(c, d_inner, ggml_silu(c, g));
        ggml_tensor * change  = ggml_add(c, graph.transposed_product(gates, d_g), graph.transposed_product(ups, d_u));
        graph.compute(add_rows(graph, d_x, change, at));
        executor.run(graph);
        ggml_backend_tensor_get(d_row_shares, some.data(), 0, n * sizeof(float));
        for (size_t j = 0; j < n; ++j) {
            gradients[static_cast<size_t>(groups[i].tokens[j]) * groups.size() + i] = some[j];
        }
    }
    ggml_backend_tensor_set(d_shares, gradients.data(), 0, ggml_nbytes(d_shares));
    Graph graph(max_layer_nodes, true, options);
    const LayerBuilder::Routed routed = builder.route(graph, layer, h, inputs, chosen);
    graph.differentiate({ { routed.base, d_out }, { routed.x, d_x }, { routed.shares, d_shares } }, one, accumulators,
                        needs_d_h ? h : nullptr, d_h);
    executor.run(graph);
}

}  // namespace triollama::native
