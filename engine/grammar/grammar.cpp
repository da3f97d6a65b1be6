#include "grammar/grammar.hpp"

#include "grammar/gbnf_grammar.hpp"
#include "grammar/guided_grammar.hpp"
#include "grammar/thoughts.hpp"

namespace triollama::native {

bool GrammarParams::operator==(const GrammarParams & other) const {
    return text == other.text && syntax == other.syntax && root == other.root && special == other.special &&
           lazy == other.lazy && trigger_patterns == other.trigger_patterns && trigger_tokens == other.trigger_tokens &&
           thought == other.thought;
}

uint64_t GrammarParams::hash() const {
    uint64_t value = 0xcbf29ce484222325ull;         // FNV-1a
    auto add = [&](const void * data, size_t size) {
        for (size_t i = 0; i < size; ++i) {
            value = (value ^ ((const unsigned char *) data)[i]) * 0x100000001b3ull;
        }
        value = (value ^ size) * 0x100000001b3ull;
    };
    add(text.data(), text.size());
    add(root.data(), root.size());
    add(&lazy, sizeof(lazy));
    if (special) {
        add(&special, sizeof(special));
    }
    for (const std::string & pattern : trigger_patterns) {
        add(pattern.data(), pattern.size());
    }
    for (const llama_token token : trigger_tokens) {
        add(&token, sizeof(token));
    }
    // What came later is added where it is used alone, so that older states still fit.
    if (syntax != gbnf) {
        add(&syntax, sizeof(syntax));
    }
    if (thought.start != ThoughtParams::none) {
        add(&thought.start, sizeof(thought.start));
        add(thought.open.data(), thought.open.size());
        add(thought.close.data(), thought.close.size());
        add(thought.open_tokens.data(), thought.open_tokens.size() * sizeof(llama_token));
        add(thought.close_tokens.data(), thought.close_tokens.size() * sizeof(llama_token));
        add(&thought.max_tokens, sizeof(thought.max_tokens));
    }
    return value;
}

std::unique_ptr<Grammar> make_grammar(const llama_vocab * vocab, const GrammarParams & params) {
    std::unique_ptr<Grammar> grammar;
    if (!params.text.empty()) {
        if (params.syntax == GrammarParams::gbnf) {
            grammar = std::make_unique<GbnfGrammar>(vocab, params);
        } else {
            grammar = std::make_unique<GuidedGrammar>(vocab, params);
        }
    }
    if (params.thought.start != ThoughtParams::none) {
        return std::make_unique<Thoughts>(vocab, params, std::move(grammar));
    }
    return grammar;
}

}  // namespace triollama::native
