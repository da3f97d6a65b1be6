#include "kernels/attention.hpp"

#include "kernels/product.hpp"
#include "kernels/workspace.hpp"

#include "ggml.h"
#include "llama-kv-cells.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace triollama::native::kernels {

namespace {

constexpr float   nothing      = -std::numeric_limits<float>::infinity();
constexpr int64_t rows_at_once = 32;        // queries that go over the same cells together
constexpr int64_t cells_at_once = 128;      // made floats for all of them
constexpr int64_t scores_at_once = 1 << 18; // floats: what a tile may keep
constexpr int64_t few_queries  = 8;         // read halves themselves
constexpr int64_t to_share     = 4;         // units a thread, from which on whoever is free takes the next

int64_t wide(int64_t width) { return (width + 15) / 16 * 16; }

const llama_kv_cells * order_of(const ggml_tensor * keys) {
    while (keys->op == GGML_OP_CPY) {   // floats, which llama.cpp makes halves
        keys = keys->src[0];
    }
    return keys->view_src ? static_cast<const llama_kv_cells *>(keys->view_src->extra) : nullptr;
}

// The node, laid open. Queries and results are floats [width, tokens, heads, streams], the mask halves
// [cells, tokens, 1, streams].
struct Node {
    const ggml_tensor *q, *k, *v, *mask, *sinks;
    const llama_kv_cells * order;   // of positions, or null: that of cells
    char * out;
    float scale, max_bias, softcap;
    int64_t n_tokens, n_heads, n_streams, n_cells, of_head, width, value_width;
    int64_t at_once;   // tokens that may go together: as many as keep their scores near, and few enough that there is work for all

    Node(const ggml_tensor * node, bool ordered)
        : q(node->src[0]), k(node->src[1]), v(node->src[2]), mask(node->src[3]), sinks(node->src[4]), order(ordered ? order_of(k) : nullptr), out(static_cast<char *>(node->data)) {
        std::memcpy(&scale, node->op_params, sizeof(float));
        std::memcpy(&max_bias, node->op_params + 1, sizeof(float));
        std::memcpy(&softcap, node->op_params + 2, sizeof(float));
        n_tokens    = q->ne[1];
        n_heads     = q->ne[2];
        n_streams   = q->ne[3];
        n_cells     = k->ne[1];
        of_head     = n_heads / k->ne[2];
        width       = k->ne[0];
        value_width = v->ne[0];
        const int64_t fit = scores_at_once / std::max<int64_t>(1, n_cells * of_head);
        at_once     = std::max<int64_t>(1, std::min(fit, rows_at_once / of_head));
    }

    const float * query(int64_t token, int64_t head, int64_t stream) const {
        return reinterpret_cast<const float *>(static_cast<const char *>(q->data) + token * q->nb[1] + head * q->nb[2] + stream * q->nb[3]);
    }
    float * result(int64_t token, int64_t head, int64_t stream) const {
        return reinterpret_cast<float *>(out) + ((stream * n_tokens + token) * n_heads + head) * value_width;
    }
    const ggml_fp16_t * seen_by(int64_t token, int64_t stream) const {
        return !mask ? nullptr
                     : reinterpret_cast<const ggml_fp16_t *>(static_cast<const char *>(mask->data) + token * mask->nb[1] +
                                                             stream % mask->ne[3] * mask->nb[3]);
    }
    const char * cells_of(const ggml_tensor * cells, int64_t head, int64_t stream) const {
        return static_cast<const char *>(cells->data) + head / of_head * cells->nb[2] + stream * cells->nb[3];
    }
    // ALiBi, as ggml_compute_forward_soft_max.
    float slope(int64_t head) const {
        if (max_bias <= 0) {
            return 1;
        }
        const auto   below = static_cast<int64_t>(1) << static_cast<int64_t>(std::floor(std::log2(static_cast<double>(n_heads))));
        const double base  = head < below ? std::pow(2.0, -max_bias / static_cast<double>(below)) : std::pow(2.0, -max_bias / 2 / static_cast<double>(below));
        return static_cast<float>(std::pow(base, head < below ? head + 1 : 2 * (head - below) + 1));
    }
};

constexpr uint16_t masked = 0xfc00;   // minus infinity

// What a few tokens of a stream see: the cells that any of them sees, in order, of which each sees one run.
struct Tile {
    int32_t * cells;
    int64_t * from, * to;                        // of each token
    int64_t   n_cells, stream, first, n;         // tokens
    bool      biased;                            // the mask is more than yes and no
};

// What a thread computes in.
struct Place {
    float   *queries, *scores, *cells, *out, *totals;
    int32_t *counted;   // 0, 1, 2 ...
    int32_t *own;       // what one token sees
    Tile *   tiles;     // of some tokens of a stream, kept for the next heads
    int64_t  n_tiles = 0, stream = 0, first = 0;

