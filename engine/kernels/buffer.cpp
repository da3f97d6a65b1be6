#include "kernels/buffer.hpp"

#ifdef TRIOLLAMA_KERNELS

#include "kernels/attention.hpp"
#include "kernels/product.hpp"
#include "kernels/types.hpp"
#include "kernels/workspace.hpp"
#include "threads/team.hpp"

#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "traits.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace triollama::native::kernels {

namespace {

thread_local bool refused = false;      // the model that this thread loads is to have no weights with us

ggml_backend_buffer_type_t buffer_type();

int64_t blocks_of(const ggml_tensor * tensor) { return tensor->ne[0] / block; }
int64_t panels_of(const ggml_tensor * tensor) { return (tensor->ne[1] + panel_rows - 1) / panel_rows; }

// Of one matrix; a tensor of more than two dimensions is several.
size_t matrix_bytes(const ggml_tensor * tensor) {
    return static_cast<size_t>(panels_of(tensor)) * panel_bytes(shapes[type_of(tensor->type)], blocks_of(tensor));
}

bool is_packed(const ggml_tensor * tensor) {
    return type_of(tensor->type) != n_types && ggml_n_dims(tensor) >= 2 && tensor->ne[0] % block == 0;
}

size_t packed_bytes(const ggml_tensor * tensor) {
    return matrix_bytes(tensor) * static_cast<size_t>(tensor->ne[2] * tensor->ne[3]);
}

const uint8_t * matrix_of(const ggml_tensor * tensor, int64_t i2, int64_t i3) {
    return static_cast<const uint8_t *>(tensor->data) + static_cast<size_t>(i3 * tensor->ne[2] + i2) * matrix_bytes(tensor);
}

const float * row_at(const ggml_tensor * tensor, int64_t i1, int64_t i2, int64_t i3) {
    return reinterpret_cast<const float *>(static_cast<const char *>(tensor->data) + static_cast<size_t>(i1) * tensor->nb[1] +
                                           static_cast<size_t>(i2) * tensor->nb[2] + static_cast<size_t>(i3) * tensor->nb[3]);
}

float * row_of(ggml_tensor * tensor, int64_t i1, int64_t i2, int64_t i3) { return const_cast<float *>(row_at(tensor, i1, i2, i3)); }

class GgmlTeam final : public Team {
public:
    explicit GgmlTeam(const ggml_compute_params * params) : Team(params->ith, params->nth), pool(params->threadpool) {}

