// From GGUF's rows to panels and back: see kernels/layout.hpp.
#pragma once

#include "kernels/layout.hpp"

#include <cstdint>

namespace triollama::native::kernels {

// The type that panels of this type of ggml's have, or n_types.
Type type_of(ggml_type type);

// Rows [first, first + 16) of `n` from GGUF's, `row_bytes` apart; rows beyond the last are zero.
void pack_panel(Type type, const uint8_t * rows, size_t row_bytes, int64_t first, int64_t n, int64_t n_blocks, uint8_t * panel);

// Row `row` of a panel as floats.
void read_row(Type type, const uint8_t * panel, int64_t n_blocks, int row, float * out);

}  // namespace triollama::native::kernels
