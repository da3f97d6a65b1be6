// Text to tokens, however long the text is.
#pragma once

#include "llama.h"

#include <cstddef>
#include <vector>

namespace triollama {

// The most bytes that one match of a pre-tokenizer's regular expression can span, from above: three times the longest run
// of characters that are all white space, all letters, all digits or all others. Non-ASCII may be any but ASCII white space.
size_t longest_match(const char * text, size_t n);

// llama_tokenize into a vector. Many BPE vocabularies are split by std::regex, which recurses once for each character of a
// match, so a long word would overflow the stack: such text is split on a thread with a stack of the size it may need.
// Throws std::length_error where the machine has no memory for that.
std::vector<llama_token> tokenize(const llama_vocab * vocab, const char * text, int32_t n, bool add_special,
                                  bool parse_special);

}  // namespace triollama