    void meet() override {
        if (ith == 0) {
            ggml_threadpool_chunk_set(pool, nth);
        }
        ggml_barrier(pool);
    }
    int64_t next() override { return ggml_threadpool_chunk_add(pool, 1); }

private:
    ggml_threadpool * pool;
};

void list_mul_mat(const ggml_tensor * weights, const ggml_tensor * x, ggml_tensor * dst, Product & product) {
    const int64_t repeat2 = x->ne[2] / weights->ne[2], repeat3 = x->ne[3] / weights->ne[3];
    for (int64_t w3 = 0; w3 < weights->ne[3]; ++w3) {
        for (int64_t w2 = 0; w2 < weights->ne[2]; ++w2) {
            product.begin_group(matrix_of(weights, w2, w3), weights->ne[1]);
            for (int64_t i3 = w3 * repeat3; i3 < (w3 + 1) * repeat3; ++i3) {
                for (int64_t i2 = w2 * repeat2; i2 < (w2 + 1) * repeat2; ++i2) {
                    for (int64_t i1 = 0; i1 < x->ne[1]; ++i1) {
                        product.add_row({ row_at(x, i1, i2, i3), row_of(dst, i1, i2, i3) });
                    }
                }
            }
        }
    }
}

// Row `slot` of token t meets expert ids[t][slot].
void list_mul_mat_id(const ggml_tensor * weights, const ggml_tensor * x, const ggml_tensor * ids, ggml_tensor * dst, Product & product) {
    const auto expert_of = [&](int64_t slot, int64_t t) {
        int32_t expert;
        std::memcpy(&expert, static_cast<const char *>(ids->data) + static_cast<size_t>(t) * ids->nb[1] + static_cast<size_t>(slot) * ids->nb[0],
                    sizeof(expert));
        GGML_ASSERT(expert >= 0 && expert < weights->ne[2]);
        return expert;
    };
    for (int64_t e = 0; e < weights->ne[2]; ++e) {
        product.begin_group(matrix_of(weights, e, 0), weights->ne[1]);
        for (int64_t t = 0; t < ids->ne[1]; ++t) {
            for (int64_t slot = 0; slot < ids->ne[0]; ++slot) {
                if (expert_of(slot, t) == e) {
                    product.add_row({ row_at(x, slot % x->ne[1], t, 0), row_of(dst, slot, t, 0) });
                }
            }
        }
    }
}

Product product_of(const ggml_tensor * op, Workspace & workspace, int ith, int nth) {
    const ggml_tensor * weights = op->src[0];
    return Product(workspace, type_of(weights->type), blocks_of(weights), ggml_nrows(op), weights->ne[2] * weights->ne[3], ith, nth);
}

void multiply_tensors(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * weights = dst->src[0];
    Workspace workspace(params->wdata);
    Product product = product_of(dst, workspace, params->ith, params->nth);
    if (dst->op == GGML_OP_MUL_MAT) {
        list_mul_mat(weights, dst->src[1], dst, product);
    } else {
        list_mul_mat_id(weights, dst->src[1], dst->src[2], dst, product);
    }
    GgmlTeam team(params);
    product.multiply(team);
}

void get_rows(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * weights = dst->src[0];
    const ggml_tensor * rows = dst->src[1];
    const Type type = type_of(weights->type);
    const int64_t n_blocks = blocks_of(weights), n = ggml_nelements(rows);
    for (int64_t i = params->ith; i < n; i += params->nth) {
        const int64_t i0 = i % rows->ne[0], i1 = i / rows->ne[0] % rows->ne[1], i2 = i / rows->ne[0] / rows->ne[1];
        int32_t row;
        std::memcpy(&row, static_cast<const char *>(rows->data) + static_cast<size_t>(i0) * rows->nb[0] + static_cast<size_t>(i1) * rows->nb[1] +
                              static_cast<size_t>(i2) * rows->nb[2], sizeof(row));
        GGML_ASSERT(row >= 0 && row < weights->ne[1]);
        const uint8_t * panel = matrix_of(weights, i1, i2) + static_cast<size_t>(row / panel_rows) * panel_bytes(shapes[type], n_blocks);
        read_row(type, panel, n_blocks, row % panel_rows, row_of(dst, i0, i1, i2));
    }
}

class Traits final : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        Workspace workspace;
        if (op->op != GGML_OP_GET_ROWS) {
            product_of(op, workspace, 0, n_threads);
        }
        size = workspace.bytes();
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (op->op == GGML_OP_GET_ROWS) {
            get_rows(params, op);
        } else {
            multiply_tensors(params, op);
        }
        return true;
    }
};

bool is_ours(const ggml_tensor * op) {
    return (op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID || op->op == GGML_OP_GET_ROWS) && op->src[0]->buffer &&
           op->src[0]->buffer->buft == buffer_type();
}

// Attention is ours in exact contexts, and where the queries come from our products: a model that was loaded for ggml's
// numbers has those everywhere.
class AttentionTraits final : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        static thread_local bool asking = false;   // ggml, what it needs itself
        if (asking || !can_attend(op)) {
            return false;
        }
        size = attend_bytes(op, n_threads);
        if (!comes_from_us(op->src[0])) {   // whose it is depends on the context
            ggml_tensor * node = const_cast<ggml_tensor *>(op);
            ggml_cgraph   one{};
            one.nodes   = &node;
            one.n_nodes = 1;
            asking = true;
            size = std::max(size, ggml_graph_plan(&one, n_threads, nullptr).work_size);
            asking = false;
        }
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (!can_attend(op) || !(params->use_ref || comes_from_us(op->src[0]))) {
            return false;
        }
        GgmlTeam team(params);
        attend(op, params->use_ref, team, params->wdata);
        return true;
    }

    static bool comes_from_us(const ggml_tensor * query) {
        constexpr int far = 16;   // norm, bias, rotation and what only looks otherwise
        for (int i = 0; query && i < far; ++i) {
            const bool turned = query->op == GGML_OP_MUL_MAT && query->op_params[1] == GGML_HINT_SRC0_IS_HADAMARD;   // for blocks of keys
            if (query->op == GGML_OP_MUL_MAT && !turned) {
                return is_ours(query);
            }
            query = query->src[turned];
        }
        return false;
    }
};

class Extra final : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        if (!is_ours(op) || !is_packed(op->src[0]) || !ggml_is_contiguous(op->src[0]) || op->src[0]->view_src || refused) {
            return false;
        }
        if (op->op == GGML_OP_GET_ROWS) {
            // Of tables only the one that may be the output matrix, too. With others nothing is multiplied, and at parts of
            // some models look themselves.
            return op->src[1]->type == GGML_TYPE_I32 && op->type == GGML_TYPE_F32 && std::strcmp(op->src[0]->name, "token_embd.weight") == 0;
        }
        return op->src[1]->type == GGML_TYPE_F32 && op->src[1]->nb[0] == sizeof(float) && op->type == GGML_TYPE_F32;
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        if (op->op == GGML_OP_FLASH_ATTN_EXT) {
            return &attention;
        }
        return is_ours(op) ? &traits : nullptr;
    }

    Traits          traits;
    AttentionTraits attention;
};

