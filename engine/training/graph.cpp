#include "training/graph.hpp"

#include "guards/abort.hpp"
#include "guards/errors.hpp"
#include "llama/compute.hpp"

#include "ggml-alloc.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <unordered_set>

namespace triollama::native {

namespace {

// What asserts that it gets its memory, as ggml does for its own tables.
template <class Call> auto or_no_memory(Call && call) {
    try {
        return guarded(call);
    } catch (const native_abort &) {
        throw std::bad_alloc();
    }
}

ggml_context_ptr make_context(size_t bytes) {
    ggml_init_params params{};
    params.mem_size = bytes;
    params.no_alloc = true;
    return or_no_memory([&] { return ggml_context_ptr(ggml_init(params)); });
}

}  // namespace

TensorStore::TensorStore(size_t max_tensors) : context(make_context(ggml_tensor_overhead() * max_tensors)) {}

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

Graph::Graph(size_t max_nodes, bool gradients, const GraphOptions & options)
    : max_nodes(max_nodes), options(options), gradients(gradients) {
    // Thrice: a graph is listed anew when it is pruned and when its products are chosen, which adds tensors.
    nodes = make_context(ggml_tensor_overhead() * max_nodes * 3 + ggml_graph_overhead_custom(max_nodes, gradients) * 3);
    cgraph = ggml_new_graph_custom(nodes.get(), max_nodes, gradients);
}

namespace {

void place_at(ggml_tensor * value, const ggml_tensor * place) {
    value->data   = place->data;
    value->buffer = place->buffer;
}

}  // namespace

void Graph::keep(ggml_tensor * value, ggml_tensor * place) {
    if (gradients) {
        found.emplace_back(value, place);
    } else {
        place_at(value, place);
    }
}

ggml_tensor * Graph::dequantized(ggml_tensor * weight) {
    if (weight->type == GGML_TYPE_F32) {
        return weight;
    }
    if (options.row_numbers && ggml_is_quantized(weight->type)) {
        return ggml_get_rows(nodes.get(), weight, ggml_view_1d(nodes.get(), options.row_numbers, weight->ne[1], 0));
    }
    return ggml_cast(nodes.get(), weight, GGML_TYPE_F32);
}

ggml_tensor * Graph::product(ggml_tensor * weight, ggml_tensor * x) {
    return ggml_mul_mat(nodes.get(), options.exact ? dequantized(weight) : weight, x);
}

ggml_tensor * Graph::transposed_product(ggml_tensor * weight, ggml_tensor * y) {
    return ggml_out_prod(nodes.get(), weight, ggml_transpose(nodes.get(), y));
}

namespace {

// dst = transpose(src) of a matrix of any type: a band of rows is dequantised, then written a cache line at a time.
// ggml's own way, a cast and then a copy of the transposed view, goes element by element.
void transpose_rows(ggml_tensor * dst, int ith, int nth, void *) {
    constexpr int64_t band = 16;   // floats of a cache line
    const ggml_tensor * src = dst->src[0];
    const int64_t n_cols = src->ne[0], n_rows = src->ne[1];
    const auto to_float = ggml_get_type_traits(src->type)->to_float;
    constexpr int64_t some = 256;   // columns at a time: whole blocks of any type
    float values[band * some];
    const int64_t n_bands = (n_rows + band - 1) / band;
    const int64_t last    = n_bands * (ith + 1) / nth;
    float * out = static_cast<float *>(dst->data);
    for (int64_t b = n_bands * ith / nth; b < last; ++b) {
        const int64_t first = b * band, n = std::min(band, n_rows - first);
        for (int64_t column = 0; column < n_cols; column += some) {
            const int64_t wide = std::min(some, n_cols - column);
            const float * rows[band];
            for (int64_t r = 0; r < n; ++r) {
                const char * source = static_cast<const char *>(src->data) + static_cast<size_t>(first + r) * src->nb[1] +
                                      ggml_row_size(src->type, column);
                if (src->type == GGML_TYPE_F32) {
                    rows[r] = reinterpret_cast<const float *>(source);
                } else {
                    to_float(source, values + r * some, wide);
                    rows[r] = values + r * some;
                }
            }
            for (int64_t i = 0; i < wide; ++i) {
                float * target = out + (column + i) * n_rows + first;
                for (int64_t r = 0; r < n; ++r) {
                    target[r] = rows[r][i];
                }
            }
        }
    }
}

}  // namespace

ggml_tensor * Graph::transposed(ggml_tensor * matrix) {
    ggml_context * c = nodes.get();
    const bool rows_lie_dense = matrix->nb[0] == ggml_type_size(matrix->type) && ggml_n_dims(matrix) <= 2;
    if (options.row_numbers || !rows_lie_dense || matrix->ne[1] < 2) {
        return ggml_cont(c, ggml_transpose(c, dequantized(matrix)));
    }
    return ggml_custom_4d(c, GGML_TYPE_F32, matrix->ne[1], matrix->ne[0], 1, 1, &matrix, 1, transpose_rows,
                          GGML_N_TASKS_MAX, nullptr);
}

namespace {

// The first of the largest elements of each row. ggml's own does all rows on one thread, element by element.
void argmax_rows(ggml_tensor * dst, int ith, int nth, void *) {
    const ggml_tensor * x = dst->src[0];
    const int64_t n = x->ne[0], last = x->ne[1] * (ith + 1) / nth;
    for (int64_t j = x->ne[1] * ith / nth; j < last; ++j) {
        const float * row = reinterpret_cast<const float *>(static_cast<const char *>(x->data) + static_cast<size_t>(j) * x->nb[1]);
        constexpr int lanes = 16;
        float peaks[lanes];
        std::fill(peaks, peaks + lanes, row[0]);
        int64_t i = 0;
        for (; i + lanes <= n; i += lanes) {
            for (int l = 0; l < lanes; ++l) {
                peaks[l] = row[i + l] > peaks[l] ? row[i + l] : peaks[l];
            }
        }
        float peak = *std::max_element(peaks, peaks + lanes);
        for (; i < n; ++i) {
            peak = row[i] > peak ? row[i] : peak;
        }
        const int64_t at = std::find(row, row + n, peak) - row;
        static_cast<int32_t *>(dst->data)[j] = at < n ? static_cast<int32_t>(at) : 0;   // none is, of NaN
    }
}

}  // namespace

ggml_tensor * Graph::argmax(ggml_tensor * x) {
    if (options.kernel == ProductKernel::portable) {
        return ggml_argmax(nodes.get(), x);
    }
    return ggml_custom_4d(nodes.get(), GGML_TYPE_I32, x->ne[1], 1, 1, 1, &x, 1, argmax_rows, GGML_N_TASKS_MAX, nullptr);
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

// Does no arithmetic: takes operands of any layout on every backend, or is a view of one.
bool moves_only(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_NONE:
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
            return true;
        default:
            return false;
    }
}

bool is_transposed_view(const ggml_tensor * tensor) { return tensor->op == GGML_OP_TRANSPOSE; }

}  // namespace

