#include "grammar/token_tree.hpp"

#include "text/text.hpp"

#include <algorithm>
#include <cstring>
#include <string>

namespace triollama {

namespace {

// A token's text within one long string; its first bytes as a number that orders as they do.
struct Piece {
    uint64_t    head;
    uint32_t    start;
    uint32_t    size;
    llama_token token;
};

}  // namespace

TokenTree::TokenTree(const llama_vocab * vocab) {
    const auto n = (size_t) llama_vocab_n_tokens(vocab);
    std::string text;
    std::vector<Piece> pieces;
    pieces.reserve(n);
    for (size_t token = 0; token < n; ++token) {
        const size_t start = text.size();
        append_piece(vocab, (llama_token) token, true, text);
        const size_t size = text.size() - start;
        uint64_t head = 0;
        for (size_t i = 0; i < 8; ++i) {
            head = head << 8 | (i < size ? (unsigned char) text[start + i] : 0u);
        }
        pieces.push_back({ head, (uint32_t) start, (uint32_t) size, (llama_token) token });
    }
    std::sort(pieces.begin(), pieces.end(), [&](const Piece & a, const Piece & b) {
        if (a.head != b.head) {
            return a.head < b.head;
        }
        const int order = std::memcmp(text.data() + a.start, text.data() + b.start, std::min(a.size, b.size));
        return order != 0 ? order < 0 : a.size != b.size ? a.size < b.size : a.token < b.token;
    });

    // In this order a text comes right after those that begin it: the open ones form a stack.
    std::vector<llama_token> parent(n, LLAMA_TOKEN_NULL);
    std::vector<const Piece *> open;
    for (const Piece & piece : pieces) {
        while (!open.empty() && (open.back()->size > piece.size ||
               std::memcmp(text.data() + open.back()->start, text.data() + piece.start, open.back()->size) != 0)) {
            open.pop_back();
        }
        // End-of-generation tokens are not matched by their text, and what has none begins everything.
        const bool by_text = piece.size > 0 && !llama_vocab_is_eog(vocab, piece.token);
        if (by_text && !open.empty()) {
            parent[(size_t) piece.token] = open.back()->token;
        } else {
            roots_.push_back(piece.token);
        }
        if (by_text) {
            open.push_back(&piece);
        }
    }

    first.assign(n + 1, 0);
    for (size_t token = 0; token < n; ++token) {
        if (parent[token] != LLAMA_TOKEN_NULL) {
            ++first[(size_t) parent[token] + 1];
        }
    }
    for (size_t token = 0; token < n; ++token) {
        first[token + 1] += first[token];
    }
    children.resize((size_t) first[n]);
    std::vector<int32_t> next(first.begin(), first.end() - 1);
    for (size_t token = 0; token < n; ++token) {
        if (parent[token] != LLAMA_TOKEN_NULL) {
            children[(size_t) next[(size_t) parent[token]]++] = (llama_token) token;
        }
    }
}

}  // namespace triollama
