// Products that round each row alone, so that a sequence's numbers do not depend on how many rows share its step.
//
// ggml's CPU backend takes other kernels, which add up in another order, where many rows meet one matrix: llamafile's
// products and the tiled ones. Contexts that ask for it carry ggml's own mark for reference computations (use_ref), which
// turns off fused operations, tiled products and tiled attention. llamafile's products do not look at it, so the linker
// leads their calls through here, where a single row is theirs, too. Weights that were rearranged when the model was loaded
// have such kernels, but for AMX: its matrix tiles add up the integers of a block, and the floats of a row block by block,
// as its kernel for one row does. docs/kv.md has the rules, docs/pin.md the coupling.
#pragma once

#include "llama.h"

#include <string>

namespace triollama::native {

// While it lives, weights of models that this thread loads are rearranged for AMX or not at all.
class ExactWeights {
public:
    explicit ExactWeights(llama_model_params & params);
    ~ExactWeights();
    ExactWeights(const ExactWeights &) = delete;
    ExactWeights & operator=(const ExactWeights &) = delete;
};

// Why this context cannot compute so; empty if it does from now on.
std::string make_exact(llama_context * ctx);

bool has_flash_attention(const llama_context * ctx);

// How the model's weights are rearranged: "AMX" and the like, more than one joined by "+"; empty if they are not.
std::string rearranged(const llama_model * model);

}  // namespace triollama::native
