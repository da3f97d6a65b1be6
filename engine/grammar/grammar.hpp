// A grammar's state along one generated text. Owns llama.cpp's matcher, and never lets it reach an abort.
#pragma once

#include "grammar/gbnf.hpp"
#include "grammar/token_tree.hpp"

#include "llama.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace triollama {

struct GrammarParams {
    std::string text;                                   // GBNF; empty: no grammar
    std::string root = "root";
    bool        lazy = false;                           // free text until a trigger appears
    std::vector<std::string> trigger_patterns;          // regular expressions (ECMAScript); only if lazy
    std::vector<llama_token> trigger_tokens;

    bool operator==(const GrammarParams & other) const;
    bool operator!=(const GrammarParams & other) const { return !(*this == other); }
    uint64_t hash() const;
};

class Grammar {
public:
    Grammar(const llama_vocab * vocab, GrammarParams params);       // throws grammar_error
    Grammar(const Grammar & other);
    Grammar & operator=(const Grammar &) = delete;
    ~Grammar();

    bool allows(llama_token token) const;

    // Gives tokens that may not follow a logit of -inf.
    void mask(std::vector<llama_token_data> & tokens) const;

    // All tokens that may follow.
    std::vector<llama_token> allowed() const;

    // Throws grammar_error, and changes nothing, if the token may not follow.
    void accept(llama_token token);

    // Whether nothing but the end of generation may follow.
    bool is_done() const;

    const GrammarParams & params() const { return params_; }
    const std::vector<llama_token> & accepted() const { return accepted_; }

private:
    const llama_vocab * vocab;
    GrammarParams params_;
    GrammarFacts facts;
    llama_sampler * matcher;
    std::vector<llama_token> accepted_;
    bool broken = false;            // the matcher threw: it must not be touched again
    // With named tokens the matcher's check passes tokens that it then cannot take: those found at this place.
    mutable std::vector<llama_token> refused;
    mutable std::shared_ptr<const TokenTree> tree;      // made when first needed; shared by copies

    void check_usable() const;
    const TokenTree & token_tree() const;
};

}  // namespace triollama
