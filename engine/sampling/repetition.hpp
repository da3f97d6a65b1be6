// What discourages repetition: the history of a sequence, the classic penalties, and DRY.
#pragma once

#include "llama.h"

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace triollama::native {

// The last tokens of a sequence, and how often each occurs within a window that ends at the newest.
class History {
public:
    // Remembers at least `capacity` tokens from now on; counts over the last `window`.
    void configure(size_t capacity, size_t window);

    void push(llama_token token);
    void clear();
    void assign(std::vector<llama_token> tokens);

    size_t size() const { return tokens.size(); }
    llama_token recent(size_t i) const { return tokens[tokens.size() - 1 - i]; }        // 0: the newest
    const std::unordered_map<llama_token, int32_t> & counts() const { return counts_; }
    std::vector<llama_token> kept() const;

private:
    std::vector<llama_token> tokens;
    size_t capacity = 0;
    size_t window   = 0;
    std::unordered_map<llama_token, int32_t> counts_;

    void recount();
};

struct PenaltyParams {
    int32_t last_n    = 0;
    float   repeat    = 1.0f;
    float   frequency = 0.0f;
    float   presence  = 0.0f;

    bool enabled() const { return last_n > 0 && (repeat != 1.0f || frequency != 0.0f || presence != 0.0f); }

    // A logit of a token that occurred `count` times. Dividing a negative logit would reward it, so it is multiplied.
    float apply(float logit, int32_t count) const {
        logit = logit <= 0 ? logit * repeat : logit / repeat;
        return logit - (float(count) * frequency + presence);
    }
};

struct DryParams {
    float   multiplier     = 0.0f;
    float   base           = 1.75f;
    int32_t allowed_length = 2;
    int32_t last_n         = 0;
    std::vector<std::string> breakers;

    bool enabled() const { return multiplier != 0.0f && base >= 1.0f && last_n > 0; }
};

// "Don't repeat yourself" (text-generation-webui#5677): a token that would extend a repetition of at least
// `allowed_length` tokens loses multiplier * base^(length - allowed_length). Breakers end a repetition.
class Dry {
public:
    // Appends (token, what its logit loses). False if there is too little text for a repetition: llama.cpp then leaves its
    // list in the order it has.
    bool penalties(const llama_vocab * vocab, const DryParams & params, const History & history,
                   std::vector<std::pair<llama_token, float>> & out);

    void forget_breakers() { heads.clear(); }       // when the breaker strings change

private:
    // For each token of the history: the token sequences which, after it, complete a breaker string.
    // An empty one: the token holds a whole breaker. Found when a token first matters, not for the whole vocabulary.
    std::unordered_map<llama_token, std::vector<std::vector<llama_token>>> heads;
    std::vector<int32_t> matches;
    std::unordered_map<llama_token, int32_t> longest;

    const std::vector<std::vector<llama_token>> & tails(const llama_vocab * vocab, const DryParams & params,
                                                        llama_token token);
};

}  // namespace triollama::native
