// The vocabulary as a tree: a token's parent is the longest other token that its text begins with.
#pragma once

#include "llama.h"

#include <vector>

namespace triollama {

// What rejects a text rejects everything that begins with it. So whoever tests all tokens tests the roots, and
// descends only where a test succeeds: hundreds of tests instead of hundreds of thousands.
class TokenTree {
public:
    explicit TokenTree(const llama_vocab * vocab);      // tens of milliseconds for a large vocabulary

    const std::vector<llama_token> & roots() const { return roots_; }

    // Appends the children of a token.
    void add_children(llama_token token, std::vector<llama_token> & out) const {
        out.insert(out.end(), children.begin() + first[(size_t) token], children.begin() + first[(size_t) token + 1]);
    }

private:
    std::vector<llama_token> roots_;
    std::vector<llama_token> children;      // of token 0, of token 1, ...
    std::vector<int32_t> first;             // where each token's begin
};

}  // namespace triollama
