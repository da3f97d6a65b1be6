#include "kernels/product.hpp"

#include "kernels/scratch.hpp"
#include "kernels/sets.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace triollama::native::kernels {

namespace {

// So few values each thread quantizes for itself, which is sooner done than waiting for others.
constexpr int64_t few_values = 16384;
// Tiles that meet one panel after another: they stay in the second level of cache.
constexpr size_t tiles_in_cache = 1 << 20;

// The tiles of a group: whole ones, then one that may be smaller.
struct Tiles {
    Shape   shape;
    int64_t n_blocks, n_rows;
    bool    whole;   // all of them, where there are several

    int64_t count() const { return (n_rows + tile_rows - 1) / tile_rows; }
    int64_t rows_of(int64_t t) const { return std::min<int64_t>(tile_rows, n_rows - t * tile_rows); }
    int     size_of(int64_t t) const { return whole && n_rows > tile_rows ? n_sizes - 1 : size_index(rows_of(t)); }
    size_t  bytes() const { return static_cast<size_t>(n_blocks) * tile_bytes(shape, tile_rows); }   // of a whole one
};

// A block of a tile; rows that do not exist are zero.
void fill_block(const Kernel & kernel, Shape shape, const Row * rows, int64_t n_rows, int size, int64_t b, uint8_t * to) {
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

// Blocks [first, last) of all tiles, counted through.
void fill_tiles(const Kernel & kernel, const Tiles & tiles, const Row * rows, int64_t first, int64_t last, uint8_t * to) {
    for (int64_t at = first; at < last; ++at) {
        const int64_t t = at / tiles.n_blocks, b = at % tiles.n_blocks, n = tiles.rows_of(t);
        const int size = sizes[tiles.size_of(t)];
        fill_block(kernel, tiles.shape, rows + t * tile_rows, n, size, b,
                   to + static_cast<size_t>(t) * tiles.bytes() + static_cast<size_t>(b) * tile_bytes(tiles.shape, size));
    }
}

// Tiles [from, to) of a group with panels [first, last).
void multiply_part(const Kernel & kernel, Type type, const Group & group, const Tiles & tiles, const Row * rows, const uint8_t * work,
                   int64_t first, int64_t last, int64_t from, int64_t to) {
    const size_t panel = panel_bytes(tiles.shape, tiles.n_blocks);
    const uint8_t * panels = group.panels + static_cast<size_t>(first) * panel;
    const int64_t end = std::min(last * panel_rows, group.n_columns);
    if (const auto at_once = kernel.multiply_tiles[type][tiles.size_of(from)]) {
        static thread_local Scratch scratch;
        at_once(panels, tiles.n_blocks, work + static_cast<size_t>(from) * tiles.bytes(), rows + from * tile_rows,
                std::min(to * tile_rows, tiles.n_rows) - from * tile_rows, first * panel_rows, end,
                scratch.get<uint8_t>(scratch_bytes(tiles.n_blocks)));
        return;
    }
    for (int64_t column = first * panel_rows; column < end; column += panel_rows, panels += panel) {
        for (int64_t t = from; t < to; ++t) {
            kernel.multiply[type][tiles.size_of(t)](panels, tiles.n_blocks, work + static_cast<size_t>(t) * tiles.bytes(),
                                                    rows + t * tile_rows, tiles.rows_of(t), column,
                                                    static_cast<int>(std::min<int64_t>(panel_rows, end - column)));
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

const std::vector<const Kernel *> & available_kernels() {
    static const std::vector<const Kernel *> kernels = [] {
        std::vector<const Kernel *> found;
        for (const Kernel * kernel : {
#if TRIOLLAMA_X86_KERNELS
                 &amx_kernel(), &avx512_kernel(), &avx_vnni_kernel(), &avx2_kernel(),
#endif
#if TRIOLLAMA_ARM_KERNELS
                 &neon_kernel(),
#endif
                 &portable_kernel() }) {
            if (kernel->available()) {
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

size_t work_bytes(Type type, int64_t n_blocks, int64_t n_rows, int64_t n_groups) {
    const int64_t tiles = n_rows / tile_rows + n_groups;
    return static_cast<size_t>(tiles * n_blocks) * tile_bytes(shapes[type], tile_rows) + 64;
}

void multiply(const Product & product, uint8_t * shared, Team & team) {
    const Kernel & kernel = chosen_kernel();
    const Shape shape = shapes[product.type];
    const int64_t n_values = static_cast<int64_t>(product.rows.size()) * product.n_blocks * block;
    const bool few = n_values <= few_values;
    static thread_local Scratch own;
    uint8_t * work = few ? own.get<uint8_t>(work_bytes(product.type, product.n_blocks, static_cast<int64_t>(product.rows.size()),
                                                       static_cast<int64_t>(product.groups.size())))
                         : reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(shared) + 63) / 64 * 64);
    uint8_t * at = work;
    for (const Group & group : product.groups) {
        const Tiles tiles = { shape, product.n_blocks, group.n, kernel.multiply_tiles[product.type][n_sizes - 1] != nullptr };
        const int64_t units = tiles.count() * tiles.n_blocks;
        fill_tiles(kernel, tiles, product.rows.data() + group.first, few ? 0 : units * team.ith / team.nth,
                   few ? units : units * (team.ith + 1) / team.nth, at);
        at += static_cast<size_t>(tiles.count()) * tiles.bytes();
    }
    if (!few) {
        team.meet();
    }

    // Many rows are cut into parts that whoever is free takes; few are shared out beforehand.
    const uint8_t * from = work;
    int64_t part = 0, mine = team.ith;
    for (const Group & group : product.groups) {
        const Tiles tiles = { shape, product.n_blocks, group.n, kernel.multiply_tiles[product.type][n_sizes - 1] != nullptr };
        const Row * rows = product.rows.data() + group.first;
        const int64_t panels = (group.n_columns + panel_rows - 1) / panel_rows, n_tiles = tiles.count();
        if (few) {
            multiply_part(kernel, product.type, group, tiles, rows, from, panels * team.ith / team.nth,
                          panels * (team.ith + 1) / team.nth, 0, n_tiles);
        } else {
            const int64_t at_once = std::max<int64_t>(1, static_cast<int64_t>(tiles_in_cache / tiles.bytes()));
            const int64_t share = std::clamp<int64_t>(panels / (4 * team.nth), 1, 64);
            for (int64_t t = 0; t < n_tiles; t += at_once) {
                for (int64_t p = 0; p < panels; p += share, ++part) {
                    if (part == mine) {
                        multiply_part(kernel, product.type, group, tiles, rows, from, p, std::min(p + share, panels), t,
                                      std::min(t + at_once, n_tiles));
                        mine = team.next();
                    }
                }
            }
        }
        from += static_cast<size_t>(n_tiles) * tiles.bytes();
    }
}

}  // namespace triollama::native::kernels
