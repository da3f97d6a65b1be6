// Checks a GBNF grammar before llama.cpp sees it: what would abort, overflow or hang there is refused here.
#pragma once

#include "llama.h"

#include <string>

namespace triollama {

struct GrammarFacts {
    bool names_tokens = false;      // has <token> or !<token>: then more matters than the text of a token
};

// Throws grammar_error, saying what is wrong and where: syntax, a rule that is missing, left recursion, or a size
// (nesting, repetition, ambiguity) that llama.cpp's own parser and matcher would not survive.
GrammarFacts check_gbnf(const llama_vocab * vocab, const std::string & grammar, const std::string & root);

}  // namespace triollama
