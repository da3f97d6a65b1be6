#include "training/product.hpp"

#include "kernels/processor.hpp"
#include "kernels/tiles.hpp"
#include "training/panels.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>

namespace triollama::native {

namespace {

using panels::Kernel, panels::max_group, panels::Right, panels::Sink, panels::tile_j, panels::tile_k;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The first that works here, or null.
const Kernel * first_of(std::initializer_list<const Kernel *> kernels) {
    for (const Kernel * kernel : kernels) {
        if (processor::has(kernel->needs)) {
            return kernel;
        }
    }
    return nullptr;
}

// What this processor has, asked while the extension is loaded: a child could be forked in the middle of a first call.
#if TRIOLLAMA_X86_PANELS
const Kernel * const vector_panels = first_of({ &panels::avx512_panels, &panels::avx2_panels });
const Kernel * const dot_panels    = first_of({ &panels::dot_panels });
#elif TRIOLLAMA_ARM_PANELS
const Kernel * const vector_panels = first_of({ &panels::neon_panels }), * const dot_panels = nullptr;
#else
const Kernel * const vector_panels = nullptr, * const dot_panels = nullptr;
#endif
#if TRIOLLAMA_X86_PANELS && TRIOLLAMA_HAS_TILES
const Kernel * const tile_panels = first_of({ &panels::tile_panels });
#else
const Kernel * const tile_panels = nullptr;
#endif

// What computes products in this way here, or null.
const Kernel * panels_of(ProductKernel kernel) {
    switch (kernel) {
        case ProductKernel::vector: return vector_panels;
        case ProductKernel::dots:   return dot_panels;
        case ProductKernel::tiles:  return tile_panels;
        default:                    return nullptr;
    }
}

constexpr size_t line = 64;   // bytes: what memory of threads is aligned to
constexpr int    room_at = 3;    // where a node has the memory that its threads work in: nothing is allocated while they do

size_t whole_lines(size_t bytes) { return (bytes + line - 1) / line * line; }

// This thread's part of it.
char * own_room(const ggml_tensor * dst, int ith, int nth) {
    const ggml_tensor * room = dst->src[room_at];
    const size_t part = (static_cast<size_t>(room->ne[0]) - line) / static_cast<size_t>(nth) / line * line;
    return static_cast<char *>(room->data) + (line - reinterpret_cast<uintptr_t>(room->data) % line) % line + static_cast<size_t>(ith) * part;
}

// How threads share out R, and what each needs for that.
struct Pieces {
    int64_t piece, together;   // i in a piece; i filled at a time
    size_t  panel_bytes, panels, rows;

