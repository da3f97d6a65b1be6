#include "grammar/grammar.hpp"

#include "grammar/gbnf.hpp"
#include "guards/errors.hpp"

#include <algorithm>
#include <cmath>
#include <exception>
#include <numeric>
#include <regex>

namespace triollama {

namespace {

llama_sampler * new_matcher(const llama_vocab * vocab, const GrammarParams & params) {
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
    : vocab(vocab), params_(std::move(params)), facts(check_gbnf(vocab, params_.text, params_.root)),
      matcher(new_matcher(vocab, params_)) {
    if (!matcher) {
        // What check_gbnf lets pass: a repetition of something that may itself be empty.
        throw grammar_error("llama.cpp refuses the grammar: a rule can begin with itself; "
                            "look for a repetition of something that may be empty, such as (x?)*");
    }
}

Grammar::Grammar(const Grammar & other)
    : vocab(other.vocab), params_(other.params_), facts(other.facts), matcher(nullptr), accepted_(other.accepted_),
      broken(other.broken), tree(other.tree) {
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
    if (one.logit == -INFINITY) {
        return false;
    }
    if (!facts.names_tokens) {
        return true;
    }
    if (std::find(refused.begin(), refused.end(), token) != refused.end()) {
        return false;
    }
    llama_sampler * trial = llama_sampler_clone(matcher);
    bool taken = true;
    try {
        llama_sampler_accept(trial, token);
    } catch (const std::exception &) {
        taken = false;
        refused.push_back(token);
    }
    llama_sampler_free(trial);
    return taken;
}

void Grammar::mask(std::vector<llama_token_data> & tokens) const {
    check_usable();
    llama_token_data_array array = { tokens.data(), tokens.size(), -1, false };
    llama_sampler_apply(matcher, &array);
    if (!refused.empty()) {
        for (llama_token_data & token : tokens) {
            if (std::find(refused.begin(), refused.end(), token.id) != refused.end()) {
                token.logit = -INFINITY;
            }
        }
    }
}

void Grammar::accept(llama_token token) {
    // An impossible token would make the matcher throw, an impossible end of generation would make it abort.
    if (!allows(token)) {
        throw grammar_error("token " + std::to_string(token) + " may not follow under the grammar");
    }
    refused.clear();
    accepted_.push_back(token);
    try {
        llama_sampler_accept(matcher, token);
    } catch (const std::exception & e) {
        broken = true;
        throw grammar_error("the grammar cannot take token " + std::to_string(token) + ": " + e.what());
    }
}

const TokenTree & Grammar::token_tree() const {
    if (!tree) {
        tree = std::make_shared<const TokenTree>(vocab);
    }
    return *tree;
}

std::vector<llama_token> Grammar::allowed() const {
    std::vector<llama_token> result;
    std::vector<llama_token_data> tested;
    auto test = [&](const std::vector<llama_token> & tokens) {
        tested.clear();
        for (const llama_token token : tokens) {
            tested.push_back({ token, 1.0f, 0.0f });
        }
        mask(tested);
    };
    std::vector<llama_token> tokens;
    if (facts.names_tokens) {
        // A token named by the grammar fits whatever its text, so nothing follows from the texts of others.
        tokens.resize((size_t) llama_vocab_n_tokens(vocab));
        std::iota(tokens.begin(), tokens.end(), 0);
    } else {
        tokens = token_tree().roots();
    }
    while (!tokens.empty()) {
        test(tokens);
        tokens.clear();
        for (const llama_token_data & token : tested) {
            if (token.logit == -INFINITY) {
                continue;
            }
            result.push_back(token.id);
            if (!facts.names_tokens) {
                token_tree().add_children(token.id, tokens);
            }
        }
    }
    return result;
}

bool Grammar::is_done() const {
    bool end_allowed = false;
    std::vector<llama_token_data> tokens;
    if (facts.names_tokens) {
        for (llama_token id = 0; id < llama_vocab_n_tokens(vocab); ++id) {
            tokens.push_back({ id, 1.0f, 0.0f });
        }
    } else {
        for (const llama_token id : token_tree().roots()) {
            tokens.push_back({ id, 1.0f, 0.0f });
        }
    }
    mask(tokens);
    for (const llama_token_data & token : tokens) {
        if (token.logit == -INFINITY) {
            continue;
        }
        if (!llama_vocab_is_eog(vocab, token.id)) {
            return false;
        }
        end_allowed = true;
    }
    return end_allowed;
}

}  // namespace triollama
