#include "grammar/thoughts.hpp"

#include "guards/errors.hpp"
#include "text/token_texts.hpp"

#include <algorithm>
#include <cmath>

namespace triollama::native {

namespace {

bool is_space(const std::string & text) {
    return text.find_first_not_of(" \t\r\n") == std::string::npos;
}

}  // namespace

Thoughts::Thoughts(const llama_vocab * vocab, GrammarParams params, std::unique_ptr<Grammar> rules)
    : Grammar(std::move(params)), vocab(vocab), rules(std::move(rules)), place(Place::before) {
    const ThoughtParams & thought = params_.thought;
    if (thought.close.empty() || thought.close_tokens.empty()) {
        throw grammar_error("thoughts need a text that ends them");
    }
    if (thought.start == ThoughtParams::inside) {
        enter(Place::inside);
    } else if (thought.open.empty() || thought.open_tokens.empty()) {
        throw grammar_error("thoughts need a text that begins them");
    } else if (thought.start == ThoughtParams::forced) {
        enter(Place::opening);
    }
}

Thoughts::Thoughts(const Thoughts & other)
    : Grammar(other), vocab(other.vocab), rules(other.rules ? other.rules->clone() : nullptr), place(other.place),
      count(other.count), tail(other.tail) {}

std::string Thoughts::text_of(llama_token token) const {
    std::string text;
    append_piece(vocab, token, true, text);
    return text;
}

// Whether the text so far may be `open`, or `close` and nothing else, for no thoughts; `next`: where it then
// is, if it is whole.
bool Thoughts::begins(llama_token token, Place & next) const {
    std::string text = tail + text_of(token);
    text.erase(0, std::min(text.find_first_not_of(" \t\r\n"), text.size()));
    const std::string & open = params_.thought.open;
    const std::string & close = params_.thought.close;
    const bool opened = text.compare(0, open.size(), open) == 0;
    const bool closed = text.compare(0, close.size(), close) == 0 && is_space(text.substr(close.size()));
    next = opened ? Place::inside : closed ? Place::gap : Place::before;
    const auto may_be = [&](const std::string & marker) { return marker.compare(0, text.size(), text) == 0; };
    return opened || closed || (!text.empty() && (may_be(open) || may_be(close)));
}

// Whether `close` is complete with this token; `clean`: and nothing but whitespace follows in it.
bool Thoughts::closes(llama_token token, bool & clean) const {
    const std::string text = tail + text_of(token);
    const size_t at = text.find(params_.thought.close);
    clean = at != std::string::npos && is_space(text.substr(at + params_.thought.close.size()));
    return at != std::string::npos;
}

void Thoughts::enter(Place next) {
    place = next;
    count = 0;
    if (next == Place::inside && params_.thought.max_tokens == 0) {
        place = Place::closing;
    }
}

bool Thoughts::allows(llama_token token) const {
    const ThoughtParams & thought = params_.thought;
    bool clean = false;
    Place next = Place::before;
    switch (place) {
        case Place::before:  return begins(token, next) || (tail.empty() ? by_rules(token) : !rules);
        case Place::opening: return token == thought.open_tokens[count];
        case Place::inside:
            if (llama_vocab_is_eog(vocab, token)) {
                return !rules;
            }
            return !closes(token, clean) || clean;
        case Place::closing: return token == thought.close_tokens[count];
        case Place::gap: {
            const std::string text = text_of(token);
            return by_rules(token) || (count < max_gap && !text.empty() && is_space(text));
        }
        default: return by_rules(token);
    }
}

void Thoughts::mask(std::vector<llama_token_data> & tokens) const {
    if (place == Place::text && rules) {
        rules->mask(tokens);
        return;
    }
    for (llama_token_data & token : tokens) {
        if (!allows(token.id)) {
            token.logit = -INFINITY;
        }
    }
}

std::vector<llama_token> Thoughts::allowed() const {
    if (place == Place::text && rules) {
        return rules->allowed();
    }
    if (place == Place::opening || place == Place::closing) {
        const auto & forced = place == Place::opening ? params_.thought.open_tokens : params_.thought.close_tokens;
        return { forced[count] };
    }
    std::vector<llama_token> result;
    const int32_t n = llama_vocab_n_tokens(vocab);
    for (llama_token token = 0; token < n; ++token) {
        if (allows(token)) {
            result.push_back(token);
        }
    }
    return result;
}

std::vector<llama_token> Thoughts::forced() const {
    if (place == Place::opening || place == Place::closing) {
        const auto & tokens = place == Place::opening ? params_.thought.open_tokens : params_.thought.close_tokens;
        return { tokens.begin() + (std::ptrdiff_t) count, tokens.end() };
    }
    return place == Place::text && rules ? rules->forced() : std::vector<llama_token>();
}

void Thoughts::accept(llama_token token) {
    const ThoughtParams & thought = params_.thought;
    const bool fits = allows(token);
    if (!fits) {
        throw grammar_error("token " + std::to_string(token) + " may not follow under the grammar");
    }
    bool clean = false;
    Place next = Place::before;
    switch (place) {
        case Place::before:
            if (begins(token, next) && (next != Place::before || !rules || !tail.empty() || !rules->allows(token))) {
                tail += text_of(token);
                if (next != Place::before) {
                    tail.clear();
                    enter(next);
                }
            } else {
                if (rules) {
                    rules->accept(token);
                }
                place = Place::text;
            }
            break;
        case Place::opening:
            if (++count == thought.open_tokens.size()) {
                enter(Place::inside);
            }
            break;
        case Place::inside:
            ++count;
            if (closes(token, clean)) {
                enter(Place::gap);
            } else {
                tail += text_of(token);
                tail.erase(0, tail.size() - std::min(tail.size(), thought.close.size() - 1));
                if (is_limited() && count >= (size_t) thought.max_tokens) {
                    enter(Place::closing);
                }
            }
            break;
        case Place::closing:
            if (++count == thought.close_tokens.size()) {
                enter(Place::gap);
            }
            break;
        default:
            if (place == Place::gap && !(rules && rules->allows(token)) && !llama_vocab_is_eog(vocab, token) &&
                count < max_gap && is_space(text_of(token))) {
                ++count;
                break;
            }
            if (rules) {
                rules->accept(token);
            }
            place = Place::text;
    }
    accepted_.push_back(token);
}

}  // namespace triollama::native
