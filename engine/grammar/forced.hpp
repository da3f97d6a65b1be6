// What a grammar leaves no choice about, as tokens.
#pragma once

#include "llama.h"

#include <string>
#include <vector>

namespace triollama::native {

// The model's own tokens of bytes that have to follow; those at the end beyond which a token that may follow would go are left
// to be chosen. `reach`: for each byte, how far the longest token that may stand there goes.
std::vector<llama_token> cut_forced(const llama_vocab * vocab, const std::string & text, const std::vector<size_t> & reach);

}  // namespace triollama::native