    Place(Workspace & workspace, const Node & node) {
        const int64_t rows = node.at_once * node.of_head, n = node.n_cells, padded = wide(n);
        queries = workspace.take<float>(rows * wide(node.width));
        scores  = workspace.take<float>(std::min(rows * padded, std::max(scores_at_once, node.at_once * padded)));
        cells   = workspace.take<float>(cells_at_once * wide(std::max(node.width, node.value_width)));
        out     = workspace.take<float>(rows * wide(node.value_width));
        totals  = workspace.take<float>(rows);
        counted = workspace.take<int32_t>(cells_at_once);
        own     = workspace.take<int32_t>(n);
        tiles   = workspace.take<Tile>(node.at_once);
        for (int64_t t = 0; t < node.at_once; ++t) {
            Tile tile{};
            tile.cells = workspace.take<int32_t>(n);
            tile.from  = workspace.take<int64_t>(node.at_once);
            tile.to    = workspace.take<int64_t>(node.at_once);
            if (tiles) {
                tiles[t] = tile;
            }
        }
    }

    void fill(const Node & node, int64_t of, int64_t from, int64_t n_tokens);
};

// Writes down the cells that a token sees, and returns how many.
int64_t list_seen(const Node & node, const ggml_fp16_t * seen, int32_t * cells, bool & biased) {
    const int64_t n = node.n_cells;
    int64_t found = 0, i = 0;
    const auto look = [&](uint16_t bits) {
        if (bits != masked) {
            cells[found++] = static_cast<int32_t>(i);
            biased |= bits != 0;
        }
    };
    while (seen && i + 4 <= n) {
        uint64_t four;
        std::memcpy(&four, seen + i, sizeof(four));
        if (four == 0xfc00fc00fc00fc00) {
            i += 4;
            continue;
        }
        for (int64_t end = i + 4; i < end; ++i) {
            look(static_cast<uint16_t>(seen[i]));
        }
    }
    for (; i < n; ++i) {
        look(seen ? static_cast<uint16_t>(seen[i]) : 0);
    }
    if (node.order) {
        const auto before = [&](int32_t one, int32_t other) {
            return node.order->pos_get(static_cast<uint32_t>(one)) < node.order->pos_get(static_cast<uint32_t>(other));
        };
        if (!std::is_sorted(cells, cells + found, before)) {
            std::sort(cells, cells + found, before);
        }
    }
    return found;
}

// Fills a tile with tokens from `first` on; fewer than asked for if they do not go together.
void fill_tile(Tile & tile, const Node & node, int64_t stream, int64_t first, int64_t n, int32_t * own) {
    tile.stream  = stream;
    tile.first   = first;
    tile.biased  = false;
    tile.n_cells = list_seen(node, node.seen_by(first, stream), tile.cells, tile.biased);
    tile.from[0] = 0;
    tile.to[0]   = tile.n_cells;
    for (tile.n = 1; tile.n < n; ++tile.n) {
        const int64_t n_own = list_seen(node, node.seen_by(first + tile.n, stream), own, tile.biased);
        if (n_own == 0 || tile.n_cells == 0) {
            break;
        }
        // A run of the list that goes on behind it: then the others' runs stay runs.
        int32_t * const end = tile.cells + tile.n_cells;
        int32_t * const at  = std::find(tile.cells, end, *own);
        const auto common = std::min<int64_t>(end - at, n_own), more = n_own - common;
        if (common == 0 || !std::equal(at, at + common, own) || tile.n_cells + more > node.n_cells) {
            break;
        }
        tile.from[tile.n] = at - tile.cells;
        tile.to[tile.n]   = tile.from[tile.n] + n_own;
        std::copy(own + common, own + n_own, end);
        tile.n_cells += more;
    }
}

// The tiles of some tokens.
void Place::fill(const Node & node, int64_t of, int64_t from, int64_t n_tokens) {
    if (n_tiles && stream == of && first == from) {
        return;
    }
    stream  = of;
    first   = from;
    n_tiles = 0;
    for (int64_t done = 0; done < n_tokens; done += tiles[n_tiles++].n) {
        fill_tile(tiles[n_tiles], node, of, from + done, n_tokens - done, own);
    }
    std::iota(counted, counted + cells_at_once, 0);
}

// Rows of a cache as floats of a width that is a multiple of 16.
void to_floats(const Attend & attend, const ggml_tensor * cells, const char * data, const int32_t * list, int64_t n, float * to) {
    const int64_t width = cells->ne[0], padded = wide(width);
    const auto other = cells->type == GGML_TYPE_F32 ? nullptr : ggml_get_type_traits(cells->type)->to_float;
    for (int64_t i = 0; i < n; ++i, to += padded) {
        const char * from = data + static_cast<size_t>(list[i]) * cells->nb[1];
        if (cells->type == GGML_TYPE_F16 && width == padded) {
            attend.widen(from, width, to);
            continue;
        }
        if (other) {
            other(from, to, width);
        } else {
            std::memcpy(to, from, static_cast<size_t>(width) * sizeof(float));
        }
        std::fill(to + width, to + padded, 0.0f);
    }
}

// Calls f(Cells, kind, first) for cells of a list: as they are, or part by part as floats.
template <class F>
void each_part(const Attend & attend, const Place & place, const ggml_tensor * cells, const char * data, const int32_t * list, int64_t n,
               bool as_they_are, const F & f) {
    const int64_t padded = wide(cells->ne[0]);
    if (as_they_are && cells->type == GGML_TYPE_F16 && cells->ne[0] == padded) {
        f(Cells{ data, cells->nb[1], list, n, padded }, in_halves, 0);
        return;
    }
    for (int64_t first = 0; first < n; first += cells_at_once) {
        const int64_t part = std::min(cells_at_once, n - first);
        to_floats(attend, cells, data, list + first, part, place.cells);
        f(Cells{ reinterpret_cast<const char *>(place.cells), static_cast<size_t>(padded) * sizeof(float), place.counted, part, padded },
          in_floats, first);
    }
}

// Heads [first, last), which share their keys and values, of a tile's tokens. Rows are tokens by heads.
void attend_tile(const Attend & attend, const Node & node, const Tile & tile, int64_t first, int64_t last, const Place & place) {
    const int64_t heads = last - first, rows = tile.n * heads, n = tile.n_cells;
    const int64_t padded = wide(node.width), value_padded = wide(node.value_width), stride = wide(n);
    const bool    few = rows < few_queries;
    float *queries = place.queries, *scores = place.scores, *out = place.out;
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(queries + r * padded, node.query(tile.first + r / heads, first + r % heads, tile.stream),
                    static_cast<size_t>(node.width) * sizeof(float));
        std::fill(queries + r * padded + node.width, queries + (r + 1) * padded, 0.0f);
    }
    each_part(attend, place, node.k, node.cells_of(node.k, first, tile.stream), tile.cells, n, few,
              [&](const Cells & keys, int kind, int64_t at) { attend.scores[kind](keys, queries, rows, scores + at, stride); });

