// The text of a token: the one that is shown, that a grammar matches and that stop strings are found in. And the texts of a
// vocabulary in order, for whoever tests all of them.
#pragma once

#include "llama.h"

#include <cstdint>
#include <string>
#include <vector>

namespace triollama::native {

// Appends the bytes of one token. Special tokens give text only if `special`.
void append_piece(const llama_vocab * vocab, llama_token token, bool special, std::string & out);

// Tokens that end a generation, and those without text, are left out. In this order those that begin alike stand together: what
// a beginning leads to is found once, and what it rejects is passed over.
class TokenTexts {
public:
    TokenTexts(const llama_vocab * vocab, bool special);        // tens of milliseconds for a large vocabulary

    // Calls `accept(token)` for each token along whose text `step` leads from `start` to what is not `nothing`.
    template <typename State, typename Step, typename Accept>
    void walk(State start, State nothing, const Step & step, const Accept & accept) const {
        std::vector<State> states = { start };      // after 0, 1, ... bytes of the text
        for (const Text & text : texts) {
            if (text.shared + 1 < states.size()) {
                states.resize(text.shared + 1);
            }
            if (states.back() == nothing) {
                continue;                           // it begins with what was rejected
            }
            while (states.size() <= text.size && states.back() != nothing) {
                states.push_back(step(states.back(), (unsigned char) bytes[text.begin + states.size() - 1]));
            }
            if (states.back() != nothing) {
                accept(text.token);
            }
        }
    }

private:
    struct Text {
        uint32_t    begin;
        uint32_t    size;
        uint32_t    shared;         // with the text before it
        llama_token token;
    };
    std::string bytes;
    std::vector<Text> texts;
};

}  // namespace triollama::native
