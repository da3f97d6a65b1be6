// Moved positions: whether a context's can be, and that they are at once.
#pragma once

#include "ggml.h"
#include "llama.h"

#include <string>

namespace triollama::native {

// Why this context's positions cannot be moved; empty if they can. Where llama.cpp says that they can, it may still assert,
// crash or rotate wrongly: it looks at neither the type of the keys nor at how they are scaled.
std::string why_no_shift(const llama_context * ctx, ggml_type type_k);

// llama.cpp only notes that positions move (seq_add) or that a separate cache is copied (seq_cp), and does it in the next
// llama_decode. In between a state pairs new positions with keys that were not rotated yet, and a decode that is stopped in
// the middle of the rotation rotates again the layers it had reached. This does it at once. It must not be stopped, so the
// context's abort callback is off meanwhile; `callback` is set afterwards. Throws broken_context.
void settle(llama_context * ctx, ggml_abort_callback callback, void * data);

}  // namespace triollama::native
