// Products that round each row alone, so that a sequence's numbers do not depend on how many rows share its step.
//
// ggml's CPU backend takes other kernels, which add up in another order, where many rows meet one matrix: llamafile's
// products and the tiled ones. Contexts that ask for it do without. They carry ggml's own mark for reference computations
// (use_ref), which also turns off fused operations and tiled attention; the two kernels do not look at it, so the linker
// leads their calls through here. docs/kv.md has the rules, docs/pin.md the coupling.
#pragma once

#include "llama.h"

#include <string>

namespace triollama::native {

// Why this context cannot compute so; empty if it does from now on.
std::string make_exact(llama_context * ctx);

}  // namespace triollama::native
