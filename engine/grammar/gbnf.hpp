// Reads GBNF, llama.cpp's notation for grammars, into rules over bytes and tokens.
#pragma once

#include "llama.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace triollama::native {

// A set of characters as an automaton over the bytes of their UTF-8. Node 0 is the end of a character.
struct ByteRange {
    unsigned char low;
    unsigned char high;
    uint32_t      next;
};
using ByteNode = std::vector<ByteRange>;

struct Element {
    enum Kind : uint32_t {
        end,            // of a sequence
        bytes,          // one character of the set that begins at node `value`
        token,          // the token `value`, whatever its text
        other_token,    // any token but `value`
        rule,
    };
    Kind     kind;
    uint32_t value;
};

// What a grammar allows, free of what can match no text. Positions are indices into `code`; position 0 is the end of the text.
struct Rules {
    struct Rule {
        uint32_t first;         // its alternates begin at starts[first] .. starts[first + count - 1]
        uint32_t count;
        uint32_t rank;          // higher than that of every rule that can begin with it
        bool     nullable;
    };
    std::vector<Element>  code;
    std::vector<uint32_t> starts;
    std::vector<Rule>     rules;
    std::vector<uint32_t> by_rank;
    std::vector<ByteNode> nodes;
    uint32_t root = 0;
};

// Throws grammar_error, saying what is wrong and where: syntax, a rule that is missing or begins with itself, a grammar that
// matches no text or is too large.
std::shared_ptr<const Rules> read_gbnf(const llama_vocab * vocab, const std::string & grammar, const std::string & root);

}  // namespace triollama::native