    // Threads share out pieces of i. Where a row is one k, several are filled together: long reads, and whole blocks of a
    // quantised type.
    Pieces(const Kernel & kernel, ggml_type type, int64_t n_k, bool transposed)
        : piece(transposed ? std::max<int64_t>(kernel.panel_i, ggml_blck_size(type)) : kernel.panel_i),
          together(transposed ? std::max<int64_t>(piece, type == GGML_TYPE_F32 ? 64 : 128) : piece) {
        const int64_t k_pad = round_up(n_k, kernel.k_step);
        panel_bytes = static_cast<size_t>(kernel.panel_i * k_pad * kernel.element);
        panels      = whole_lines(panel_bytes * static_cast<size_t>(together / kernel.panel_i));
        rows        = whole_lines(static_cast<size_t>(std::max(16 * k_pad, 2 * together)) * sizeof(float));
    }
};

constexpr int64_t band = 16;   // rows of L that are rounded at a time

// What this thread lays out of L: `lay` is given rows [first, last), `step` at a time, where they belong, and a row of x.
template <class Lay> void share_left(const ggml_tensor * dst, int64_t step, int ith, int nth, Lay && lay) {
    const ggml_tensor * x = dst->src[0];
    const int64_t steps = round_up(dst->ne[1], step) / step, units = steps * dst->ne[2];
    for (int64_t u = units * ith / nth; u < units * (ith + 1) / nth; ++u) {
        const size_t  batch = static_cast<size_t>(u / steps);
        const int64_t first = u % steps * step;
        lay(first, std::min(first + step, dst->ne[1]), static_cast<char *>(dst->data) + batch * dst->nb[2], [&](int64_t i) {
            return reinterpret_cast<const float *>(static_cast<const char *>(x->data) + batch * x->nb[2] + static_cast<size_t>(i) * x->nb[1]);
        });
    }
}

// L as F32, its rows in groups, from F32 rows of either order.
void group_left(ggml_tensor * dst, int ith, int nth, void * transposed) {
    const Kernel & kernel = *vector_panels;
    const int64_t n_k = dst->ne[0];
    share_left(dst, kernel.group, ith, nth, [&](int64_t first, int64_t last, char * left, const auto & row) {
        for (int64_t j = first, rows; j < last; j += rows) {
            rows = panels::group_of(kernel.group, last - j);
            float * to = reinterpret_cast<float *>(left) + j * n_k;
            if (transposed) {
                for (int64_t k = 0; k < n_k; ++k) {
                    std::memcpy(to + k * rows, row(k) + j, static_cast<size_t>(rows) * sizeof(float));
                }
                continue;
            }
            const float * together[max_group];
            for (int64_t r = 0; r < rows; ++r) {
                together[r] = row(j + r);
            }
            kernel.side_by_side(together, rows, n_k, to);
        }
    });
}

#if TRIOLLAMA_X86_PANELS

// L as BF16 rows of all k, from F32 rows of either order; rows and k beyond the end are zero.
void round_left(ggml_tensor * dst, int ith, int nth, void * transposed) {
    const ggml_tensor * x = dst->src[0];
    const int64_t n_k = x->ne[transposed ? 1 : 0], n_j = x->ne[transposed ? 0 : 1], wide = dst->ne[0];
    float * buffer = reinterpret_cast<float *>(own_room(dst, ith, nth));
    share_left(dst, band, ith, nth, [&](int64_t first, int64_t last, char * left, const auto & row) {
        for (int64_t k = 0; transposed && k < n_k; ++k) {
            for (int64_t j = first; j < std::min(last, n_j); ++j) {
                buffer[(j - first) * wide + k] = row(k)[j];
            }
        }
        for (int64_t j = first; j < last; ++j) {
            float * own = buffer + (j - first) * wide;
            const int64_t n = j < n_j ? n_k : 0;
            if (!transposed && n < wide) {
                std::copy_n(row(j), n, own);
            }
            std::fill(own + n, own + wide, 0.0f);
            panels::dot_panels.round(transposed || n < wide ? own : row(j), left + static_cast<size_t>(j) * dst->nb[1], wide);
        }
    });
}

#else

constexpr auto round_left = group_left;   // nothing asks for BF16 there

#endif

// dst = the product of src[0], as R, and src[1], as L laid out for it, plus src[2] if there is one. `transposed`:
// src[0] has i contiguous.
template <ProductKernel kind> void multiply(ggml_tensor * dst, int ith, int nth, void * transposed) {
    const Kernel & kernel = *panels_of(kind);
    const ggml_tensor * r = dst->src[0];
    const ggml_tensor * l = dst->src[1];
    const ggml_tensor * added = dst->src[2];
    Right right;
    right.type         = r->type;
    right.k_contiguous = !transposed;
    right.n_k          = transposed ? r->ne[1] : r->ne[0];
    right.n_i          = dst->ne[0];
    right.stride       = r->nb[1];
    right.to_float     = kernel.dequantizer(r->type);

    const Pieces of(kernel, r->type, right.n_k, transposed);
    const int64_t piece = of.piece;
    const int64_t n_j    = dst->ne[1], pieces = round_up(right.n_i, piece) / piece, batches = dst->ne[2];
    const int64_t j_step = kernel.group ? kernel.group * 3 : tile_j;
    // Where threads would have unequal numbers of few pieces, columns are split as well; a panel on the border between two
    // threads is then filled by both.
    const int64_t n_pieces = pieces * batches, enough = 8 * nth;
    const int64_t splits = n_pieces % nth == 0 || n_pieces >= enough
                               ? 1 : std::min(round_up(n_j, j_step) / j_step, (enough + n_pieces - 1) / n_pieces);
    const int64_t share  = round_up((n_j + splits - 1) / splits, j_step);
    const int64_t units  = n_pieces * splits, end = units * (ith + 1) / nth, repeat = dst->ne[2] / r->ne[2];

    char *  panel  = own_room(dst, ith, nth);
    float * buffer = reinterpret_cast<float *>(panel + of.panels);
    int64_t packed = -1;
#if TRIOLLAMA_HAS_TILES
    std::optional<TileScope> scope;
    if (kind == ProductKernel::tiles) {
        constexpr TileShape whole = { 16, 64 }, all[] = { whole, whole, whole, whole, whole, whole, whole, whole };
        scope.emplace(all);
    }
#endif
    for (int64_t u = units * ith / nth, count = 1; u < end; u += count) {
        const int64_t batch = u / (pieces * splits), at = u / splits % pieces, split = u % splits;
        count = splits > 1 ? 1 : std::min({ of.together / piece, pieces - at, end - u });
        const int64_t first = at * piece, n = std::min(count * piece, right.n_i - first);
        if (packed != u / splits) {
            right.data = static_cast<const char *>(r->data) + static_cast<size_t>(batch / repeat) * r->nb[2];
            kernel.pack(right, first, n, panel, of.panel_bytes, buffer);
            packed = u / splits;
        }
        const char * left = static_cast<const char *>(l->data) + static_cast<size_t>(batch) * l->nb[2];
        const auto place = [&](const ggml_tensor * x, int64_t i) {
            return static_cast<char *>(x->data) + static_cast<size_t>(batch) * x->nb[2] + static_cast<size_t>(i) * sizeof(float);
        };
        for (int64_t p = 0; p < n; p += kernel.panel_i) {
            const Sink sink = { place(dst, first + p), dst->nb[1], added ? place(added, first + p) : nullptr,
                                added ? added->nb[1] : 0 };
            kernel.multiply(left, l->nb[1], split * share, std::min((split + 1) * share, n_j),
                            panel + static_cast<size_t>(p / kernel.panel_i) * of.panel_bytes, std::min(kernel.panel_i, n - p),
                            right.n_k, sink);
        }
    }
}

bool has_dense_rows(const ggml_tensor * x) { return x->nb[0] == ggml_type_size(x->type); }

}  // namespace

bool has_product_kernel(ProductKernel kernel) {
    return kernel <= ProductKernel::ggml || panels_of(kernel) != nullptr;
}

ProductKernel best_product_kernel(bool exact) {
    if (!exact && has_product_kernel(ProductKernel::tiles)) {
        return ProductKernel::tiles;   // not `dots`: where they were measured, F32 vectors are faster
    }
    return has_product_kernel(ProductKernel::vector) ? ProductKernel::vector : ProductKernel::ggml;
}

bool f32_outruns_quantized() { return vector_panels && vector_panels->lanes >= 16; }

const char * product_kernel_name(ProductKernel kernel) {
    switch (kernel) {
        case ProductKernel::portable: return "portable";
        case ProductKernel::ggml:     return "ggml";
        case ProductKernel::vector:   return "vector";
        case ProductKernel::dots:     return "dots";
        case ProductKernel::tiles:    return "tiles";
    }
    return "";
}

ggml_tensor * undequantized(ggml_tensor * tensor) {
    while ((tensor->op == GGML_OP_CPY || tensor->op == GGML_OP_GET_ROWS) &&
           (tensor->src[0]->op == GGML_OP_NONE || tensor->src[0]->op == GGML_OP_VIEW) && tensor->type == GGML_TYPE_F32 &&
           tensor->src[0]->type != GGML_TYPE_F32 && ggml_are_same_shape(tensor, tensor->src[0])) {
        tensor = tensor->src[0];
    }
    return tensor;
}

// L as products want it, as BF16 if `packed`.
ggml_tensor * ProductRewriter::rows_of(ggml_tensor * x, bool transposed, bool packed) {
    ggml_tensor *& rows = prepared[2 * transposed + packed][x];
    if (!rows) {
        const int64_t n_k = transposed ? x->ne[1] : x->ne[0], n_j = transposed ? x->ne[0] : x->ne[1];
        // ggml hands the pointer back to the function; only whether it is null matters.
        void * order = transposed ? static_cast<void *>(context) : nullptr;
        const int64_t wide = packed ? round_up(n_k, tile_k) : n_k, high = packed ? round_up(n_j, tile_j) : n_j;
        rows = ggml_custom_4d(context, packed ? GGML_TYPE_BF16 : GGML_TYPE_F32, wide, high, x->ne[2], 1, &x, 1,
                              packed ? round_left : group_left,
                              GGML_N_TASKS_MAX, order);
        if (packed) {
            needs_room(rows, static_cast<size_t>(band * wide) * sizeof(float));
        }
    }
    return rows;
}

bool ProductRewriter::rewrite(ggml_tensor * node) {
    if (kernel < ProductKernel::vector || (node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_OUT_PROD) || node->ne[3] != 1) {
        return false;
    }
    const bool outer = node->op == GGML_OP_OUT_PROD;
    ggml_tensor * right = node->src[0];
    ggml_tensor * left  = node->src[1];
    bool left_k_contiguous = !outer;
    if (outer && left->op == GGML_OP_TRANSPOSE) {
        left = left->src[0];
        left_k_contiguous = true;
    }
    if (!outer && ggml_is_quantized(right->type) && !weights_too) {
        return false;   // asked for by the graph: meets quantised columns
    }
    right = undequantized(right);
    if (left->type != GGML_TYPE_F32 || node->type != GGML_TYPE_F32 || !has_dense_rows(left) || !has_dense_rows(right) ||
        (right->type != GGML_TYPE_F32 && !ggml_get_type_traits(right->type)->to_float)) {
        return false;
    }
    const int64_t n_k = left_k_contiguous ? left->ne[0] : left->ne[1];
    const bool packed = kernel >= ProductKernel::dots && std::min({ node->ne[0], node->ne[1], n_k }) >= 32;
    left = rows_of(left, !left_k_contiguous, packed);
    void * order = outer ? static_cast<void *>(context) : nullptr;
    ggml_tensor * sources[] = { right, left };
    // Its description is what is wanted: the node itself stays, since others read it.
    const auto compute = !packed                          ? multiply<ProductKernel::vector>
                         : kernel == ProductKernel::tiles ? multiply<ProductKernel::tiles>
                                                          : multiply<ProductKernel::dots>;
    ggml_tensor * product = ggml_custom_4d(context, GGML_TYPE_F32, node->ne[0], node->ne[1], node->ne[2], 1, sources, 2, compute,
                                           GGML_N_TASKS_MAX, order);
    node->op = product->op;
    std::memcpy(node->op_params, product->op_params, sizeof(node->op_params));
    node->src[0] = right;
    node->src[1] = left;
    products.insert(node);
    const Pieces of(*panels_of(packed ? kernel : ProductKernel::vector), right->type, n_k, outer);
    needs_room(node, of.panels + of.rows);
    return true;
}

bool ProductRewriter::take_sum(ggml_tensor * node, const std::unordered_map<const ggml_tensor *, int> & readers) {
    if (node->op != GGML_OP_ADD || node->view_src || !ggml_are_same_shape(node->src[0], node->src[1])) {
        return false;
    }
    for (int at : { 1, 0 }) {
        ggml_tensor * product = node->src[at];
        ggml_tensor * other   = node->src[1 - at];
        const bool prepared_too = std::any_of(std::begin(prepared), std::end(prepared),
                                              [&](const auto & some) { return some.count(product) != 0; });
        if (!products.count(product) || readers.at(product) != 1 || prepared_too ||
            product->data || other->type != GGML_TYPE_F32 || !has_dense_rows(other)) {
            continue;
        }
        node->op = product->op;
        std::memcpy(node->op_params, product->op_params, sizeof(node->op_params));
        node->src[0] = product->src[0];
        node->src[1] = product->src[1];
        node->src[2] = other;
        products.erase(product);
        in_room.push_back(node);
        return true;
    }
    return false;
}

void ProductRewriter::needs_room(ggml_tensor * node, size_t bytes) {
    in_room.push_back(node);
    room = std::max(room, whole_lines(bytes));
}

void ProductRewriter::give_room(int threads) {
    if (!in_room.empty()) {
        ggml_tensor * shared = ggml_new_tensor_1d(context, GGML_TYPE_I8, static_cast<int64_t>(room * static_cast<size_t>(threads) + line));
        for (ggml_tensor * node : in_room) {
            node->src[room_at] = shared;
        }
    }
}

}  // namespace triollama::native
