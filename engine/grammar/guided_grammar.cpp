#include "grammar/guided_grammar.hpp"

#include "grammar/forced.hpp"
#include "guards/errors.hpp"

#include <algorithm>
#include <cmath>
#include <string>

namespace triollama::native {

using llguidance::api;

namespace {

const char * name_of(GrammarParams::Syntax syntax) {
    switch (syntax) {
        case GrammarParams::json_schema: return "json";
        case GrammarParams::regex:       return "regex";
        default:                         return "lark";
    }
}

}  // namespace

GuidedGrammar::GuidedGrammar(const llama_vocab * vocab, GrammarParams params)
    : Grammar(std::move(params)), vocab(vocab), prepared(llguidance::prepared(vocab)),
      matcher(llguidance::new_matcher(prepared->tokenizer.get(), name_of(params_.syntax), params_.text)) {
    // Rounded up to whole words, so that every token of the vocabulary has a bit.
    bits.resize(std::max(api().matcher_get_mask_byte_size(matcher.get()) / 4, ((size_t) llama_vocab_n_tokens(vocab) + 31) / 32));
}

GuidedGrammar::GuidedGrammar(const GuidedGrammar & other)
    : Grammar(other), vocab(other.vocab), prepared(other.prepared), matcher(api().clone_matcher(other.matcher.get())),
      bits(other.bits), known(other.known) {
    if (!matcher) {
        throw grammar_error("llguidance could not copy the grammar's state");
    }
}

void GuidedGrammar::throw_error() const {
    const char * why = api().matcher_get_error(matcher.get());
    throw grammar_error(why ? why : "llguidance failed without a reason");
}

void GuidedGrammar::find_mask() const {
    if (known) {
        return;
    }
    std::fill(bits.begin(), bits.end(), 0u);
    if (!api().matcher_is_stopped(matcher.get())) {
        const size_t size = api().matcher_get_mask_byte_size(matcher.get());
        if (api().matcher_compute_mask_into(matcher.get(), bits.data(), size) != 0) {
            throw_error();
        }
    } else if (api().matcher_get_error(matcher.get())) {
        throw_error();
    }
    // The end is not one token's but a state's.
    const bool ends = api().matcher_is_accepting(matcher.get());
    for (const llama_token token : prepared->ends) {
        const uint32_t bit = 1u << (token % 32);
        uint32_t & word = bits[(size_t) token / 32];
        word = ends ? word | bit : word & ~bit;
    }
    known = true;
}

bool GuidedGrammar::in_mask(llama_token token) const {
    return (bits[(size_t) token / 32] >> (token % 32) & 1u) != 0;
}

bool GuidedGrammar::allows(llama_token token) const {
    if (known) {
        return in_mask(token);
    }
    if (llama_vocab_is_eog(vocab, token)) {
        return api().matcher_is_accepting(matcher.get());
    }
    if (api().matcher_is_stopped(matcher.get())) {
        return false;
    }
    const auto one = (uint32_t) token;
    const int32_t n = api().matcher_validate_tokens(matcher.get(), &one, 1);
    if (n < 0) {
        throw_error();
    }
    return n == 1;
}

void GuidedGrammar::mask(std::vector<llama_token_data> & tokens) const {
    find_mask();
    for (llama_token_data & token : tokens) {
        if (!in_mask(token.id)) {
            token.logit = -INFINITY;
        }
    }
}

std::vector<llama_token> GuidedGrammar::allowed() const {
    find_mask();
    std::vector<llama_token> result;
    const int32_t n = llama_vocab_n_tokens(vocab);
    for (size_t word = 0; word * 32 < (size_t) n; ++word) {
        for (uint32_t left = bits[word]; left != 0; left &= left - 1) {
            const auto token = (llama_token) (word * 32 + (size_t) __builtin_ctz(left));
            if (token < n) {
                result.push_back(token);
            }
        }
    }
    return result;
}

void GuidedGrammar::accept(llama_token token) {
    // What may not follow would leave the matcher of no use, so it is asked first.
    if (!allows(token)) {
        find_mask();    // throws where the grammar was too much work: then nothing may follow
        throw grammar_error("token " + std::to_string(token) + " may not follow under the grammar");
    }
    if (!llama_vocab_is_eog(vocab, token)) {
        if (api().matcher_consume_token(matcher.get(), (uint32_t) token) != 0) {
            throw_error();
        }
        known = false;
    }
    accepted_.push_back(token);
}

namespace {

// What a mask leaves: how many tokens (2: several), and the byte that all of them begin with, if they do.
struct Left {
    int         tokens = 0;
    llama_token token = LLAMA_TOKEN_NULL;
    int         byte = -1;
    size_t      longest = 0;            // bytes, where there is such a byte
};

Left left_by(const std::vector<uint32_t> & bits, const llguidance::Prepared & prepared) {
    Left left;
    for (size_t word = 0; word < bits.size(); ++word) {
        for (uint32_t some = bits[word]; some != 0; some &= some - 1) {
            const size_t token = word * 32 + (size_t) __builtin_ctz(some);
            const uint32_t size = token < prepared.sizes.size() ? prepared.sizes[token] : 0;
            const int byte = size ? prepared.firsts[token] : -1;
            left.byte    = left.tokens == 0 || left.byte == byte ? byte : -1;
            left.tokens  = std::min(left.tokens + 1, 2);
            left.token   = (llama_token) token;
            left.longest = std::max(left.longest, (size_t) size);
            if (left.tokens == 2 && left.byte < 0) {
                return left;
            }
        }
    }
    return left;
}

}  // namespace

std::vector<llama_token> GuidedGrammar::forced() const {
    if (api().matcher_is_stopped(matcher.get()) || api().matcher_is_accepting(matcher.get())) {
        return {};
    }
    find_mask();
    Left left = left_by(bits, *prepared);
    if (left.tokens == 1 && left.byte < 0) {
        return { left.token };                  // a special one
    }
    std::string text;
    std::vector<size_t> reach;                  // for each byte of it, where the longest token from there ends
    llguidance::OwnedMatcher ahead;
    std::vector<uint32_t> mask(bits.size());
    while (left.byte >= 0 && text.size() < most_forced && prepared->bytes[left.byte] != LLAMA_TOKEN_NULL) {
        if (!ahead) {
            ahead.reset(api().clone_matcher(matcher.get()));
        }
        reach.push_back(text.size() + left.longest);
        text.push_back((char) left.byte);
        const size_t size = api().matcher_get_mask_byte_size(ahead.get());
        if (api().matcher_consume_token(ahead.get(), (uint32_t) prepared->bytes[left.byte]) != 0 ||
            api().matcher_is_stopped(ahead.get()) || api().matcher_is_accepting(ahead.get()) ||
            api().matcher_compute_mask_into(ahead.get(), mask.data(), size) != 0) {
            break;
        }
        left = left_by(mask, *prepared);
    }
    return cut_forced(vocab, text, reach);
}

bool GuidedGrammar::is_done() const {
    if (!api().matcher_is_accepting(matcher.get())) {
        return false;
    }
    const std::vector<llama_token> may = allowed();
    return std::all_of(may.begin(), may.end(), [&](llama_token token) { return llama_vocab_is_eog(vocab, token); });
}

}  // namespace triollama::native