void Graph::differentiate(const std::vector<Output> & outputs, ggml_tensor * one,
                          const std::unordered_map<ggml_tensor *, ggml_tensor *> & accumulators,
                          ggml_tensor * input, ggml_tensor * d_input) {
    ggml_tensor * loss = nullptr;
    for (const Output & output : outputs) {
        ggml_tensor * part = ggml_sum(nodes.get(), ggml_mul(nodes.get(), output.value, output.gradient));
        loss = loss ? ggml_add(nodes.get(), loss, part) : part;
    }
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

    for (const auto & [value, place] : found) {   // now that its derivative is there
        value->op = GGML_OP_NONE;
        std::fill(std::begin(value->src), std::end(value->src), nullptr);
        place_at(value, place);
    }

    // Of the forward pass only what gradients need: not, for one, the loss itself.
    if (input) {
        store(ggml_graph_get_grad(cgraph, input), d_input);
        input->flags &= ~GGML_TENSOR_FLAG_PARAM;   // a flag of this graph only: the tensor outlives it
    }
    const int n = ggml_graph_n_nodes(cgraph);
    std::unordered_set<const ggml_tensor *> needed;
    if (input) {
        needed.insert(ggml_graph_node(cgraph, n - 1));
    }
    for (int i = 0; i < n_forward; ++i) {
        if (targets[i] && targets[i] != one) {
            needed.insert(ggml_graph_get_grad(cgraph, ggml_graph_node(cgraph, i)));
        }
    }
    for (int i = n - 1; i >= 0; --i) {
        ggml_tensor * node = ggml_graph_node(cgraph, i);
        if (needed.count(node)) {
            needed.insert(std::begin(node->src), std::end(node->src));
        }
    }
    ggml_cgraph * pruned = ggml_new_graph_custom(nodes.get(), max_nodes, false);
    for (int i = 0; i < n; ++i) {
        if (needed.count(ggml_graph_node(cgraph, i))) {
            ggml_build_forward_expand(pruned, ggml_graph_node(cgraph, i));
        }
    }
    cgraph = pruned;
}

