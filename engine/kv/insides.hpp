// What llama.cpp's public calls neither tell nor do: the one place that looks into llama_model and llama_context. The
// coupling is written down in docs/pin.md.
#pragma once

#include "ggml.h"
#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <string>

namespace triollama::native {

// Why this context's positions cannot be moved; empty if they can. Where llama.cpp says that they can, it may still assert,
// crash or rotate wrongly: it looks at neither the type of the keys nor at how they are scaled.
std::string why_no_shift(const llama_context * ctx, ggml_type type_k);

// Why a cache of these types cannot serve this model; empty if it can. With flash attention llama.cpp refuses it too;
// without, it computes with heads that all lie in one place.
std::string why_no_cache(const llama_model * model, ggml_type type_k, ggml_type type_v);

// llama.cpp only notes that positions move (seq_add) or that a separate cache is copied (seq_cp), and does it in the next
// llama_decode. In between a state pairs new positions with keys that were not rotated yet, and a decode that is stopped in
// the middle of the rotation rotates again the layers it had reached. This does it at once. It must not be stopped, so the
// context's abort callback is off meanwhile; `callback` is set afterwards. Throws broken_context.
void settle(llama_context * ctx, ggml_abort_callback callback, void * data);

// A sequence's state: how many bytes, and the bytes at `data` unless that is null. 0: llama.cpp failed. For an exact
// context it holds what a sliding window has passed, too, where llama.cpp leaves that out: so each cell comes back where it
// was, and sums are rounded in the same order. llama_state_seq_set_data reads both.
size_t sequence_state(llama_context * ctx, llama_seq_id sequence, bool exact, uint8_t * data, size_t size);

// Saves and loads a sequence of an exact context: its cells lie one after the other from the first on, and what comes next
// goes behind them. Throws broken_context.
void line_up(llama_context * ctx, llama_seq_id sequence);

}  // namespace triollama::native
