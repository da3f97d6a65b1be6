// Products by every set of panels that this processor has: vectors of any width give the same bits, a chain of fused
// additions over k; BF16 ones are right to the rounding of sums in floats. Prints how many numbers were compared.
#include "kernels/tiles.hpp"
#include "training/panels.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

using namespace triollama::native;
using panels::Kernel;

// Of ggml only what rows of two types need.
struct Q8 { uint16_t scale; int8_t values[32]; };

static float of_half(uint16_t half) { return std::ldexp(1.0f + (half & 1023) / 1024.0f, (half >> 10 & 31) - 15); }

static void to_float(const void * row, float * out, int64_t n) {
    const Q8 * blocks = static_cast<const Q8 *>(row);
    for (int64_t i = 0; i < n; ++i) {
        out[i] = of_half(blocks[i / 32].scale) * blocks[i / 32].values[i % 32];
    }
}

extern "C" size_t ggml_row_size(enum ggml_type type, int64_t n) {
    return static_cast<size_t>(type == GGML_TYPE_F32 ? 4 * n : n / 32 * 34);
}
extern "C" const struct ggml_type_traits * ggml_get_type_traits(enum ggml_type) {
    static ggml_type_traits traits{};
    traits.to_float = to_float;
    return &traits;
}

static std::mt19937 rng(1);
static float number() { return std::uniform_real_distribution<float>(-1, 1)(rng); }
static float rounded(float x) {   // to BF16, halves to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&x, &bits, 4);
    return x;
}
static int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Case { int64_t n_i, n_j, n_k; bool k_contiguous, quantised, added; };

static float * aligned(std::vector<float> & memory, size_t n) {
    memory.assign(n + 16, 0.0f);
    return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) / 4 % 16;
}

static std::vector<float> multiplied(const Kernel & kernel, const panels::Right & r, const std::vector<float> & left,
                                     const Case & c, const std::vector<float> & added) {
    panels::Right right = r;
    right.to_float = kernel.dequantizer(r.type);
    const int64_t k_pad = round_up(c.n_k, kernel.k_step), wide = round_up(c.n_i, 128), high = round_up(c.n_j, panels::tile_j);
    std::vector<float> rows, memory, buffer(static_cast<size_t>(16 * k_pad + 2 * wide + 64));
    float * l = aligned(rows, static_cast<size_t>(high * k_pad));
    std::vector<float> row(static_cast<size_t>(k_pad), 0.0f);
    for (int64_t j = 0; j < c.n_j; ++j) {
        std::memcpy(row.data(), &left[static_cast<size_t>(j * c.n_k)], static_cast<size_t>(c.n_k) * 4);
        char * to = reinterpret_cast<char *>(l) + j * k_pad * kernel.element;
        if (kernel.round) {
            kernel.round(row.data(), to, k_pad);
        }
    }
    for (int64_t j = 0, rows; !kernel.round && j < c.n_j; j += rows) {
        rows = panels::group_of(kernel.group, c.n_j - j);
        const float * together[panels::max_group];
        for (int64_t r = 0; r < rows; ++r) {
            together[r] = &left[static_cast<size_t>((j + r) * c.n_k)];
        }
        kernel.side_by_side(together, rows, c.n_k, l + j * c.n_k);
    }
    const size_t panel_bytes = static_cast<size_t>(kernel.panel_i * k_pad * kernel.element);
    char * panel = reinterpret_cast<char *>(aligned(memory, panel_bytes * static_cast<size_t>(wide / kernel.panel_i) / 4));
    std::vector<float> out(static_cast<size_t>(c.n_i * c.n_j), NAN);
#if TRIOLLAMA_HAS_TILES
    std::optional<TileScope> scope;
    if (&kernel == &panels::tile_panels) {
        constexpr TileShape whole = { 16, 64 }, all[] = { whole, whole, whole, whole, whole, whole, whole, whole };
        scope.emplace(all);
    }
#endif
    const int64_t unit = c.k_contiguous ? kernel.panel_i : c.n_i;
    for (int64_t first = 0; first < c.n_i; first += unit) {
        const int64_t n = std::min(unit, c.n_i - first);
        kernel.pack(right, first, n, panel, panel_bytes, buffer.data());
        for (int64_t p = 0; p < n; p += kernel.panel_i) {
            const panels::Sink sink = { reinterpret_cast<char *>(&out[static_cast<size_t>(first + p)]), static_cast<size_t>(4 * c.n_i),
                c.added ? reinterpret_cast<const char *>(&added[static_cast<size_t>(first + p)]) : nullptr, static_cast<size_t>(4 * c.n_i) };
            kernel.multiply(reinterpret_cast<char *>(l), static_cast<size_t>(k_pad * kernel.element), 0, c.n_j,
                            panel + static_cast<size_t>(p / kernel.panel_i) * panel_bytes, std::min(kernel.panel_i, n - p), c.n_k, sink);
        }
    }
    return out;
}

