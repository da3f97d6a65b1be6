// What GGUF's blocks hold. The layouts are GGUF's (ggml-common.h); a type needs a reader here, and a row of `shapes`.
#include "kernels/types.hpp"

#include <algorithm>
#include <cstring>

namespace triollama::native::kernels {

// One block of one row.
struct Block {
    uint8_t  values[block];     // as whole numbers without a sign
    uint16_t scale, min;        // halves: of the block, or of `super` of them
    uint8_t  scales[2];         // bytes that they scale: of block and minimum, or of both halves
};

namespace {

uint16_t half_at(const uint8_t * at) {
    uint16_t half;
    std::memcpy(&half, at, sizeof(half));
    return half;
}

void split_nibbles(const uint8_t * packed, Block & to) {
    for (int i = 0; i < block / 2; ++i) {
        to.values[i]             = packed[i] & 15;
        to.values[i + block / 2] = packed[i] >> 4;
    }
}

// Eight bytes at a time, with no carry from one into the next.
constexpr uint64_t bytes_of(uint8_t byte) { return byte * 0x0101010101010101u; }

uint64_t eight_at(const uint8_t * at) {
    uint64_t eight;
    std::memcpy(&eight, at, sizeof(eight));
    return eight;
}

void store_eight(uint8_t * at, uint64_t eight) { std::memcpy(at, &eight, sizeof(eight)); }

void add_fifth_bits(const uint8_t * at, Block & to) {
    for (int i = 0; i < block / 8; ++i) {
        const uint64_t bits = bytes_of(at[i]) & 0x8040201008040201;                        // bit j in byte j
        const uint64_t fifth = (bits + bytes_of(0x7f)) >> 3 & bytes_of(16);                // 16, where there is one
        store_eight(to.values + 8 * i, eight_at(to.values + 8 * i) | fifth);
    }
}

// Blocks 2 i and 2 i + 1 of eight are the lower and the upper halves of 32 bytes.
void read_nibbles_of_pair(const uint8_t * packed, int64_t in_super, Block & to) {
    const uint8_t * at = packed + in_super / 2 * block;
    for (int i = 0; i < block; ++i) {
        to.values[i] = in_super % 2 ? at[i] >> 4 : at[i] & 15;
    }
}

// Twelve bytes hold six bits of scale and of minimum for eight blocks.
void read_six_bits(const uint8_t * at, int64_t j, Block & to) {
    if (j < 4) {
        to.scales[0] = at[j] & 63;
        to.scales[1] = at[j + 4] & 63;
    } else {
        to.scales[0] = static_cast<uint8_t>((at[j + 4] & 15) | at[j - 4] >> 6 << 4);
        to.scales[1] = static_cast<uint8_t>(at[j + 4] >> 4 | at[j] >> 6 << 4);
    }
}

}  // namespace

void read_q4_0(const uint8_t * row, int64_t b, Block & to) {
    const uint8_t * at = row + b * 18;
    to.scale = half_at(at);
    split_nibbles(at + 2, to);
}

void read_q4_1(const uint8_t * row, int64_t b, Block & to) {
    const uint8_t * at = row + b * 20;
    to.scale = half_at(at);
    to.min   = half_at(at + 2);
    split_nibbles(at + 4, to);
}

void read_q5_0(const uint8_t * row, int64_t b, Block & to) {
    const uint8_t * at = row + b * 22;
    to.scale = half_at(at);
    split_nibbles(at + 6, to);
    add_fifth_bits(at + 2, to);
}

void read_q5_1(const uint8_t * row, int64_t b, Block & to) {
    const uint8_t * at = row + b * 24;
    to.scale = half_at(at);
    to.min   = half_at(at + 2);
    split_nibbles(at + 8, to);
    add_fifth_bits(at + 4, to);
}

void read_q8_0(const uint8_t * row, int64_t b, Block & to) {
    const uint8_t * at = row + b * 34;
    to.scale = half_at(at);
    for (int i = 0; i < block; ++i) {
        to.values[i] = at[2 + i] ^ 128;
    }
}

void read_q4_k(const uint8_t * row, int64_t b, Block & to) {
    const uint8_t * at = row + b / super * 144;
    to.scale = half_at(at);
    to.min   = half_at(at + 2);
    read_six_bits(at + 4, b % super, to);
    read_nibbles_of_pair(at + 16, b % super, to);
}

void read_q5_k(const uint8_t * row, int64_t b, Block & to) {
    const uint8_t * at = row + b / super * 176;
    to.scale = half_at(at);
    to.min   = half_at(at + 2);
    read_six_bits(at + 4, b % super, to);
    read_nibbles_of_pair(at + 48, b % super, to);
    for (int i = 0; i < block; i += 8) {
        store_eight(to.values + i, eight_at(to.values + i) | (eight_at(at + 16 + i) >> b % super & bytes_of(1)) << 4);
    }
}

// 64 low bytes and 32 high ones for four blocks: of the low ones, blocks 0 and 1 have the lower halves.
void read_q6_k(const uint8_t * row, int64_t b, Block & to) {
    const uint8_t * at = row + b / super * 210;
    const int64_t four = b % super / 4, in_four = b % 4;
    const uint8_t * low = at + four * 64 + in_four % 2 * 32;
    const uint8_t * high = at + 128 + four * 32;
    for (int i = 0; i < block; i += 8) {
        const uint64_t nibbles = eight_at(low + i) >> in_four / 2 * 4 & bytes_of(15);
        store_eight(to.values + i, nibbles | (eight_at(high + i) >> 2 * in_four & bytes_of(3)) << 4);
    }
    to.scales[0] = at[192 + b % super * 2];
    to.scales[1] = at[192 + b % super * 2 + 1];
    to.scale = half_at(at + 208);
}

namespace {

uint32_t four_at(const uint8_t * at) {
    uint32_t four;
    std::memcpy(&four, at, sizeof(four));
    return four;
}

void store_four(uint8_t * at, uint32_t four) { std::memcpy(at, &four, sizeof(four)); }

// Where a block's scales begin, and those that it shares.
struct ScalePlace {
    size_t shared, own;
};

ScalePlace place_of(Shape s, int64_t n_blocks, int64_t b) {
    const size_t base = static_cast<size_t>(n_blocks) * plane_bytes(s);
    if (!is_super(s)) {
        const size_t at = base + static_cast<size_t>(b) * scale_bytes(s);
        return { at, at };
    }
    const size_t shared = base + static_cast<size_t>(b / super) * scale_bytes(s);
    return { shared, shared + (has_min(s) ? 64 : 32) + static_cast<size_t>(b % super) * 32 };
}

void pack_floats(const uint8_t * row, int64_t n, uint8_t * to) {
    for (int64_t k = 0; k < n; ++k) {
        std::memcpy(to + static_cast<size_t>(k) * panel_rows * 2, row + 2 * k, 2);
    }
}

void read_floats(Type type, const uint8_t * from, int64_t n, float * out) {
    for (int64_t k = 0; k < n; ++k) {
        const uint16_t bits = half_at(from + static_cast<size_t>(k) * panel_rows * 2);
        out[k] = shapes[type].of == GGML_TYPE_F16 ? ggml_fp16_to_fp32(bits) : ggml_bf16_to_fp32({ bits });
    }
}

}  // namespace

Type type_of(ggml_type type) {
    Type t = 0;
    while (t < n_types && shapes[t].of != type) {
        ++t;
    }
    return t;
}

void pack_panel(Type type, const uint8_t * rows, size_t row_bytes, int64_t first, int64_t n, int64_t n_blocks, uint8_t * panel) {
    const Shape s = shapes[type];
    std::memset(panel, 0, panel_bytes(s, n_blocks));
    const int last = static_cast<int>(std::min<int64_t>(panel_rows, n - first));
    for (int r = 0; r < last; ++r) {
        const uint8_t * row = rows + static_cast<size_t>(first + r) * row_bytes;
        if (is_float(s)) {
            pack_floats(row, n_blocks * block, panel + 2 * r);
            continue;
        }
        for (int64_t b = 0; b < n_blocks; ++b) {
            Block from{};
            s.read(row, b, from);
            uint8_t * planes = panel + static_cast<size_t>(b) * plane_bytes(s) + 4 * r;
            for (int v = 0; v < (s.low == 8 ? groups : 4); ++v) {
                const uint32_t x = four_at(from.values + 4 * v);
                store_four(planes + 64 * v,
                           s.low == 8 ? x : (x & 0x0f0f0f0f) | (four_at(from.values + 4 * (v + 4)) & 0x0f0f0f0f) << 4);
            }
            for (int h = 0; h < s.high; ++h) {
                uint32_t bits = 0;
                const int of_vector = groups / s.high, mask = s.high == 1 ? 0x01010101 : 0x03030303;
                for (int g = 0; g < of_vector; ++g) {
                    bits |= (four_at(from.values + 4 * (h * of_vector + g)) >> 4 & static_cast<uint32_t>(mask)) << g * s.high;
                }
                store_four(planes + 64 * (4 + h), bits);
            }
            const ScalePlace place = place_of(s, n_blocks, b);
            std::memcpy(panel + place.shared + 2 * r, &from.scale, 2);
            if (has_min(s)) {
                std::memcpy(panel + place.shared + 32 + 2 * r, &from.min, 2);
            }
            if (is_super(s)) {
                panel[place.own + r]      = from.scales[0];
                panel[place.own + 16 + r] = from.scales[1];
            }
        }
    }
}

void read_row(Type type, const uint8_t * panel, int64_t n_blocks, int row, float * out) {
    const Shape s = shapes[type];
    if (is_float(s)) {
        read_floats(type, panel + 2 * row, n_blocks * block, out);
        return;
    }
    const auto half = [&](size_t at) { return ggml_fp16_to_fp32(half_at(panel + at)); };
    for (int64_t b = 0; b < n_blocks; ++b, out += block) {
        const uint8_t * planes = panel + static_cast<size_t>(b) * plane_bytes(s) + 4 * row;
        const ScalePlace place = place_of(s, n_blocks, b);
        float scales[2] = { half(place.shared + 2 * row), 0 }, min = 0;
        scales[1] = scales[0];
        if (has_halves(s)) {
            scales[0] *= static_cast<int8_t>(panel[place.own + row]);
            scales[1] *= static_cast<int8_t>(panel[place.own + 16 + row]);
        }
        if (has_min(s)) {
            min = half(place.shared + 32 + 2 * row);
            if (is_super(s)) {
                scales[0] = scales[1] = scales[0] * panel[place.own + row];
                min = -(min * panel[place.own + 16 + row]);
            }
        }
        for (int i = 0; i < block; ++i) {
            const int g = i / 4, lane = i % 4;
            int value = s.low == 8 ? planes[64 * g + lane] : planes[64 * (g % 4) + lane] >> g / 4 * 4 & 15;
            if (s.high) {
                const int of_vector = groups / s.high;
                value |= (planes[64 * (4 + g / of_vector) + lane] >> g % of_vector * s.high & ((1 << s.high) - 1)) << 4;
            }
            value = (s.table ? iq4_values[value] : value) - s.zero;
            out[i] = scales[i / 16] * static_cast<float>(value) + min;
        }
    }
}

}  // namespace triollama::native::kernels
