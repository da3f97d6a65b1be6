// What a text must match, as data.
#pragma once

#include "llama.h"

#include <cstdint>
#include <string>
#include <vector>

namespace triollama::native {

// Thoughts before the text that a grammar rules: from `open` to `close`, in which special tokens count by their names.
struct ThoughtParams {
    enum Start : int32_t {
        none,               // no thoughts
        inside,             // the prompt opened them
        free,               // the text may open them, after whitespace at most
        forced,             // it begins with open_tokens
    };
    Start       start = none;
    std::string open;
    std::string close;
    std::vector<llama_token> open_tokens;
    std::vector<llama_token> close_tokens;      // what is said after max_tokens
    int32_t     max_tokens = -1;                // below 0: without a limit

    bool operator==(const ThoughtParams & other) const {
        return start == other.start && open == other.open && close == other.close && max_tokens == other.max_tokens &&
               open_tokens == other.open_tokens && close_tokens == other.close_tokens;
    }
};

struct GrammarParams {
    enum Syntax : int32_t { gbnf, lark, json_schema, regex };

    std::string text;                                   // empty: no grammar
    Syntax      syntax = gbnf;                          // all others are llguidance's
    std::string root = "root";                          // only gbnf
    bool        special = false;                        // special tokens have text: their names; only gbnf
    bool        lazy = false;                           // free text until a trigger appears; only gbnf
    std::vector<std::string> trigger_patterns;          // regular expressions (ECMAScript); only if lazy
    std::vector<llama_token> trigger_tokens;
    ThoughtParams thought;

    bool empty() const { return text.empty() && thought.start == ThoughtParams::none; }
    bool operator==(const GrammarParams & other) const;
    bool operator!=(const GrammarParams & other) const { return !(*this == other); }
    uint64_t hash() const;
};

}  // namespace triollama::native