constexpr size_t alignment = 64, huge_page = 2 << 20;

void free_memory(ggml_backend_buffer_t buffer) { std::free(buffer->context); }

void * base_of(ggml_backend_buffer_t buffer) { return buffer->context; }

void set_memory(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    std::memset(static_cast<char *>(tensor->data) + offset, value, size);
}

// Does parts 0 to n - 1, on all cores where there is enough to do: as ggml's own rearranging.
template <class F> void share(int64_t n, size_t bytes, const F & part) {
#ifdef TRIOLLAMA_TEAM
    constexpr size_t enough = 1 << 18;
    if (bytes >= enough) {
        struct Job {
            const F &            part;
            const int64_t        n;
            std::atomic<int64_t> next{ 0 };
        } job = { part, n };
        run_team(0, [](void * data) {
            Job & mine = *static_cast<Job *>(data);
            for (int64_t i = mine.next++; i < mine.n; i = mine.next++) {
                mine.part(i);
            }
        }, &job);
        return;
    }
#else
    (void) bytes;
#endif
    for (int64_t i = 0; i < n; ++i) {
        part(i);
    }
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor));   // as llama.cpp loads
    const Type type = type_of(tensor->type);
    const int64_t n_blocks = blocks_of(tensor), panels = panels_of(tensor);
    const size_t of_panel = panel_bytes(shapes[type], n_blocks);
    share(tensor->ne[2] * tensor->ne[3] * panels, size, [&](int64_t i) {
        const int64_t m = i / panels, p = i % panels;
        pack_panel(type, static_cast<const uint8_t *>(data) + static_cast<size_t>(m) * tensor->nb[2], tensor->nb[1], p * panel_rows, tensor->ne[1],
                   n_blocks, static_cast<uint8_t *>(tensor->data) + static_cast<size_t>(i) * of_panel);
    });
}

void clear(ggml_backend_buffer_t buffer, uint8_t value) { std::memset(buffer->context, value, buffer->size); }

ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type, size_t size) {
    const size_t unit = size >= 4 * huge_page ? huge_page : alignment;
    const size_t whole = (size + unit - 1) / unit * unit;
    void * memory = std::aligned_alloc(unit, whole);
    if (!memory) {
        return nullptr;
    }
#if defined(MADV_HUGEPAGE)
    if (unit == huge_page) {
        madvise(memory, whole, MADV_HUGEPAGE);   // a hint
    }
#endif
    static constexpr ggml_backend_buffer_i interface = [] {
        ggml_backend_buffer_i calls{};
        calls.free_buffer   = free_memory;
        calls.get_base      = base_of;
        calls.memset_tensor = set_memory;
        calls.set_tensor    = set_tensor;
        calls.clear         = clear;
        return calls;
    }();
    return ggml_backend_buffer_init(type, interface, memory, size);
}

ggml_backend_buffer_type_t buffer_type() {
    static ggml_backend_buffer_type type = [] {
        ggml_backend_buffer_type made{};
        made.iface.get_name       = [](ggml_backend_buffer_type_t) { return "triollama"; };
        made.iface.alloc_buffer   = allocate;
        made.iface.get_alignment  = [](ggml_backend_buffer_type_t) { return alignment; };
        made.iface.get_alloc_size = [](ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
            return is_packed(tensor) ? packed_bytes(tensor) : ggml_nbytes(tensor);
        };
        made.device  = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
        made.context = new Extra;
        return made;
    }();
    return &type;
}

}  // namespace

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const Kernel * kernel : available_kernels()) {
        names.push_back(kernel->name);
    }
    return names;
}

bool use_kernel(const std::string & name) { return choose_kernel(name.empty() ? nullptr : name.c_str()); }

bool available() { return available_kernels().size() > 1; }   // the portable one is for comparison

void install() {
    if (available()) {
        auto & types = ggml_backend_cpu_get_extra_buffer_types();
        types.insert(types.begin(), buffer_type());
    }
}

WithoutKernels::WithoutKernels() { refused = true; }

WithoutKernels::~WithoutKernels() { refused = false; }

}  // namespace triollama::native::kernels

#else

namespace triollama::native::kernels {

std::vector<std::string> kernel_names() { return {}; }

bool use_kernel(const std::string &) { return false; }

bool available() { return false; }

void install() {}

WithoutKernels::WithoutKernels() = default;

WithoutKernels::~WithoutKernels() = default;

}  // namespace triollama::native::kernels

#endif
