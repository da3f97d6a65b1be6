#include "sampling/repetition.hpp"

#include <algorithm>
#include <cmath>

namespace triollama::native {

void History::configure(size_t new_capacity, size_t new_window) {
    capacity = std::max(capacity, std::max(new_capacity, new_window));
    if (window != new_window) {
        window = new_window;
        recount();
    }
}

void History::push(llama_token token) {
    if (tokens.size() >= 2 * capacity + 64) {
        tokens.erase(tokens.begin(), tokens.end() - (ptrdiff_t) capacity);
    }
    tokens.push_back(token);
    if (window == 0) {
        return;
    }
    ++counts_[token];
    if (tokens.size() > window) {
        const auto leaving = counts_.find(recent(window));
        if (--leaving->second == 0) {
            counts_.erase(leaving);
        }
    }
}

void History::clear() {
    tokens.clear();
    counts_.clear();
}

void History::assign(std::vector<llama_token> new_tokens) {
    tokens = std::move(new_tokens);
    recount();
}

std::vector<llama_token> History::kept() const {
    const size_t n = std::min(capacity, tokens.size());
    return std::vector<llama_token>(tokens.end() - (ptrdiff_t) n, tokens.end());
}

void History::recount() {
    counts_.clear();
    const size_t n = std::min(window, tokens.size());
    for (size_t i = 0; i < n; ++i) {
        ++counts_[recent(i)];
    }
}

const std::vector<std::vector<llama_token>> & Dry::tails(const llama_vocab * vocab, const DryParams & params,
                                                         llama_token token) {
    const auto found = heads.find(token);
    if (found != heads.end()) {
        return found->second;
    }
    constexpr size_t max_breaker_bytes = 40;        // llama.cpp's limits
    constexpr size_t max_tail_tokens   = 20;
    std::vector<std::vector<llama_token>> result;

    char buffer[512];
    std::string word;
    int32_t n = llama_detokenize(vocab, &token, 1, buffer, (int32_t) sizeof(buffer), false, true);
    if (n >= 0) {
        word.assign(buffer, (size_t) n);
    } else {
        word.resize((size_t) -n);
        n = llama_detokenize(vocab, &token, 1, &word[0], (int32_t) word.size(), false, true);
        word.resize((size_t) std::max(n, 0));
    }

    for (const std::string & full : params.breakers) {
        const std::string breaker = full.substr(0, max_breaker_bytes);
        if (breaker.empty()) {
            continue;
        }
        if (word.find(breaker) != std::string::npos) {
            result.emplace_back();
            continue;
        }
        // The word may end with the beginning of the breaker; what is left of it must follow.
        for (size_t start = 0; start < word.size(); ++start) {
            const size_t overlap = word.size() - start;
            if (overlap >= breaker.size() || word.compare(start, overlap, breaker, 0, overlap) != 0) {
                continue;
            }
            const std::string rest = breaker.substr(overlap);
            std::vector<llama_token> tail(rest.size() + 8);
            const int32_t count = llama_tokenize(vocab, rest.data(), (int32_t) rest.size(), tail.data(),
                                                 (int32_t) tail.size(), false, false);
            tail.resize((size_t) std::max(count, 0));
            tail.resize(std::min(tail.size(), max_tail_tokens));
            if (std::find(result.begin(), result.end(), tail) == result.end()) {
                result.push_back(std::move(tail));
            }
        }
    }
    return heads.emplace(token, std::move(result)).first->second;
}

bool Dry::penalties(const llama_vocab * vocab, const DryParams & params, const History & history,
                    std::vector<std::pair<llama_token, float>> & out) {
    if (!params.enabled()) {
        return false;
    }
    const auto n = (int32_t) std::min(history.size(), (size_t) params.last_n);
    if (n <= params.allowed_length) {
        return false;
    }

    // A repetition may not reach back over a breaker.
    int32_t limit = n;
    for (int32_t i = 0; i < n; ++i) {
        int32_t broken = -1;
        for (const auto & tail : tails(vocab, params, history.recent((size_t) i))) {
            const auto length = (int32_t) tail.size();
            if (length <= broken || length > i) {
                continue;
            }
            bool same = true;
            for (int32_t j = 0; j < length && same; ++j) {
                same = tail[(size_t) j] == history.recent((size_t) (i - 1 - j));
            }
            if (same) {
                broken = length;
            }
        }
        if (broken >= 0) {
            limit = i - broken;
            break;
        }
    }
    if (limit < params.allowed_length) {
        return false;
    }

    // matches[k]: how many of the newest tokens equal those that end k tokens earlier. This is the Z function of the
    // history read backwards, linear in n: [left, right) is the match found so far that reaches furthest.
    matches.assign((size_t) n, 0);
    longest.clear();
    int32_t left  = 0;
    int32_t right = 0;
    for (int32_t k = 1; k < n; ++k) {
        int32_t length = k < right ? std::min(right - k, matches[(size_t) (k - left)]) : 0;
        while (k + length < n && history.recent((size_t) length) == history.recent((size_t) (k + length))) {
            ++length;
        }
        matches[(size_t) k] = length;
        if (k + length > right) {
            left  = k;
            right = k + length;
        }
        const int32_t repeated = std::min(length, limit);
        if (repeated >= params.allowed_length) {
            // The token that followed then would extend the repetition now.
            int32_t & best = longest.emplace(history.recent((size_t) (k - 1)), repeated).first->second;
            best = std::max(best, repeated);
        }
    }

    constexpr float log_of_largest_float = 88.7228391f;
    int32_t max_exponent = 0;
    if (params.base > 1.000001f) {
        max_exponent = (int32_t) (log_of_largest_float / std::log(params.base));
    }
    for (const auto & entry : longest) {
        const auto & breaking = tails(vocab, params, entry.first);
        if (std::any_of(breaking.begin(), breaking.end(), [](const auto & tail) { return tail.empty(); })) {
            continue;
        }
        int32_t exponent = entry.second - params.allowed_length;
        if (max_exponent > 0) {
            exponent = std::min(exponent, max_exponent);
        }
        const auto loss = (float) (params.multiplier * std::pow(params.base, exponent));
        out.emplace_back(entry.first, loss);
    }
    return true;
}

}  // namespace triollama::native
