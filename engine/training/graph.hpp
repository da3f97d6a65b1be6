// What every training graph needs: a place for its nodes, tensors that outlive it, a way to run it, its gradients.
#pragma once

#include "training/product.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <atomic>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace triollama::native {

// Thrown out of a run that the abort flag stopped. What the graph was to write is then undefined.
struct training_aborted : std::runtime_error {
    training_aborted() : std::runtime_error("training was aborted") {}
};

// Tensors with memory of their own, freed together.
class TensorStore {
public:
    explicit TensorStore(size_t max_tensors);

    ggml_tensor * add(ggml_type type, int64_t ne0, int64_t ne1 = 1);

    // Allocates all that was added. Throws std::bad_alloc.
    void allocate(ggml_backend_buffer_type_t type);

    size_t bytes() const { return buffer ? ggml_backend_buffer_get_size(buffer.get()) : 0; }

private:
    ggml_context_ptr        context;
    ggml_backend_buffer_ptr buffer;
};

// How products are computed.
struct GraphOptions {
    bool          exact  = true;    // weights take part as F32; otherwise as they are, and activations may be rounded
    ProductKernel kernel = ProductKernel::ggml;
    ggml_tensor * row_numbers = nullptr;   // I32: 0, 1, 2, ...; for ProductKernel::portable
};

// One graph and the memory of its nodes' descriptions; the values live in the executor's arena.
class Graph {
public:
    Graph(size_t max_nodes, bool gradients, const GraphOptions & options);

    ggml_context * context() { return nodes.get(); }
    ggml_cgraph *  graph() { return cgraph; }

    void compute(ggml_tensor * tensor) { ggml_build_forward_expand(cgraph, tensor); }
    void store(ggml_tensor * value, ggml_tensor * destination) { compute(ggml_cpy(nodes.get(), value, destination)); }

    // Without gradients the value is computed into `place`, which has its shape. With gradients it is found there, and
    // what only it was computed from is not computed.
    void keep(ggml_tensor * value, ggml_tensor * place);

    // A matrix of weights as F32.
    ggml_tensor * dequantized(ggml_tensor * weight);

    // W x and, W transposed, W^T y, in the precision of the options.
    ggml_tensor * product(ggml_tensor * weight, ggml_tensor * x);
    ggml_tensor * transposed_product(ggml_tensor * weight, ggml_tensor * y);

    // Of each row of an F32 matrix the index of its largest element, of several the first.
    ggml_tensor * argmax(ggml_tensor * x);

    // What a graph gives, and the gradient in it.
    struct Output {
        ggml_tensor * value, * gradient;
    };
    // Adds the backward pass of the surrogate loss, the sum of value * gradient over all outputs. `accumulators` maps
    // each parameter to the tensor its gradient is added to. Unless `input` is null its gradient is written to `d_input`.
    // Throws unsupported_error on an operation ggml cannot differentiate, where ggml itself would end the process.
    void differentiate(const std::vector<Output> & outputs, ggml_tensor * one,
                       const std::unordered_map<ggml_tensor *, ggml_tensor *> & accumulators,
                       ggml_tensor * input, ggml_tensor * d_input);

    // Puts in place of products what computes them best, with so many threads at most. Called once, when the graph is
    // complete.
    void choose_products(int n_threads);

private:
    // A matrix as F32 with rows and columns exchanged.
    ggml_tensor * transposed(ggml_tensor * matrix);
    void make_operands_contiguous(ggml_tensor * node, std::unordered_map<ggml_tensor *, ggml_tensor *> & copies);
    void replace_outer_product(ggml_tensor * node, std::unordered_map<ggml_tensor *, ggml_tensor *> & transposes);

    size_t           max_nodes;
    GraphOptions     options;
    bool             gradients;
    ggml_context_ptr nodes;
    ggml_cgraph *    cgraph;
    std::vector<std::pair<ggml_tensor *, ggml_tensor *>> found;   // values, and where they lie
};

// Runs graphs on a CPU, or on a GPU with the CPU for what that cannot do.
class Executor {
public:
    Executor(bool use_gpu, int n_threads, size_t max_nodes);

    ggml_backend_buffer_type_t buffer_type() const;   // where tensors should live that graphs read and write
    bool on_gpu() const { return backends.size() > 1; }
    void set_threads(int n_threads);

    // Throws training_aborted if `abort` was set before or during the run, std::bad_alloc if memory is short.
    void run(Graph & graph);

    std::atomic<bool> abort{ false };
    size_t arena_bytes() const;        // the largest arena so far
    int    max_splits() const { return n_splits; }   // 1: nothing fell back from the GPU to the CPU

    // From now on graphs are not run: their nodes are listed, by operation and types of operands.
    struct Audited {
        int64_t count      = 0;
        bool    supported  = true;   // by the GPU, or without one by the CPU
        bool    contiguous = true;   // all operands of all such nodes
    };
    // Operations in `missing` count as not supported.
    void start_audit(std::set<std::string> missing);
    std::map<std::string, Audited> stop_audit();

    ggml_backend_sched_t scheduler() const { return sched.get(); }     // null once memory ran out

private:
    void audit(Graph & graph);

    int                            n_threads = 1;
    bool                           auditing = false;
    std::set<std::string>          absent;
    std::map<std::string, Audited> audited;
    std::vector<ggml_backend_ptr> backends;
    ggml_backend_sched_ptr        sched;                // none once memory ran out in the middle of its own work
    bool                          arena_lost = false;   // there was no memory for it
    int                           n_splits = 0;
};

}  // namespace triollama::native