    for (int64_t r = 0; r < rows; ++r) {
        const int64_t t = r / heads, head = first + r % heads, from = tile.from[t], to = tile.to[t];
        float * seen = scores + r * stride + from;
        float   scale = node.scale;
        if (node.softcap != 0) {
            for (int64_t i = 0; i < to - from; ++i) {
                seen[i] = node.softcap * std::tanh(seen[i] * (scale / node.softcap));
            }
            scale = 1;
        }
        if (tile.biased) {
            const ggml_fp16_t * bias = node.seen_by(tile.first + t, tile.stream);
            const float slope = node.slope(head);
            for (int64_t i = 0; i < to - from; ++i) {
                seen[i] = seen[i] * scale + slope * ggml_fp16_to_fp32(bias[tile.cells[from + i]]);
            }
            scale = 1;
        }
        const float sink    = node.sinks ? static_cast<const float *>(node.sinks->data)[head] : nothing;
        const float largest = attend.scaled(seen, to - from, scale, sink);
        float total = 0;
        if (largest != nothing) {
            total = attend.soften(seen, to - from, largest);
            if (node.sinks) {
                total += attend.exponential(sink - largest);
            }
        } else {
            std::fill(seen, seen + (to - from), 0.0f);
        }
        place.totals[r] = total;
    }