int main() {
    std::vector<const Kernel *> kernels;
#if TRIOLLAMA_X86_PANELS
    kernels = { &panels::avx2_panels, &panels::avx512_panels, &panels::dot_panels };
#if TRIOLLAMA_HAS_TILES
    kernels.push_back(&panels::tile_panels);
#endif
#endif
#if TRIOLLAMA_ARM_PANELS
    kernels = { &panels::neon_panels };
#endif
    long compared = 0, sets = 0;
    for (const Kernel * kernel : kernels) {
        sets += processor::has(kernel->needs);
    }
    for (int n = 0; n < 500; ++n) {
        const auto any = [](std::initializer_list<int64_t> of) { return of.begin()[rng() % of.size()]; };
        Case c{};
        c.k_contiguous = rng() % 2;
        c.quantised    = rng() % 2;
        c.added        = rng() % 2;
        c.n_k = any({ 1, 7, 16, 32, 33, 64, 96, 640 });
        c.n_i = any({ 1, 8, 15, 16, 17, 31, 32, 33, 64, 70, 96 });
        c.n_j = any({ 1, 3, 4, 8, 11, 12, 13, 29, 32, 33, 64 });
        int64_t & length = c.k_contiguous ? c.n_k : c.n_i, rows = c.k_contiguous ? c.n_i : c.n_k;
        if (c.quantised) {
            length = round_up(length, 32);
        }
        std::vector<float> left(static_cast<size_t>(c.n_j * c.n_k)), added(static_cast<size_t>(c.n_i * c.n_j));
        std::vector<float> plain(static_cast<size_t>(length * rows));
        for (auto * some : { &left, &added, &plain }) {
            for (float & x : *some) {
                x = number();
            }
        }
        std::vector<Q8> blocks(static_cast<size_t>(length * rows / 32 + 1));
        for (Q8 & block : blocks) {
            block.scale = static_cast<uint16_t>(12 << 10 | (rng() & 1023));
            for (int8_t & v : block.values) {
                v = static_cast<int8_t>(rng());
            }
        }
        panels::Right right{};
        right.type   = c.quantised ? GGML_TYPE_Q8_0 : GGML_TYPE_F32;
        right.data   = c.quantised ? reinterpret_cast<const char *>(blocks.data()) : reinterpret_cast<const char *>(plain.data());
        right.stride = ggml_row_size(right.type, length);
        right.k_contiguous = c.k_contiguous;
        right.n_i = c.n_i;
        right.n_k = c.n_k;
        if (c.quantised) {
            to_float(blocks.data(), plain.data(), length * rows);
        }
        const auto r = [&](int64_t i, int64_t k) {
            return plain[static_cast<size_t>(c.k_contiguous ? i * c.n_k + k : k * c.n_i + i)];
        };
        for (const Kernel * kernel : kernels) {
            if (!processor::has(kernel->needs)) {
                continue;
            }
            const std::vector<float> found = multiplied(*kernel, right, left, c, added);
            for (int64_t j = 0; j < c.n_j; ++j) {
                for (int64_t i = 0; i < c.n_i; ++i, ++compared) {
                    const size_t at = static_cast<size_t>(j * c.n_i + i);
                    float chain = 0;
                    double sum = 0, size = 0;
                    for (int64_t k = 0; k < c.n_k; ++k) {
                        const float a = left[static_cast<size_t>(j * c.n_k + k)];
                        chain = std::fma(a, r(i, k), chain);
                        const double both = static_cast<double>(rounded(a)) * rounded(r(i, k));
                        sum += both;
                        size += std::fabs(both);
                    }
                    const float more = c.added ? added[at] : 0.0f;
                    const bool right_one = kernel->round ? std::fabs(found[at] - (sum + more)) <= 1e-5 * (size + std::fabs(more)) + 1e-6
                                                         : c.added ? found[at] == chain + more : found[at] == chain;
                    if (!right_one) {
                        std::printf("case %d, lanes %d, element %d: %g where %g is right (i %d, j %d of %d %d %d; %d%d%d)\n", n,
                                    static_cast<int>(kernel->lanes), static_cast<int>(kernel->element), static_cast<double>(found[at]),
                                    kernel->round ? sum + more : static_cast<double>(chain + more), static_cast<int>(i),
                                    static_cast<int>(j), static_cast<int>(c.n_i), static_cast<int>(c.n_j), static_cast<int>(c.n_k),
                                    c.k_contiguous, c.quantised, c.added);
                        return 1;
                    }
                }
            }
        }
    }
    std::printf("%ld sets, %ld numbers\n", sets, compared);
    return sets == 0;
}
