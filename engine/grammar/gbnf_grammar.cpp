#include "grammar/gbnf_grammar.hpp"

#include "grammar/forced.hpp"
#include "guards/errors.hpp"
#include "text/token_texts.hpp"
#include "text/tokenize.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace triollama::native {

GbnfGrammar::GbnfGrammar(const llama_vocab * vocab, GrammarParams params)
    : Grammar(std::move(params)), vocab(vocab),
      matcher(std::make_unique<Matcher>(read_gbnf(vocab, params_.text, params_.root))), state(matcher->start()),
      awaiting(params_.lazy) {
    Patterns compiled;
    for (const std::string & pattern : params_.trigger_patterns) {
        try {
            compiled.emplace_back(pattern);
        } catch (const std::regex_error & e) {
            throw grammar_error("the grammar's trigger pattern '" + pattern + "' is no regular expression: " + e.what());
        }
    }
    patterns = std::make_shared<const Patterns>(std::move(compiled));
}

GbnfGrammar::GbnfGrammar(const GbnfGrammar & other)
    : Grammar(other), vocab(other.vocab), patterns(other.patterns), state(other.state), texts(other.texts), awaiting(other.awaiting),
      waiting(other.waiting), pieces(other.pieces) {
    matcher = other.matcher->copy(state);
}

void GbnfGrammar::begin_call() const {
    matcher->renew_budget();
    if (matcher->is_large()) {
        matcher = matcher->copy(state);
    }
}

std::string GbnfGrammar::text_of(llama_token token) const {
    std::string text;
    append_piece(vocab, token, params_.special, text);
    return text;
}

Matcher::State GbnfGrammar::along(Matcher::State from, const std::string & text) const {
    Matcher::State next = text.empty() ? Matcher::nothing : from;
    for (size_t i = 0; i < text.size() && next != Matcher::nothing; ++i) {
        next = matcher->after_byte(next, (unsigned char) text[i]);
    }
    return next;
}

Matcher::State GbnfGrammar::after(Matcher::State from, llama_token token, const std::string & text) const {
    const Matcher::State next = along(from, text);
    return matcher->takes_token(from, token) ? matcher->unite(next, matcher->after_token(from, token)) : next;
}

bool GbnfGrammar::fits(llama_token token) const {
    if (awaiting) {
        return true;
    }
    if (llama_vocab_is_eog(vocab, token)) {
        return matcher->accepts(state);
    }
    return matcher->takes_token(state, token) || along(state, text_of(token)) != Matcher::nothing;
}

bool GbnfGrammar::allows(llama_token token) const {
    begin_call();
    return fits(token);
}

void GbnfGrammar::mask(std::vector<llama_token_data> & tokens) const {
    begin_call();
    for (llama_token_data & token : tokens) {
        if (!fits(token.id)) {
            token.logit = -INFINITY;
        }
    }
}

std::vector<llama_token> GbnfGrammar::allowed() const {
    begin_call();
    std::vector<llama_token> result;
    const int32_t n = llama_vocab_n_tokens(vocab);
    if (awaiting) {
        result.resize((size_t) n);
        std::iota(result.begin(), result.end(), 0);
        return result;
    }
    token_texts().walk(
        state, Matcher::nothing, [&](Matcher::State from, unsigned char byte) { return matcher->after_byte(from, byte); },
        [&](llama_token token) { result.push_back(token); });
    const bool ends  = matcher->accepts(state);
    const bool names = matcher->names_tokens(state);
    for (llama_token token = 0; (ends || names) && token < n; ++token) {
        if (llama_vocab_is_eog(vocab, token) ? ends : matcher->takes_token(state, token)) {
            result.push_back(token);
        }
    }
    if (names) {
        std::sort(result.begin(), result.end());
        result.erase(std::unique(result.begin(), result.end()), result.end());
    }
    return result;
}

