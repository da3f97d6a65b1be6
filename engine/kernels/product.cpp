#include "kernels/product.hpp"

#include "kernels/sets.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace triollama::native::kernels {

namespace {

// So few activations each thread lays out for itself, which is sooner done than waiting for others.
constexpr int64_t few_values = 16384;
// Tiles that meet one panel after another: they stay in the second level of cache.
constexpr size_t tiles_in_cache = 1 << 20;

void fill_floats(const Row * rows, int64_t n_rows, int size, int64_t b, float * to) {
    for (int r = 0; r < size; ++r, to += block) {
        if (r < n_rows) {
            std::memcpy(to, rows[r].x + b * block, block * sizeof(float));
        } else {
            std::fill(to, to + block, 0.0f);
        }
    }
}

// A block of a tile; rows that do not exist are zero.
void fill_block(const Kernel & kernel, const Shape & shape, const Row * rows, int64_t n_rows, int size, int64_t b, uint8_t * to) {
    if (is_float(shape)) {
        fill_floats(rows, n_rows, size, b, reinterpret_cast<float *>(to));
        return;
    }
    float * scales = reinterpret_cast<float *>(to + size * block);
    for (int r = 0; r < size; ++r) {
        int8_t * q = reinterpret_cast<int8_t *>(to) + r * block;
        int32_t sums[2] = { 0, 0 };
        if (r < n_rows) {
            kernel.quantize(rows[r].x + b * block, q, scales + r, sums);
        } else {
            std::memset(q, 0, block);
            scales[r] = 0;
        }
        // What is no number has a scale that is none, and sums that may overflow.
        const uint32_t low = static_cast<uint32_t>(sums[0]), high = static_cast<uint32_t>(sums[1]);
        uint8_t * added = reinterpret_cast<uint8_t *>(scales + size + r);
        const auto add = [&](uint32_t sum, size_t at) {
            const uint32_t less = 0u - shape.zero * sum;
            std::memcpy(added + at, &less, sizeof(less));
        };
        if (has_halves(shape)) {
            add(low, 0);
            add(high, static_cast<size_t>(size) * sizeof(float));
        } else if (has_min(shape)) {
            const float sum = scales[r] * static_cast<float>(static_cast<int32_t>(low + high));
            scales[size + r] = is_super(shape) ? -sum : sum;   // GGUF subtracts these
        } else {
            add(low + high, 0);
        }
    }
}

const Kernel * named(const char * name) {
    for (const Kernel * kernel : available_kernels()) {
        if (!name || std::strcmp(kernel->name, name) == 0) {
            return kernel;
        }
    }
    return nullptr;
}

std::atomic<const Kernel *> chosen{ nullptr };

}  // namespace

// Weights, the rows that meet them, and the tiles that these lie in: whole ones, then one that may be smaller.
struct Product::Group {
    const uint8_t * panels;
    int64_t         n_columns;
    const Row *     rows;
    int64_t         n_rows;
    Type            type;
    int64_t         n_blocks;
    bool            whole;   // all tiles, where there are several

    int64_t n_panels() const { return (n_columns + panel_rows - 1) / panel_rows; }
    int64_t n_tiles() const { return (n_rows + tile_rows - 1) / tile_rows; }
    int64_t rows_of(int64_t t) const { return std::min<int64_t>(tile_rows, n_rows - t * tile_rows); }
    int     size_of(int64_t t) const { return whole && n_rows > tile_rows ? n_sizes - 1 : size_index(rows_of(t)); }
    size_t  bytes_of(int size) const { return static_cast<size_t>(n_blocks) * tile_bytes(shapes[type], size); }
    size_t  place_of(int64_t t) const { return static_cast<size_t>(t) * bytes_of(tile_rows); }
    size_t  bytes() const { return place_of(n_tiles() - 1) + bytes_of(sizes[size_of(n_tiles() - 1)]); }   // of all tiles

    // Blocks [first, last) of all tiles, counted through.
    void fill(const Kernel & kernel, int64_t first, int64_t last, uint8_t * tiles) const {
        for (int64_t at = first; at < last; ++at) {
            const int64_t t = at / n_blocks, b = at % n_blocks;
            const int size = sizes[size_of(t)];
            fill_block(kernel, shapes[type], rows + t * tile_rows, rows_of(t), size, b,
                       tiles + place_of(t) + static_cast<size_t>(b) * tile_bytes(shapes[type], size));
        }
    }

    // Tiles [from, to) with panels [first, last).
    void multiply(const Kernel & kernel, const uint8_t * tiles, int64_t first, int64_t last, int64_t from, int64_t to, uint8_t * scratch) const {
        const uint8_t * some = panels + static_cast<size_t>(first) * panel_bytes(shapes[type], n_blocks);
        const int64_t end = std::min(last * panel_rows, n_columns);
        while (from < to) {
            const int     size = size_of(from);
            const int64_t same = size_of(to - 1) == size ? to : to - 1;   // only the last may be smaller
            kernel.multiply[type][size](some, n_blocks, tiles + place_of(from), rows + from * tile_rows,
                                        std::min(same * tile_rows, n_rows) - from * tile_rows, first * panel_rows, end, scratch);
            from = same;
        }
    }
};

