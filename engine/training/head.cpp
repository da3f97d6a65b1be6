#include "training/head.hpp"

#include <algorithm>
#include <cmath>

namespace triollama::native {

namespace {

constexpr int64_t block_rows       = 2048;   // of the vocabulary; a block of weights then stays in cache
constexpr int64_t max_positions    = 512;    // at a time; each group of positions dequantises all weights once more
constexpr int64_t blocks_per_graph = 16;
constexpr size_t  nodes_per_block  = 48;

// State of one group of positions while the vocabulary is walked.
struct LabelGroup {
    TensorStore store{ 8 };
    ggml_tensor * labels, * weights, * log_sum, * d, * best, * best_index, * label_logit;

    LabelGroup(int64_t n, int64_t n_embd, int64_t n_blocks, ggml_backend_buffer_type_t type) {
        labels      = store.add(GGML_TYPE_I32, n);
        weights     = store.add(GGML_TYPE_F32, 1, n);
        log_sum     = store.add(GGML_TYPE_F32, 1, n);
        label_logit = store.add(GGML_TYPE_F32, 1, n);
        d           = store.add(GGML_TYPE_F32, n_embd, n);
        best        = store.add(GGML_TYPE_F32, n, n_blocks);   // the largest logit of each block, and where
        best_index  = store.add(GGML_TYPE_I32, n, n_blocks);
        store.allocate(type);
    }
};

ggml_tensor * row_of(ggml_context * c, ggml_tensor * matrix, int64_t row) {
    return ggml_view_1d(c, matrix, matrix->ne[0], static_cast<size_t>(row) * matrix->nb[1]);
}

// From each column of `values` [rows, n] the element at `index` [n], as [1, n].
ggml_tensor * pick(ggml_context * c, ggml_tensor * values, ggml_tensor * index) {
    const int64_t n = values->ne[1];
    ggml_tensor * picked = ggml_get_rows(c, ggml_reshape_3d(c, values, 1, values->ne[0], n),
                                         ggml_reshape_2d(c, index, 1, n));
    return ggml_reshape_2d(c, picked, 1, n);
}

}  // namespace

HeadResult Head::run(Executor & executor, const GraphOptions & options, ggml_tensor * h, const std::vector<int32_t> & labels,
                     const std::vector<float> & weights, ggml_tensor * d_h) const {
    const ModelGraphInfo & m = model.info();
    const int64_t n_blocks = (m.n_vocab + block_rows - 1) / block_rows;
    const float   cap      = m.final_softcap;
    HeadResult result;

    for (int64_t first = 0; first < h->ne[1]; first += max_positions) {
        const int64_t n = std::min(max_positions, h->ne[1] - first);
        LabelGroup group(n, m.n_embd, n_blocks, executor.buffer_type());
        ggml_backend_tensor_set(group.labels, labels.data() + first, 0, ggml_nbytes(group.labels));
        ggml_backend_tensor_set(group.weights, weights.data() + first, 0, ggml_nbytes(group.weights));

        const auto columns = [&](ggml_context * c, ggml_tensor * matrix) {
            return ggml_view_2d(c, matrix, matrix->ne[0], n, matrix->nb[1], static_cast<size_t>(first) * matrix->nb[1]);
        };

        for (int64_t block = 0; block < n_blocks; block += blocks_per_graph) {
            Graph graph(blocks_per_graph * nodes_per_block, false, options);
            ggml_context * c = graph.context();
            ggml_tensor * x       = columns(c, h);
            ggml_tensor * log_sum = block ? group.log_sum : nullptr;
            ggml_tensor * d       = block ? group.d : nullptr;
            for (int64_t i = block; i < std::min(block + blocks_per_graph, n_blocks); ++i) {
                const int64_t row  = i * block_rows;
                const int64_t rows = std::min(block_rows, m.n_vocab - row);
                ggml_tensor * w = ggml_view_2d(c, m.output, m.n_embd, rows, m.output->nb[1],
                                               static_cast<size_t>(row) * m.output->nb[1]);
                ggml_tensor * z = graph.product(w, x);
                if (m.output_b) {
                    z = ggml_add(c, z, ggml_view_1d(c, m.output_b, rows, static_cast<size_t>(row) * sizeof(float)));
                }
                ggml_tensor * tanh = nullptr;
                if (cap != 0.0f) {
                    tanh = ggml_tanh(c, ggml_scale(c, z, 1.0f / cap));
                    z    = ggml_scale(c, tanh, cap);
                }
                ggml_tensor * at   = graph.argmax(z);
                ggml_tensor * peak = pick(c, z, at);
                ggml_tensor * p    = ggml_soft_max(c, z);
                graph.store(at, row_of(c, group.best_index, i));
                graph.store(ggml_reshape_1d(c, peak, n), row_of(c, group.best, i));

                // p at its largest is at least 1 / rows, so its logarithm is exact enough.
                ggml_tensor * l     = ggml_sub(c, peak, ggml_log(c, pick(c, p, at)));
                ggml_tensor * delta = log_sum ? ggml_sub(c, l, log_sum) : nullptr;
                if (d_h) {
                    if (tanh) {   // through the cap: the derivative of cap tanh(z / cap) is 1 - tanh^2
                        p = ggml_sub(c, p, ggml_mul(c, p, ggml_sqr(c, tanh)));
                    }
                    ggml_tensor * part = graph.transposed_product(w, p);
                    d = delta ? ggml_add(c, d, ggml_mul(c, ggml_sub(c, part, d), ggml_sigmoid(c, delta))) : part;
                    graph.compute(d);
                }
                log_sum = delta ? ggml_add(c, log_sum, ggml_softplus(c, delta)) : l;
                graph.compute(log_sum);
            }
            graph.store(log_sum, group.log_sum);
            if (d_h) {
                graph.store(d, group.d);
            }
            executor.run(graph);
        }

        Graph graph(64, false, options);
        ggml_context * c = graph.context();
        ggml_tensor * rows  = ggml_get_rows(c, m.output, group.labels);
        ggml_tensor * logit = ggml_sum_rows(c, ggml_mul(c, rows, columns(c, h)));
        if (m.output_b) {
            logit = ggml_add(c, logit, ggml_get_rows(c, ggml_reshape_2d(c, m.output_b, 1, m.n_vocab), group.labels));
        }
        if (cap != 0.0f) {
            ggml_tensor * tanh = ggml_tanh(c, ggml_scale(c, logit, 1.0f / cap));
            logit = ggml_scale(c, tanh, cap);
            rows  = ggml_sub(c, rows, ggml_mul(c, rows, ggml_sqr(c, tanh)));
        }
        graph.store(logit, group.label_logit);
        if (d_h) {
            graph.store(ggml_mul(c, ggml_sub(c, group.d, rows), group.weights), columns(c, d_h));
        }
        executor.run(graph);

        std::vector<float>   log_sum(static_cast<size_t>(n)), logits(log_sum);
        std::vector<float>   best(static_cast<size_t>(n * n_blocks));
        std::vector<int32_t> best_index(best.size());
        ggml_backend_tensor_get(group.log_sum, log_sum.data(), 0, ggml_nbytes(group.log_sum));
        ggml_backend_tensor_get(group.label_logit, logits.data(), 0, ggml_nbytes(group.label_logit));
        ggml_backend_tensor_get(group.best, best.data(), 0, ggml_nbytes(group.best));
        ggml_backend_tensor_get(group.best_index, best_index.data(), 0, ggml_nbytes(group.best_index));
        for (int64_t i = 0; i < n; ++i) {
            int64_t winner = 0;
            for (int64_t b = 1; b < n_blocks; ++b) {
                if (best[static_cast<size_t>(b * n + i)] > best[static_cast<size_t>(winner * n + i)]) {
                    winner = b;
                }
            }
            const size_t at = static_cast<size_t>(i);
            result.nll.push_back(log_sum[at] - logits[at]);
            result.predicted.push_back(
                static_cast<int32_t>(winner * block_rows) + best_index[static_cast<size_t>(winner * n + i)]);
        }
    }
    return result;
}

}  // namespace triollama::native
