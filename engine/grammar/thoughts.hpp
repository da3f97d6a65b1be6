// Free thoughts before the text that a grammar rules.
#pragma once

#include "grammar/grammar.hpp"

#include <memory>
#include <string>
#include <vector>

namespace triollama::native {

// Thoughts are free text, except that they end: by `close`, after which nothing but whitespace stands in the same token, and a
// grammar behind them allows no end of generation before that. After max_tokens nothing but close_tokens may follow. A few
// tokens of whitespace may stand before the text that the grammar rules.
class Thoughts : public Grammar {
public:
    Thoughts(const llama_vocab * vocab, GrammarParams params, std::unique_ptr<Grammar> rules);     // null: free text
    Thoughts(const Thoughts & other);

    bool allows(llama_token token) const override;
    void mask(std::vector<llama_token_data> & tokens) const override;
    std::vector<llama_token> allowed() const override;
    void accept(llama_token token) override;
    std::vector<llama_token> forced() const override;
    bool is_done() const override { return place == Place::text && rules && rules->is_done(); }
    std::unique_ptr<Grammar> clone() const override { return std::make_unique<Thoughts>(*this); }

private:
    enum class Place { before, opening, inside, closing, gap, text };

    static constexpr size_t max_gap = 4;        // tokens of whitespace

    const llama_vocab * vocab;
    std::unique_ptr<Grammar> rules;
    Place       place;
    size_t      count = 0;                      // tokens of this place
    std::string tail;                           // what was said of `open`; then the end, in which `close` may begin

    bool is_limited() const { return params_.thought.max_tokens >= 0; }
    std::string text_of(llama_token token) const;
    bool begins(llama_token token, Place & next) const;
    bool closes(llama_token token, bool & clean) const;
    bool by_rules(llama_token token) const { return !rules || rules->allows(token); }
    void enter(Place next);
};

}  // namespace triollama::native
