#include "train_graph.hpp"

#include "guard.hpp"

#include "ggml-alloc.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace triollama {

TensorStore::TensorStore(size_t max_tensors) {
    ggml_init_params params{};
    params.mem_size = ggml_tensor_overhead() * max_tensors;
    params.no_alloc = true;
    context.reset(ggml_init(params));
    if (!context) {
        throw std::bad_alloc();
    }
}

ggml_tensor * TensorStore::add(ggml_type type, int64_t ne0, int64_t ne1) {
    return ggml_new_tensor_2d(context.get(), type, ne0, ne1);
}

void TensorStore::allocate(ggml_backend_buffer_type_t type) {
    buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), type));
    if (!buffer) {
        throw std::bad_alloc();
    }
    ggml_backend_buffer_clear(buffer.get(), 0);
}

Graph::Graph(size_t max_nodes, bool gradients, ggml_tensor * row_numbers)
    : max_nodes(max_nodes), row_numbers(row_numbers) {
    ggml_init_params params{};
    // Twice: a graph rewritten after differentiation holds its nodes in a second list, and views add tensors.
    params.mem_size = ggml_tensor_overhead() * max_nodes * 2 + ggml_graph_overhead_custom(max_nodes, gradients) * 2;
    params.no_alloc = true;
    nodes.reset(ggml_init(params));
    if (!nodes) {
        throw std::bad_alloc();
    }
    cgraph = ggml_new_graph_custom(nodes.get(), max_nodes, gradients);
}

ggml_tensor * Graph::dequantized(ggml_tensor * weight) {
    if (weight->type == GGML_TYPE_F32) {
        return weight;
    }
    if (row_numbers && ggml_is_quantized(weight->type)) {
        return ggml_get_rows(nodes.get(), weight, ggml_view_1d(nodes.get(), row_numbers, weight->ne[1], 0));
    }
    return ggml_cast(nodes.get(), weight, GGML_TYPE_F32);
}

namespace {

// dst = transpose(src) of a matrix of any type: a band of rows is dequantised, then written a cache line at a time.
// ggml's own way, a cast and then a copy of the transposed view, goes element by element.
void transpose_rows(ggml_tensor * dst, int ith, int nth, void *) {
    constexpr int64_t band = 16;   // floats of a cache line
    const ggml_tensor * src = dst->src[0];
    const int64_t n_cols = src->ne[0], n_rows = src->ne[1];
    const auto to_float = ggml_get_type_traits(src->type)->to_float;
    std::vector<float> values(src->type == GGML_TYPE_F32 ? 0 : static_cast<size_t>(band * n_cols));
    const int64_t n_bands = (n_rows + band - 1) / band;
    const int64_t last    = n_bands * (ith + 1) / nth;
    float * out = static_cast<float *>(dst->data);
    for (int64_t b = n_bands * ith / nth; b < last; ++b) {
        const int64_t first = b * band, n = std::min(band, n_rows - first);
        const float * rows[band];
        for (int64_t r = 0; r < n; ++r) {
            const char * source = static_cast<const char *>(src->data) + static_cast<size_t>(first + r) * src->nb[1];
            if (src->type == GGML_TYPE_F32) {
                rows[r] = reinterpret_cast<const float *>(source);
            } else {
                float * row = values.data() + r * n_cols;
                to_float(source, row, n_cols);
                rows[r] = row;
            }
        }
        for (int64_t i = 0; i < n_cols; ++i) {
            float * target = out + i * n_rows + first;
            for (int64_t r = 0; r < n; ++r) {
                target[r] = rows[r][i];
            }
        }
    }
}

}  // namespace

ggml_tensor * Graph::transposed(ggml_tensor * matrix) {
    ggml_context * c = nodes.get();
    const bool rows_lie_dense = matrix->nb[0] == ggml_type_size(matrix->type) && ggml_n_dims(matrix) <= 2;
    if (row_numbers || !rows_lie_dense || matrix->ne[1] < 2) {
        return ggml_cont(c, ggml_transpose(c, dequantized(matrix)));
    }
    return ggml_custom_4d(c, GGML_TYPE_F32, matrix->ne[1], matrix->ne[0], 1, 1, &matrix, 1, transpose_rows,
                          GGML_N_TASKS_MAX, nullptr);
}

namespace {

// Operations with a derivative in this version of ggml. On any other ggml_build_backward_expand ends the process.
bool differentiable(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_NONE:
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
        case GGML_OP_SQR:
        case GGML_OP_SUM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_MUL_MAT:
        case GGML_OP_SCALE:
        case GGML_OP_CPY:
        case GGML_OP_CONT:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
        case GGML_OP_GET_ROWS:
        case GGML_OP_SOFT_MAX:
        case GGML_OP_ROPE:
            return true;
        case GGML_OP_UNARY:
            switch (ggml_get_unary_op(node)) {
                case GGML_UNARY_OP_SILU:
                case GGML_UNARY_OP_EXP:
                case GGML_UNARY_OP_SOFTPLUS:
                    return true;
                default:
                    return false;
            }
        case GGML_OP_GLU:
            return ggml_get_glu_op(node) == GGML_GLU_OP_SWIGLU && node->src[1];
        default:
            return false;
    }
}

bool is_transposed_view(const ggml_tensor * tensor) { return tensor->op == GGML_OP_TRANSPOSE; }

}  // namespace

