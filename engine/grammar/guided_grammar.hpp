// JSON schemas, regular expressions and Lark grammars, by llguidance.
#pragma once

#include "grammar/grammar.hpp"
#include "grammar/llguidance.hpp"

#include <cstdint>
#include <memory>
#include <vector>

namespace triollama::native {

class GuidedGrammar : public Grammar {
public:
    GuidedGrammar(const llama_vocab * vocab, GrammarParams params);
    GuidedGrammar(const GuidedGrammar & other);

    bool allows(llama_token token) const override;
    void mask(std::vector<llama_token_data> & tokens) const override;
    std::vector<llama_token> allowed() const override;
    void accept(llama_token token) override;
    std::vector<llama_token> forced() const override;
    bool is_done() const override;
    std::unique_ptr<Grammar> clone() const override { return std::make_unique<GuidedGrammar>(*this); }

private:
    const llama_vocab * vocab;
    std::shared_ptr<const llguidance::Prepared> prepared;      // before what uses it
    llguidance::OwnedMatcher    matcher;
    mutable std::vector<uint32_t> bits;             // of what may follow, once somebody asked for all of it
    mutable bool known = false;

    bool in_mask(llama_token token) const;
    void find_mask() const;
    [[noreturn]] void throw_error() const;
};

}  // namespace triollama::native
