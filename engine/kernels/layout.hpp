// How weights lie in memory for our kernels, and activations beside them.
//
// A panel is 16 rows of weights, cut along k into blocks of 32 values. A block of a panel is eight groups of four values
// of k: for each row four bytes, so that one instruction multiplies a group of 16 rows with four activations. Of each
// value four bits (or all eight) lie in the low plane: byte 4 r + i of its vector v holds values 4 v + i of row r and, in
// the upper half, 16 + 4 v + i. The bits above lie in high planes of one or two bits each. All planes of a panel come
// first, then its scales. Of weights that are floats of 16 bits a block is, for each of its values of k, those of the 16
// rows beside each other.
//
// A product's bits are fixed here, for any number of rows and threads and every instruction set. With w unsigned and a
// signed whole numbers, for each block in order of k:
//     n   = sum of w a, minus zero times sum of a, exact
//     sum = fma(n, scale of weights * scale of activations, sum)
// for each half of a block by itself where those have scales of their own; then, where there are minima,
//     sum = fma(minimum, scale of activations * sum of a, sum).
// Weights that are floats meet activations as they are, and for each k in order
//     sum = fma(w, a, sum).
#pragma once

#include "kernels/attention.hpp"

#include "ggml.h"

#include <cstddef>
#include <cstdint>