void Graph::differentiate(ggml_tensor * out, ggml_tensor * d_out, ggml_tensor * one,
                          const std::unordered_map<ggml_tensor *, ggml_tensor *> & accumulators,
                          ggml_tensor * input, ggml_tensor * d_input) {
    ggml_tensor * loss = ggml_sum(nodes.get(), ggml_mul(nodes.get(), out, d_out));
    ggml_set_loss(loss);
    if (input) {
        ggml_set_param(input);
    }
    compute(loss);

    const int n_forward = ggml_graph_n_nodes(cgraph);
    std::vector<ggml_tensor *> targets(n_forward, nullptr);
    bool supported = true;
    const char * culprit = "";
    for (int i = 0; i < n_forward; ++i) {
        ggml_tensor * node = ggml_graph_node(cgraph, i);
        if (!differentiable(node)) {
            supported = false;
            culprit   = ggml_op_desc(node);
        }
        const auto it = accumulators.find(node);
        targets[i] = node == loss ? one : it != accumulators.end() ? it->second : nullptr;
    }
    if (!supported) {
        if (input) {
            input->flags &= ~GGML_TENSOR_FLAG_PARAM;
        }
        throw unsupported_error(std::string("no derivative for the operation ") + culprit);
    }
    ggml_build_backward_expand(nodes.get(), cgraph, targets.data());
    if (input) {
        store(ggml_graph_get_grad(cgraph, input), d_input);
        input->flags &= ~GGML_TENSOR_FLAG_PARAM;   // a flag of this graph only: the tensor outlives it
    }
    replace_outer_products();
}

// ggml differentiates a matrix product into outer products, which are slow on a CPU, refuse shared key-value heads
// there, and want F32 on a GPU. out_prod(a, b) = mul_mat(transpose(a), transpose(b)), so that is what is run, with
// matrices of weights dequantised a second time where they are used, so that nothing keeps them in between.
void Graph::replace_outer_products() {
    ggml_context * c = nodes.get();
    const int n = ggml_graph_n_nodes(cgraph);
    std::unordered_map<ggml_tensor *, ggml_tensor *> transposes;   // of activations, which several products share
    const auto shared_transpose = [&](ggml_tensor * x) {
        ggml_tensor *& t = transposes[x];
        if (!t) {
            t = transposed(x);
        }
        return t;
    };
    for (int i = 0; i < n; ++i) {
        ggml_tensor * node = ggml_graph_node(cgraph, i);
        if (node->op != GGML_OP_OUT_PROD) {
            continue;
        }
        ggml_tensor * a = node->src[0];
        ggml_tensor * b = node->src[1];

        ggml_tensor * weight = a;
        while ((weight->op == GGML_OP_CPY || weight->op == GGML_OP_GET_ROWS) && weight->src[0]->op == GGML_OP_NONE) {
            weight = weight->src[0];
        }
        if (weight->op == GGML_OP_NONE && weight->type != GGML_TYPE_F32) {
            a = transposed(weight);
        } else {
            a = shared_transpose(a);
        }
        b = is_transposed_view(b) ? b->src[0] : shared_transpose(b);
        if (!ggml_is_contiguous(b)) {
            b = ggml_cont(c, b);
        }
        node->op = GGML_OP_MUL_MAT;
        std::memset(node->op_params, 0, sizeof(node->op_params));
        node->src[0] = a;
        node->src[1] = b;
    }
    // The old order stays topological: what was inserted depends on weights and on what its user depended on.
    ggml_cgraph * rewritten = ggml_new_graph_custom(c, max_nodes, false);
    for (int i = 0; i < n; ++i) {
        ggml_tensor * node = ggml_graph_node(cgraph, i);
        if (!is_transposed_view(node)) {   // brought in by whoever still reads it
            ggml_build_forward_expand(rewritten, node);
        }
    }
    cgraph = rewritten;
}

Executor::Executor(bool use_gpu, int n_threads, size_t max_nodes) {
    if (use_gpu) {
        ggml_backend_t gpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_GPU, nullptr);
        if (!gpu) {
            throw unsupported_error("no GPU backend: this build or machine has none");
        }
        backends.emplace_back(gpu);
    }
    ggml_backend_t cpu = ggml_backend_cpu_init();
    if (!cpu) {
        throw std::bad_alloc();
    }
    backends.emplace_back(cpu);
    set_threads(n_threads);
    ggml_backend_cpu_set_abort_callback(
        cpu, [](void * self) { return static_cast<Executor *>(self)->abort.load(std::memory_order_relaxed); }, this);

    std::vector<ggml_backend_t> raw;
    for (const ggml_backend_ptr & backend : backends) {
        raw.push_back(backend.get());
    }
    sched.reset(ggml_backend_sched_new(raw.data(), nullptr, static_cast<int>(raw.size()), max_nodes, false, false));
    if (!sched) {
        throw std::bad_alloc();
    }
}

ggml_backend_buffer_type_t Executor::buffer_type() const {
    return ggml_backend_get_default_buffer_type(backends.front().get());
}

void Executor::set_threads(int n_threads) { ggml_backend_cpu_set_n_threads(backends.back().get(), n_threads); }

void Executor::run(Graph & graph) {
    if (abort) {
        throw training_aborted();
    }
    ggml_backend_sched_reset(sched.get());
    if (!ggml_backend_sched_alloc_graph(sched.get(), graph.graph())) {
        throw std::bad_alloc();
    }
    n_splits = std::max(n_splits, ggml_backend_sched_get_n_splits(sched.get()));
    const ggml_status status = ggml_backend_sched_graph_compute(sched.get(), graph.graph());
    if (status == GGML_STATUS_ABORTED) {
        throw training_aborted();
    }
    if (status == GGML_STATUS_ALLOC_FAILED) {
        throw std::bad_alloc();
    }
    if (status != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("a training graph failed with status " + std::to_string(status));
    }
}

size_t Executor::arena_bytes() const {
    size_t bytes = 0;
    for (const ggml_backend_ptr & backend : backends) {
        bytes += ggml_backend_sched_get_buffer_size(sched.get(), backend.get());
    }
    return bytes;
}

}  // namespace triollama
