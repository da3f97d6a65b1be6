// Matrix tiles for several rows: a panel is unpacked once for all of them, then up to 16 at a time meet a block of it in one
// instruction, and what comes out is scaled as everywhere. Fewer rows go the way of AVX-512, and so do weights that are
// floats: tiles of BF16 would round activations, and add up in an order of their own.
#include "kernels/sets.hpp"
#include "kernels/tiles.hpp"

#if TRIOLLAMA_X86_KERNELS
#include "kernels/avx512.hpp"
#include "kernels/multiply.hpp"

namespace triollama::native::kernels {
namespace {

// An unpacked panel: blocks of 16 x 32 signed bytes, then for each block its scales as floats, and minima or the
// scales of its second half.
template <Type T> void unpack_panel(const uint8_t * panel, int64_t n_blocks, uint8_t * to) {
    constexpr Shape s = shapes[T];
    const __m512i zero = _mm512_set1_epi8(static_cast<char>(s.zero));
    float * scales = reinterpret_cast<float *>(to + n_blocks * block * panel_rows);
    Scaler<Avx512, T> scaler(panel + static_cast<size_t>(n_blocks) * plane_bytes(s), 0);
    for (int64_t b = 0; b < n_blocks; ++b, panel += plane_bytes(s), to += block * panel_rows, scales += 2 * panel_rows) {
        __m512i w[groups];
        unpack<Avx512, T>(panel, w);
#pragma GCC unroll 8
        for (int g = 0; g < groups; ++g) {
            _mm512_storeu_si512(to + 64 * g, s.zero ? _mm512_sub_epi8(w[g], zero) : w[g]);
        }
        scaler.next(b);
        _mm512_storeu_ps(scales, scaler.scale);
        if constexpr (has_min(s) || has_halves(s)) {
            _mm512_storeu_ps(scales + panel_rows, scaler.other);
        }
    }
}

constexpr int in_flight = 4;   // products on their way

// `next`: the panel to come, if it has to be fetched.
template <Type T, int R>
void multiply_tile(const uint8_t * panel, int64_t n_blocks, const uint8_t * a, uint8_t * products, const Row * rows, int64_t n_rows,
                   int64_t first, int n, const uint8_t * next) {
    constexpr Shape s = shapes[T];
    constexpr int parts = has_halves(s) ? 2 : 1;   // of a block, scaled by themselves
    constexpr size_t a_bytes = tile_bytes(s, R);
    const float * scales = reinterpret_cast<const float *>(panel + n_blocks * block * panel_rows);
    __m512 sum[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        sum[r] = _mm512_setzero_ps();
    }
    const int64_t steps = n_blocks * parts;
    const auto start = [&](int64_t at) {
        const uint8_t * left  = a + static_cast<size_t>(at / parts) * a_bytes + (at % parts) * (block / parts);
        const uint8_t * right = panel + at * (block * panel_rows / parts);
        uint8_t * product = products + at % in_flight * 1024;
        switch (at % 2) {   // two sets of tiles, so that one may be filled beside the other
            case 0:
                TILE_ZERO(0);
                TILE_LOAD(2, left, block);
                TILE_LOAD(3, right, 64);
                TILE_MULTIPLY_INT8(0, 2, 3);
                TILE_STORE(0, product, 64);
                break;
            default:
                TILE_ZERO(1);
                TILE_LOAD(4, left, block);
                TILE_LOAD(5, right, 64);
                TILE_MULTIPLY_INT8(1, 4, 5);
                TILE_STORE(1, product, 64);
        }
    };
    constexpr int ahead = in_flight - 2;
    for (int64_t at = 0; at < ahead && at < steps; ++at) {
        start(at);
    }
    for (int64_t at = 0; at < steps; ++at) {
        if (at + ahead < steps) {
            start(at + ahead);
        }
        const int64_t b = at / parts;
        if (next && at % parts == 0) {
            fetch_ahead<T>(next, b);
        }
        const float * of_rows = reinterpret_cast<const float *>(a + static_cast<size_t>(b) * a_bytes + R * block);
        const uint8_t * product = products + at % in_flight * 1024;
        const __m512 scale = _mm512_loadu_ps(scales + 2 * panel_rows * b + (at % parts) * panel_rows);
        const __m512 minimum = has_min(s) ? _mm512_loadu_ps(scales + 2 * panel_rows * b + panel_rows) : _mm512_setzero_ps();
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const __m512 whole = _mm512_cvtepi32_ps(_mm512_loadu_si512(product + 64 * r));
            sum[r] = _mm512_fmadd_ps(whole, _mm512_mul_ps(scale, _mm512_set1_ps(of_rows[r])), sum[r]);
            if constexpr (has_min(s)) {
                sum[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(of_rows[R + r]), sum[r]);
            }
        }
    }
    const __mmask16 mask = static_cast<__mmask16>((1 << n) - 1);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        if (r < n_rows) {
            _mm512_mask_storeu_ps(rows[r].out + first, mask, sum[r]);
        }
    }
}

template <Type T, int R>
void multiply_by_tiles(const uint8_t * panels, int64_t n_blocks, const uint8_t * tiles, const Row * rows, int64_t n_rows, int64_t first,
                    int64_t last, uint8_t * scratch) {
    constexpr Shape s = shapes[T];
    uint8_t * products = scratch;
    uint8_t * unpacked = scratch + in_flight * 1024;
    constexpr int k_bytes = has_halves(s) ? block / 2 : block;
    const TileScope scope({ { R, 64 }, { R, 64 }, { R, k_bytes }, { k_bytes / 4, 64 }, { R, k_bytes }, { k_bytes / 4, 64 } });
    for (; first < last; first += panel_rows, panels += panel_bytes(s, n_blocks)) {
        unpack_panel<T>(panels, n_blocks, unpacked);
        const int n = static_cast<int>(last - first < panel_rows ? last - first : panel_rows);
        const uint8_t * tile = tiles;
        const uint8_t * next = n_rows <= R ? panels + panel_bytes(s, n_blocks) : nullptr;
        for (int64_t at = 0; at < n_rows; at += R, tile += static_cast<size_t>(n_blocks) * tile_bytes(s, R)) {
            multiply_tile<T, R>(unpacked, n_blocks, tile, products, rows + at, n_rows - at, first, n, next);
        }
    }
}

template <int T = 0> constexpr void fill_tiles(Kernel & kernel) {
    if constexpr (T < n_types) {
        if constexpr (!is_float(shapes[T])) {
            kernel.multiply[T][3] = multiply_by_tiles<Type(T), 8>;
            kernel.multiply[T][4] = multiply_by_tiles<Type(T), 16>;
            kernel.whole_tiles[T] = true;
        }
        fill_tiles<T + 1>(kernel);
    }
}

constexpr Kernel with_tiles() {
    Kernel made = { "amx", processor::tiles | avx512_needs, nullptr, {}, {}, {} };
    fill_tiles(made);
    return made;
}

}  // namespace

constexpr Kernel amx_tiles = with_tiles();

}  // namespace triollama::native::kernels
#endif
