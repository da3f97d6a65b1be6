#include "grammar.hpp"

#include "gbnf.hpp"
#include "native_errors.hpp"

#include <algorithm>
#include <cmath>
#include <exception>
#include <regex>

namespace triollama {

namespace {

llama_sampler * new_matcher(const llama_vocab * vocab, const GrammarParams & params) {
    check_gbnf(vocab, params.text, params.root);
    if (!params.lazy) {
        return llama_sampler_init_grammar(vocab, params.text.c_str(), params.root.c_str());
    }
    std::vector<const char *> patterns;
    patterns.reserve(params.trigger_patterns.size());
    for (const std::string & pattern : params.trigger_patterns) {
        try {
            std::regex compiled(pattern);
        } catch (const std::regex_error & e) {
            throw grammar_error("the grammar's trigger pattern '" + pattern + "' is no regular expression: " + e.what());
        }
        patterns.push_back(pattern.c_str());
    }
    return llama_sampler_init_grammar_lazy_patterns(vocab, params.text.c_str(), params.root.c_str(), patterns.data(),
                                                    patterns.size(), params.trigger_tokens.data(),
                                                    params.trigger_tokens.size());
}

}  // namespace

bool GrammarParams::operator==(const GrammarParams & other) const {
    return text == other.text && root == other.root && lazy == other.lazy &&
           trigger_patterns == other.trigger_patterns && trigger_tokens == other.trigger_tokens;
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
    for (const std::string & pattern : trigger_patterns) {
        add(pattern.data(), pattern.size());
    }
    for (const llama_token token : trigger_tokens) {
        add(&token, sizeof(token));
    }
    return value;
}

Grammar::Grammar(const llama_vocab * vocab, GrammarParams params)
    : vocab(vocab), params_(std::move(params)), matcher(new_matcher(vocab, params_)) {
    if (!matcher) {
        // What check_gbnf lets pass: a repetition of something that may itself be empty.
        throw grammar_error("llama.cpp refuses the grammar: a rule can begin with itself; "
                            "look for a repetition of something that may be empty, such as (x?)*");
    }
}

Grammar::Grammar(const Grammar & other)
    : vocab(other.vocab), params_(other.params_), matcher(nullptr), accepted_(other.accepted_), broken(other.broken) {
    if (!broken) {
        matcher = llama_sampler_clone(other.matcher);
    }
}

Grammar::~Grammar() {
    llama_sampler_free(matcher);
}

void Grammar::check_usable() const {
    if (broken) {
        throw grammar_error("the grammar's state was lost when a token did not fit; reset the sampler");
    }
}

bool Grammar::allows(llama_token token) const {
    check_usable();
    llama_token_data one = { token, 1.0f, 0.0f };
    llama_token_data_array array = { &one, 1, -1, false };
    llama_sampler_apply(matcher, &array);
    return one.logit != -INFINITY;
}

void Grammar::mask(std::vector<llama_token_data> & tokens) const {
    check_usable();
    llama_token_data_array array = { tokens.data(), tokens.size(), -1, false };
    llama_sampler_apply(matcher, &array);
}

void Grammar::accept(llama_token token) {
    // An impossible token would make the matcher throw, an impossible end of generation would make it abort.
    if (!allows(token)) {
        throw grammar_error("token " + std::to_string(token) + " may not follow under the grammar");
    }
    accepted_.push_back(token);
    try {
        llama_sampler_accept(matcher, token);
    } catch (const std::exception & e) {
        broken = true;
        throw grammar_error("the grammar cannot take token " + std::to_string(token) + ": " + e.what());
    }
}

bool Grammar::is_done() const {
    check_usable();
    // Tokens are tried a piece of the vocabulary at a time: where free text may follow, the first piece tells.
    constexpr llama_token piece = 1024;
    const llama_token n = llama_vocab_n_tokens(vocab);
    if (ends.empty()) {
        for (llama_token id = 0; id < n; ++id) {
            if (llama_vocab_is_eog(vocab, id)) {
                ends.push_back(id);
            }
        }
    }
    if (std::none_of(ends.begin(), ends.end(), [this](llama_token id) { return allows(id); })) {
        return false;
    }
    std::vector<llama_token_data> tokens;
    for (llama_token start = 0; start < n; start += piece) {
        tokens.clear();
        for (llama_token id = start; id < std::min(n, start + piece); ++id) {
            if (!llama_vocab_is_eog(vocab, id)) {
                tokens.push_back({ id, 1.0f, 0.0f });
            }
        }
        mask(tokens);
        if (std::any_of(tokens.begin(), tokens.end(), [](const llama_token_data & t) { return t.logit != -INFINITY; })) {
            return false;
        }
    }
    return true;
}

}  // namespace triollama
