// The state of one sequence as llama.cpp's bytes.
#pragma once

#include "llama.h"

#include <cstddef>
#include <cstdint>

namespace triollama::native {

// A sequence's state: how many bytes, and the bytes at `data` unless that is null. 0: llama.cpp failed. For an exact
// context it holds what a sliding window has passed, too, where llama.cpp leaves that out: so each cell comes back where it
// was, and sums are rounded in the same order. llama_state_seq_set_data reads both.
size_t sequence_state(llama_context * ctx, llama_seq_id sequence, bool exact, uint8_t * data, size_t size);

// Saves and loads a sequence of an exact context: its cells lie one after the other from the first on, and what comes next
// goes behind them. Throws broken_context.
void line_up(llama_context * ctx, llama_seq_id sequence);

}  // namespace triollama::native