// out_prod(a, b) = mul_mat(transpose(a), transpose(b)), where matrices of weights are dequantised a second time where
// they are used, so that nothing keeps them in between.
void Graph::replace_outer_product(ggml_tensor * node, std::unordered_map<ggml_tensor *, ggml_tensor *> & transposes) {
    const auto shared_transpose = [&](ggml_tensor * x) {   // of activations, which several products share
        ggml_tensor *& t = transposes[x];
        if (!t) {
            t = transposed(x);
        }
        return t;
    };
    ggml_tensor * weight = undequantized(node->src[0]);
    ggml_tensor * a = weight->type != GGML_TYPE_F32 ? transposed(weight) : shared_transpose(weight);
    ggml_tensor * b = node->src[1];
    b = is_transposed_view(b) ? b->src[0] : shared_transpose(b);
    if (!ggml_is_contiguous(b)) {
        b = ggml_cont(nodes.get(), b);
    }
    node->op = GGML_OP_MUL_MAT;
    std::memset(node->op_params, 0, sizeof(node->op_params));
    node->src[0] = a;
    node->src[1] = b;
}

// The derivative of a permutation is a permuted view, which some backends' kernels do not take.
void Graph::make_operands_contiguous(ggml_tensor * node, std::unordered_map<ggml_tensor *, ggml_tensor *> & copies) {
    if (moves_only(node)) {
        return;
    }
    for (ggml_tensor *& source : node->src) {
        if (source && !ggml_is_contiguous(source)) {
            ggml_tensor *& copy = copies[source];
            if (!copy) {
                copy = ggml_cont(nodes.get(), source);
            }
            source = copy;
        }
    }
}

