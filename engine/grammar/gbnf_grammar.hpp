// Grammars in GBNF, by our own matcher.
#pragma once

#include "grammar/grammar.hpp"
#include "grammar/matcher.hpp"
#include "text/token_texts.hpp"

#include <cstdint>
#include <memory>
#include <regex>
#include <string>
#include <vector>

namespace triollama::native {

class GbnfGrammar : public Grammar {
public:
    GbnfGrammar(const llama_vocab * vocab, GrammarParams params);
    GbnfGrammar(const GbnfGrammar & other);

    bool allows(llama_token token) const override;
    void mask(std::vector<llama_token_data> & tokens) const override;
    std::vector<llama_token> allowed() const override;
    void accept(llama_token token) override;
    std::vector<llama_token> forced() const override;
    bool is_done() const override;
    std::unique_ptr<Grammar> clone() const override { return std::make_unique<GbnfGrammar>(*this); }

private:
    using Patterns = std::vector<std::regex>;
    struct Piece {
        llama_token token;
        size_t      end;                // in `waiting`
    };

    const llama_vocab * vocab;
    std::shared_ptr<const Patterns> patterns;
    mutable std::unique_ptr<Matcher> matcher;
    mutable Matcher::State state;
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