    // Cells that all tokens see are for all at once; before and behind them each token has its own.
    std::fill(out, out + rows * value_padded, 0.0f);
    const int64_t begin = *std::max_element(tile.from, tile.from + tile.n);
    const int64_t end   = std::max(begin, *std::min_element(tile.to, tile.to + tile.n));
    const char *  values = node.cells_of(node.v, first, tile.stream);
    const auto gather = [&](int64_t from, int64_t to, int64_t row, int64_t m, bool as_they_are) {
        if (from < to) {
            each_part(attend, place, node.v, values, tile.cells + from, to - from, as_they_are, [&](const Cells & part, int kind, int64_t at) {
                attend.gather[kind](part, scores + row * stride + from + at, stride, m, out + row * value_padded);
            });
        }
    };
    for (int64_t t = 0; t < tile.n; ++t) {
        gather(tile.from[t], std::min(begin, tile.to[t]), t * heads, heads, true);
    }
    gather(begin, end, 0, rows, few);
    for (int64_t t = 0; t < tile.n; ++t) {
        gather(std::max(end, tile.from[t]), tile.to[t], t * heads, heads, true);
    }
    for (int64_t r = 0; r < rows; ++r) {
        const float total = place.totals[r], by = total == 0 ? 0 : 1 / total;
        float * to = node.result(tile.first + r / heads, first + r % heads, tile.stream);
        for (int64_t d = 0; d < node.value_width; ++d) {
            to[d] = out[r * value_padded + d] * by;
        }
    }
}

bool has_rows(const ggml_tensor * tensor) { return tensor->nb[0] == ggml_type_size(tensor->type); }

bool can_read(ggml_type type) { return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float; }

}  // namespace

bool can_attend(const ggml_tensor * node) {
    const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3], *sinks = node->src[4];
    return node->op == GGML_OP_FLASH_ATTN_EXT && node->type == GGML_TYPE_F32 && q->type == GGML_TYPE_F32 && has_rows(q) && has_rows(k) &&
           has_rows(v) && can_read(k->type) && can_read(v->type) && q->ne[2] % k->ne[2] == 0 && k->ne[2] == v->ne[2] &&
           q->ne[3] == k->ne[3] && k->ne[3] == v->ne[3] && ggml_is_contiguous(node) &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->ne[2] == 1 && mask->nb[0] == sizeof(ggml_fp16_t))) &&
           (!sinks || (sinks->type == GGML_TYPE_F32 && ggml_is_contiguous(sinks)));
}

bool tells_order(const ggml_tensor * node) { return order_of(node->src[1]); }

size_t attend_bytes(const ggml_tensor * tensor, int n_threads) {
    Workspace counted;
    Place(counted, Node(tensor, false));
    return static_cast<size_t>(n_threads) * counted.bytes();
}

void attend(const ggml_tensor * tensor, bool ordered, Team & team, void * memory) {
    const Node     node(tensor, ordered);
    const Attend & kernel = chosen_kernel().attend;
    Workspace      workspace(static_cast<char *>(memory) + attend_bytes(tensor, team.ith));
    Place          place(workspace, node);
    const int64_t groups  = node.n_heads / node.of_head, at_once = node.at_once;
    const int64_t windows = (node.n_tokens + at_once - 1) / at_once;

    // Heads [from, to) of tokens [first, first + at_once) of a stream.
    const auto compute = [&](int64_t stream, int64_t first, int64_t from, int64_t to) {
        place.fill(node, stream, first, std::min(at_once, node.n_tokens - first));
        for (int64_t i = 0; i < place.n_tiles; ++i) {
            const Tile & tile = place.tiles[i];
            const int64_t fit = scores_at_once / std::max<int64_t>(1, tile.n * wide(tile.n_cells));
            for (int64_t head = from; head < to;) {
                const int64_t last = std::min({ to, (head / node.of_head + 1) * node.of_head, head + std::max<int64_t>(1, fit) });
                attend_tile(kernel, node, tile, head, last, place);
                head = last;
            }
        }
    };
    const int64_t units = node.n_streams * windows * groups;
    if (units >= to_share * team.nth) {   // heads that share a cache
        team.meet();
        for (int64_t unit = team.ith; unit < units; unit = team.next()) {
            const int64_t group = unit % groups;
            compute(unit / groups / windows, unit / groups % windows * at_once, group * node.of_head, (group + 1) * node.of_head);
        }
        return;
    }
    const int64_t all = node.n_streams * windows * node.n_heads, last = all * (team.ith + 1) / team.nth;
    for (int64_t unit = all * team.ith / team.nth; unit < last;) {   // head by head
        const int64_t head = unit % node.n_heads, to = std::min(node.n_heads, head + (last - unit));
        compute(unit / node.n_heads / windows, unit / node.n_heads % windows * at_once, head, to);
        unit += to - head;
    }
}

}  // namespace triollama::native::kernels