// ggml differentiates a matrix product into outer products, which are slow on a CPU, refuse shared key-value heads
// there, and want F32 on a GPU.
void Graph::choose_products(int n_threads) {
    // Where rounding is admitted, there are no tiles and vectors are short, ggml multiplies quantised weights and
    // activations, as in serving.
    const bool weights_too = options.exact || options.kernel >= ProductKernel::dots || f32_outruns_quantized();
    ProductRewriter rewriter(nodes.get(), options.kernel, weights_too);
    std::unordered_map<ggml_tensor *, ggml_tensor *> transposes;
    const int n = ggml_graph_n_nodes(cgraph);
    for (int i = 0; i < n; ++i) {
        ggml_tensor * node = ggml_graph_node(cgraph, i);
        if (!rewriter.rewrite(node) && node->op == GGML_OP_OUT_PROD) {
            replace_outer_product(node, transposes);
        }
    }
    if (options.kernel == ProductKernel::portable) {
        std::unordered_map<ggml_tensor *, ggml_tensor *> copies;
        for (int i = 0; i < n; ++i) {
            make_operands_contiguous(ggml_graph_node(cgraph, i), copies);
        }
    }
    // Anew, for what was inserted; what is read no more falls away. The old order stays topological, since what was
    // inserted depends on weights and on what its user depended on.
    std::unordered_map<const ggml_tensor *, int> readers;
    for (int i = 0; i < n; ++i) {
        const ggml_tensor * node = ggml_graph_node(cgraph, i);
        for (const ggml_tensor * source : node->src) {
            readers[source] += source != node;   // a cast names itself as the place of its result
        }
    }
    std::unordered_set<const ggml_tensor *> taken;
    for (int i = 0; i < n; ++i) {
        ggml_tensor * node = ggml_graph_node(cgraph, i);
        const ggml_tensor * sources[] = { node->src[0], node->src[1] };
        if (rewriter.take_sum(node, readers)) {
            taken.insert(sources[node->src[2] == sources[0]]);
        }
    }
    rewriter.give_room(n_threads);
    ggml_cgraph * rewritten = ggml_new_graph_custom(nodes.get(), max_nodes, false);
    for (int i = 0; i < n; ++i) {
        ggml_tensor * node = ggml_graph_node(cgraph, i);
        const bool needless = is_transposed_view(node) || undequantized(node) != node;
        const bool dropped  = taken.count(node) || (needless && !readers[node]);
        if (!dropped) {
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
    or_no_memory([&] {
        sched.reset(ggml_backend_sched_new(raw.data(), nullptr, static_cast<int>(raw.size()), max_nodes, false, false));
    });
    if (!sched) {
        throw std::bad_alloc();
    }
}

ggml_backend_buffer_type_t Executor::buffer_type() const {
    return ggml_backend_get_default_buffer_type(backends.front().get());
}

void Executor::set_threads(int n) {
    n_threads = n;
    ggml_backend_cpu_set_n_threads(backends.back().get(), n);
}

void Executor::run(Graph & graph) {
    if (abort) {
        throw training_aborted();
    }
    graph.choose_products(n_threads);
    if (auditing) {
        return audit(graph);
    }
    if (!sched) {
        throw std::runtime_error("memory ran out in the middle of a computation: this trainer can only be saved and closed");
    }
    ggml_backend_sched_reset(sched.get());
    try {
        // Without its arena, it would take the next graph for one that has it.
        const bool ready = or_no_memory([&] {
            return (!arena_lost || ggml_backend_sched_reserve(sched.get(), graph.graph()))
                && ggml_backend_sched_alloc_graph(sched.get(), graph.graph());
        });
        arena_lost = !ready;
    } catch (const std::bad_alloc &) {
        (void) sched.release();         // some of its tables are freed already: it can neither be used nor freed
        throw;
    }
    if (arena_lost) {
        throw std::bad_alloc();
    }
    n_splits = std::max(n_splits, ggml_backend_sched_get_n_splits(sched.get()));
    ggml_status status;
    try {
        status = ggml_backend_sched_graph_compute(sched.get(), graph.graph());
    } catch (const std::bad_alloc &) {
        forget_work(sched.get());
        throw;
    }
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

void Executor::start_audit(std::set<std::string> missing) {
    audited.clear();
    absent   = std::move(missing);
    auditing = true;
}

std::map<std::string, Executor::Audited> Executor::stop_audit() {
    auditing = false;
    return std::move(audited);
}

void Executor::audit(Graph & graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph.graph()); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph.graph(), i);
        if (moves_only(node) && node->op != GGML_OP_CONT && node->op != GGML_OP_CPY) {
            continue;   // no work
        }
        const std::string operation = ggml_op_desc(node);
        std::string kind = operation + "(";
        bool contiguous = true;
        for (const ggml_tensor * source : node->src) {
            if (source) {
                kind += (kind.back() == '(' ? "" : ", ") + std::string(ggml_type_name(source->type));
                contiguous = contiguous && ggml_is_contiguous(source);
            }
        }
        Audited & entry = audited[kind + ")"];
        ++entry.count;
        entry.supported  = entry.supported && !absent.count(operation) &&
                          ggml_backend_supports_op(backends.front().get(), node);
        entry.contiguous = entry.contiguous && contiguous;
    }
}

size_t Executor::arena_bytes() const {
    size_t bytes = 0;
    for (size_t i = 0; sched && i < backends.size(); ++i) {
        bytes += ggml_backend_sched_get_buffer_size(sched.get(), backends[i].get());
    }
    return bytes;
}

}  // namespace triollama::native