#if TRIOLLAMA_X86_KERNELS
static Kernel with_tiles() {
    Kernel made = avx512_kernel;
    made.name = amx_tiles.name;
    made.needs = amx_tiles.needs;
    for (int type = 0; type < n_types; ++type) {
        made.whole_tiles[type] = amx_tiles.whole_tiles[type];
        for (int size = 0; size < n_sizes; ++size) {
            if (const Multiply multiply = amx_tiles.multiply[type][size]) {
                made.multiply[type][size] = multiply;
            }
        }
    }
    return made;
}
#endif

const std::vector<const Kernel *> & available_kernels() {
    static const std::vector<const Kernel *> kernels = [] {
        std::vector<const Kernel *> found;
#if TRIOLLAMA_X86_KERNELS
        static const Kernel amx_kernel = with_tiles();
#endif
        for (const Kernel * kernel : {
#if TRIOLLAMA_X86_KERNELS
                 &amx_kernel, &avx512_kernel, &avx_vnni_kernel, &avx2_kernel,
#endif
#if TRIOLLAMA_ARM_KERNELS
                 &neon_kernel,
#endif
                 &portable_kernel }) {
            if (processor::has(kernel->needs)) {
                found.push_back(kernel);
            }
        }
        return found;
    }();
    return kernels;
}

bool choose_kernel(const char * name) {
    const Kernel * kernel = named(name);
    if (kernel) {
        chosen.store(kernel, std::memory_order_relaxed);
    }
    return kernel;
}

const Kernel & chosen_kernel() {
    const Kernel * kernel = chosen.load(std::memory_order_relaxed);
    return kernel ? *kernel : *available_kernels().front();
}

Product::Product(Workspace & workspace, Type type, int64_t n_blocks, int64_t max_rows, int64_t max_groups, int ith, int nth)
    : type(type), n_blocks(n_blocks), max_rows(max_rows) {
    // A tile has less than twice as many rows as are there, and at most one of a group is not full.
    const int64_t in_tiles = std::min(2 * max_rows, max_rows + tile_rows * max_groups);
    const auto bytes = static_cast<int64_t>(static_cast<size_t>(in_tiles * n_blocks) * tile_bytes(shapes[type], 1));
    if (!is_few()) {
        tiles = workspace.take<uint8_t>(bytes);
    }
    for (int i = 0; i < nth; ++i) {
        Row *     own_rows    = workspace.take<Row>(max_rows);
        Group *   own_groups  = workspace.take<Group>(max_groups);
        uint8_t * own_tiles   = is_few() ? workspace.take<uint8_t>(bytes) : tiles;
        uint8_t * own_scratch = workspace.take<uint8_t>(static_cast<int64_t>(scratch_bytes(shapes[type], n_blocks)));
        if (i == ith) {
            rows    = own_rows;
            groups  = own_groups;
            tiles   = own_tiles;
            scratch = own_scratch;
        }
    }
}

// Tiles lie as the fastest kernel wants them, whoever multiplies: another may be chosen in the middle.
void Product::begin_group(const uint8_t * panels, int64_t n_columns) {
    if (n_groups && !groups[n_groups - 1].n_rows) {
        --n_groups;
    }
    groups[n_groups++] = { panels, n_columns, rows + n_rows, 0, type, n_blocks, available_kernels().front()->whole_tiles[type] };
}

void Product::add_row(Row row) {
    rows[n_rows++] = row;
    ++groups[n_groups - 1].n_rows;
}

bool Product::is_few() const { return max_rows * n_blocks * block <= few_values; }

void Product::multiply(Team & team) const {
    const Kernel & kernel = chosen_kernel();
    const bool few = is_few();
    const Group * const end = groups + n_groups - (n_groups && !groups[n_groups - 1].n_rows);
    uint8_t * to = tiles;
    for (const Group * group = groups; group < end; to += group++->bytes()) {
        const int64_t units = group->n_tiles() * n_blocks;
        group->fill(kernel, few ? 0 : units * team.ith / team.nth, few ? units : units * (team.ith + 1) / team.nth, to);
    }
    if (!few) {
        team.meet();
    }

    // Many rows are cut into parts that whoever is free takes; few are shared out beforehand.
    const uint8_t * from = tiles;
    int64_t part = 0, mine = team.ith;
    for (const Group * group = groups; group < end; from += group++->bytes()) {
        const int64_t panels = group->n_panels(), n = group->n_tiles();
        if (few) {
            group->multiply(kernel, from, panels * team.ith / team.nth, panels * (team.ith + 1) / team.nth, 0, n, scratch);
            continue;
        }
        const int64_t at_once = std::max<int64_t>(1, static_cast<int64_t>(tiles_in_cache / group->bytes_of(tile_rows)));
        const int64_t share = std::clamp<int64_t>(panels / (4 * team.nth), 1, 64);
        for (int64_t t = 0; t < n; t += at_once) {
            for (int64_t p = 0; p < panels; p += share, ++part) {
                if (part == mine) {
                    group->multiply(kernel, from, p, std::min(p + share, panels), t, std::min(t + at_once, n), scratch);
                    mine = team.next();
                }
            }
        }
    }
}

}  // namespace triollama::native::kernels
