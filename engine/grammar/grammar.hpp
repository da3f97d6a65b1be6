// A grammar's state along one generated text: which tokens may follow.
#pragma once

#include "grammar/matcher.hpp"
#include "text/token_texts.hpp"

#include "llama.h"

#include <cstdint>
#include <memory>
#include <regex>
#include <string>
#include <vector>

namespace triollama::native {

struct GrammarParams {
    std::string text;                                   // GBNF; empty: no grammar
    std::string root = "root";
    bool        special = false;                        // special tokens have text: their names
    bool        lazy = false;                           // free text until a trigger appears
    std::vector<std::string> trigger_patterns;          // regular expressions (ECMAScript); only if lazy
    std::vector<llama_token> trigger_tokens;

    bool operator==(const GrammarParams & other) const;
    bool operator!=(const GrammarParams & other) const { return !(*this == other); }
    uint64_t hash() const;
};

// The text of a token is what a stream shows of it (append_piece), so the text shown is the text matched. A token without text,
// as special ones are, may follow only where the grammar names it. Methods throw grammar_error, and change nothing then.
class Grammar {
public:
    Grammar(const llama_vocab * vocab, GrammarParams params);
    Grammar(const Grammar & other);
    Grammar & operator=(const Grammar &) = delete;

    bool allows(llama_token token) const;

    // Gives tokens that may not follow a logit of -inf.
    void mask(std::vector<llama_token_data> & tokens) const;

    // All tokens that may follow.
    std::vector<llama_token> allowed() const;

    void accept(llama_token token);

    // Whether nothing but the end of generation may follow.
    bool is_done() const;

    const GrammarParams & params() const { return params_; }
    const std::vector<llama_token> & accepted() const { return accepted_; }

private:
    using Patterns = std::vector<std::regex>;
    struct Piece {
        llama_token token;
        size_t      end;                // in `waiting`
    };

    const llama_vocab * vocab;
    GrammarParams params_;
    std::shared_ptr<const Patterns> patterns;
    mutable std::unique_ptr<Matcher> matcher;
    mutable Matcher::State state;
    std::vector<llama_token> accepted_;
    mutable std::shared_ptr<const TokenTexts> texts;    // made when first needed; shared by copies
    bool awaiting;                      // a lazy grammar's trigger
    std::string waiting;                // the text before it, and the tokens it came from
    std::vector<Piece> pieces;

    void begin_call() const;
    std::string text_of(llama_token token) const;
    bool fits(llama_token token) const;
    Matcher::State along(Matcher::State from, const std::string & text) const;
    Matcher::State after(Matcher::State from, llama_token token, const std::string & text) const;
    Matcher::State after_trigger(size_t start) const;
    size_t find_trigger(const std::string & text) const;
    const TokenTexts & token_texts() const;
};

}  // namespace triollama::native
