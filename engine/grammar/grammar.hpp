// A grammar's state along one generated text: which tokens may follow.
#pragma once

#include "grammar/params.hpp"

#include "llama.h"

#include <memory>
#include <vector>

namespace triollama::native {

// The text of a token is what a stream shows of it (append_piece), so the text shown is the text matched. A token without text,
// as special ones are, may follow only where the grammar names it. Methods throw grammar_error, and change nothing then.
class Grammar {
public:
    static constexpr size_t most_forced = 256;      // bytes at a time

    virtual ~Grammar() = default;
    Grammar & operator=(const Grammar &) = delete;

    virtual bool allows(llama_token token) const = 0;

    // Gives tokens that may not follow a logit of -inf.
    virtual void mask(std::vector<llama_token_data> & tokens) const = 0;

    // All tokens that may follow.
    virtual std::vector<llama_token> allowed() const = 0;

    virtual void accept(llama_token token) = 0;

    // What follows where nothing else may: bytes without a choice, cut as the model's tokenizer would cut them, up to where a
    // token that may follow goes on beyond them. Empty where there is a choice.
    virtual std::vector<llama_token> forced() const { return {}; }

    // Whether nothing but the end of generation may follow.
    virtual bool is_done() const = 0;

    virtual std::unique_ptr<Grammar> clone() const = 0;

    const GrammarParams & params() const { return params_; }
    const std::vector<llama_token> & accepted() const { return accepted_; }

protected:
    explicit Grammar(GrammarParams params) : params_(std::move(params)) {}
    Grammar(const Grammar &) = default;

    GrammarParams params_;
    std::vector<llama_token> accepted_;
};

// By the parameters' syntax, behind thoughts if there are any. Throws grammar_error, and unsupported_error where llguidance is
// needed and was not loaded.
std::unique_ptr<Grammar> make_grammar(const llama_vocab * vocab, const GrammarParams & params);

}  // namespace triollama::native