void GbnfGrammar::accept(llama_token token) {
    begin_call();
    const std::string text = text_of(token);
    Matcher::State next = state;
    bool triggered = false;
    if (awaiting) {
        const auto & triggers = params_.trigger_tokens;
        waiting += text;
        pieces.push_back({ token, waiting.size() });
        try {
            size_t start = std::string::npos;
            if (std::find(triggers.begin(), triggers.end(), token) != triggers.end()) {
                triggered = true;
                next = after(state, token, text);
            } else if ((start = find_trigger(waiting)) != std::string::npos) {
                triggered = true;
                next = after_trigger(start);
            }
            if (next == Matcher::nothing) {
                throw grammar_error("the grammar cannot take what triggered it, with token " + std::to_string(token));
            }
        } catch (...) {
            pieces.pop_back();
            waiting.resize(waiting.size() - text.size());
            throw;
        }
    } else if (llama_vocab_is_eog(vocab, token)) {
        next = matcher->accepts(state) ? state : Matcher::nothing;
    } else {
        next = after(state, token, text);
    }
    if (next == Matcher::nothing) {
        throw grammar_error("token " + std::to_string(token) + " may not follow under the grammar");
    }
    accepted_.push_back(token);
    state = next;
    if (triggered) {
        awaiting = false;
        waiting.clear();
        pieces.clear();
    }
}

// The grammar applies from here on in the text that waited: tokens that begin before it count with what is left of them.
Matcher::State GbnfGrammar::after_trigger(size_t start) const {
    Matcher::State next = state;
    size_t begin = 0;
    for (const Piece & piece : pieces) {
        if (piece.end > start && next != Matcher::nothing) {
            const size_t from = std::max(begin, start);
            next = after(next, piece.token, waiting.substr(from, piece.end - from));
        }
        begin = piece.end;
    }
    return next;
}

// Where the grammar begins: the first group of the first pattern that matches, or its match.
size_t GbnfGrammar::find_trigger(const std::string & text) const {
    size_t start = std::string::npos;
    // std::regex recurses once for each character.
    with_stack_for(text.size(), [&] {
        for (size_t i = 0; i < patterns->size() && start == std::string::npos; ++i) {
            const std::string & pattern = params_.trigger_patterns[i];
            const bool whole = !pattern.empty() && pattern.front() == '^' && pattern.back() == '$';
            std::smatch match;
            if (!(whole && std::regex_match(text, match, (*patterns)[i])) && !std::regex_search(text, match, (*patterns)[i])) {
                continue;
            }
            size_t group = 0;
            for (size_t g = 1; g < match.size() && group == 0; ++g) {
                group = match.length(g) > 0 ? g : 0;
            }
            start = (size_t) match.position(group);
        }
    });
    return start;
}

const TokenTexts & GbnfGrammar::token_texts() const {
    if (!texts) {
        texts = std::make_shared<const TokenTexts>(vocab, params_.special);
    }
    return *texts;
}

std::vector<llama_token> GbnfGrammar::forced() const {
    if (awaiting || params_.special) {
        return {};
    }
    std::string text;
    std::vector<size_t> reach;
    try {
        begin_call();
        Matcher::State at = state;
        while (text.size() < most_forced && !matcher->accepts(at) && !matcher->names_tokens(at)) {
            int only = -1;
            for (int byte = 0; byte < 256 && only > -2; ++byte) {
                if (matcher->after_byte(at, (unsigned char) byte) != Matcher::nothing) {
                    only = only == -1 ? byte : -2;
                }
            }
            if (only < 0) {
                break;
            }
            size_t longest = 0;
            token_texts().walk(
                at, Matcher::nothing, [&](Matcher::State from, unsigned char byte) { return matcher->after_byte(from, byte); },
                [&](llama_token token) { longest = std::max(longest, text_of(token).size()); });
            reach.push_back(text.size() + longest);
            text.push_back((char) only);
            at = matcher->after_byte(at, (unsigned char) only);
        }
    } catch (const grammar_error &) {           // too ambiguous to look ahead
        return {};
    }
    return cut_forced(vocab, text, reach);
}

bool GbnfGrammar::is_done() const {
    return !awaiting && matcher->must_end(state);
}

}  // namespace triollama::native