namespace triollama::native::kernels {

constexpr int panel_rows = 16;   // of weights
constexpr int block      = 32;   // values of k
constexpr int groups     = 8;    // of four values in a block
constexpr int tile_rows  = 16;   // of activations
constexpr int super      = 8;    // blocks that share a scale of scales

enum class Scales : uint8_t {
    half,         // a half a block
    half_min,     // a half, and a half for the minimum
    super_min,    // halves for scale and minimum of 8 blocks, and for each block bytes that they scale
    super_halves, // a half for 8 blocks, and for each half of a block a signed byte
    none,         // values are floats themselves
};

// Reads block b of one of GGUF's rows (types.cpp).
struct Block;
using Reader = void(const uint8_t * row, int64_t b, Block & to);
Reader read_q4_0, read_q4_1, read_q5_0, read_q5_1, read_q8_0, read_q4_k, read_q5_k, read_q6_k;

struct Shape {
    ggml_type of;
    Reader *  read;      // null: values are floats themselves
    uint8_t   low, high; // bits of a value in the low plane and in the high ones; 16: floats
    Scales    scales;
    uint8_t   zero;      // what stands for 0
    bool      table;     // four bits choose a value from iq4_values
};

// A row for each type: all that there is to say of it, besides its reader.
constexpr Shape shapes[] = {
    { GGML_TYPE_Q4_0, read_q4_0, 4, 0, Scales::half, 8, false },
    { GGML_TYPE_Q4_1, read_q4_1, 4, 0, Scales::half_min, 0, false },
    { GGML_TYPE_Q5_0, read_q5_0, 4, 1, Scales::half, 16, false },
    { GGML_TYPE_Q5_1, read_q5_1, 4, 1, Scales::half_min, 0, false },
    { GGML_TYPE_Q8_0, read_q8_0, 8, 0, Scales::half, 128, false },
    { GGML_TYPE_Q4_K, read_q4_k, 4, 0, Scales::super_min, 0, false },
    { GGML_TYPE_Q5_K, read_q5_k, 4, 1, Scales::super_min, 0, false },
    { GGML_TYPE_Q6_K, read_q6_k, 4, 2, Scales::super_halves, 32, false },
    { GGML_TYPE_IQ4_NL, read_q4_0, 4, 0, Scales::half, 128, true },
    { GGML_TYPE_F16, nullptr, 16, 0, Scales::none, 0, false },
    { GGML_TYPE_BF16, nullptr, 16, 0, Scales::none, 0, false },
};

using Type = uint8_t;   // a row of these
constexpr Type n_types = sizeof(shapes) / sizeof(shapes[0]);

// The values of IQ4_NL, plus 128.
constexpr uint8_t iq4_values[16] = { 1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241 };

// Files that are compiled for an instruction set share these with all others: none may leave its file, since the linker
// would take any of them for all.
namespace {

constexpr bool has_min(Shape s) { return s.scales == Scales::half_min || s.scales == Scales::super_min; }
constexpr bool has_halves(Shape s) { return s.scales == Scales::super_halves; }
constexpr bool is_super(Shape s) { return s.scales == Scales::super_min || s.scales == Scales::super_halves; }
constexpr bool is_float(Shape s) { return s.low == 16; }
constexpr bool is_wide(Shape s) { return s.low == 8 || s.table; }   // values beyond 63

// What kernels can do.
constexpr bool is_possible(Shape s) {
    if (is_float(s)) {
        return s.high == 0 && s.scales == Scales::none;
    }
    const bool planes = s.low == 8 ? !s.high && !s.table : s.low == 4 && s.high <= 2 && !(s.high && s.table);
    return planes && s.scales != Scales::none && (has_min(s) ? s.zero == 0 && !is_wide(s) : !is_wide(s) || s.zero == 128);
}

constexpr bool all_are_possible() {
    for (Shape s : shapes) {
        if (!is_possible(s)) {
            return false;
        }
    }
    return true;
}
static_assert(all_are_possible(), "a row of shapes that no kernel can do");

constexpr size_t plane_bytes(Shape s) { return static_cast<size_t>(s.low + s.high) * block * panel_rows / 8; }

// Of one block, or of `super` of them with what they share in front.
constexpr size_t scale_bytes(Shape s) {
    switch (s.scales) {
        case Scales::half: return 32;
        case Scales::half_min: return 64;
        case Scales::super_min: return 64 + 8 * 32;
        case Scales::super_halves: return 32 + 8 * 32;
        default: return 0;
    }
}

constexpr size_t panel_bytes(Shape s, int64_t n_blocks) {
    const size_t n = static_cast<size_t>(n_blocks), all = n * plane_bytes(s) + (is_super(s) ? n / super : n) * scale_bytes(s);
    return (all + 63) / 64 * 64;
}

// What a block takes in all.
constexpr size_t block_bytes(Shape s) { return plane_bytes(s) + scale_bytes(s) / (is_super(s) ? super : 1); }

// A tile is `rows` rows of activations in 8 bits, block by block: their values, row by row; their scales (float); and
// what is added for each: minus zero times their sum (int32), or their sum times their scale (float), one for each half
// of a block where halves have scales. For weights that are floats, activations are what they were, block by block.
constexpr size_t tile_bytes(Shape s, int rows) {
    return static_cast<size_t>(rows) * (is_float(s) ? block * sizeof(float) : block + (has_halves(s) ? 12 : 8));
}

constexpr size_t scratch_bytes(Shape s, int64_t n_blocks) {
    return is_float(s) ? 0 : static_cast<size_t>(n_blocks) * (panel_rows * block + 128) + 8192;
}

// Numbers of rows that kernels are made for; in between, rows of zeros fill up.
constexpr int sizes[]  = { 1, 2, 4, 8, 16 };
constexpr int n_sizes  = 5;
constexpr int size_index(int64_t rows) { return rows > 8 ? 4 : rows > 4 ? 3 : rows > 2 ? 2 : rows > 1 ? 1 : 0; }

}  // namespace

// A row of activations, and where its products go.
struct Row {
    const float * x;
    float *       out;
};

// Panels behind one another with tiles of one of `sizes` behind one another: columns [first, last), of which all but the last
// panel's are whole. `scratch` has room for scratch_bytes.
using Multiply = void (*)(const uint8_t * panels, int64_t n_blocks, const uint8_t * tiles, const Row * rows, int64_t n_rows,
                          int64_t first, int64_t last, uint8_t * scratch);

// What an instruction set gives. All fill and read the same layouts, and round alike.
struct Kernel {
    const char * name;
    unsigned     needs;          // of processor.hpp
    // 32 values to whole numbers in [-127, 127] and their scale; sums of both halves.
    void (*quantize)(const float * x, int8_t * q, float * scale, int32_t sums[2]);
    Multiply multiply[n_types][n_sizes];
    bool whole_tiles[n_types];   // it wants more rows than a tile has in whole ones, which zeros fill up
    Attend attend;
};

}  // namespace triollama::native::kernels
