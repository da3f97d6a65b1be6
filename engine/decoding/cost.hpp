// What a step costs, learned from the steps themselves, so that prompts get a share of time and not of tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace triollama::native {

class StepCost {
public:
    explicit StepCost(int32_t max_running) : ordinary_s(max_running + 1, 0.0) {}

    // A step of `n_running` single tokens and no prompt took `seconds`.
    void saw_ordinary(int32_t n_running, double seconds) { blend(ordinary_s[n_running], seconds); }

    // A step with `n_prompt` prompt tokens beside `n_running` took `seconds`.
    void saw_prompt(int32_t n_running, int32_t n_prompt, double seconds) {
        blend(token_s, std::max(seconds - ordinary(n_running), 0.1 * seconds) / n_prompt);
    }

    // What an ordinary step of so many costs; if that was never seen, at least what it must cost, since a running token
    // costs no less than a prompt's; 0 if no fewer were seen either.
    double ordinary(int32_t n_running) const {
        for (int32_t n = n_running; n > 0; n--) {
            if (ordinary_s[n] > 0.0) {
                return ordinary_s[n] + (n_running - n) * token_s;
            }
        }
        return 0.0;
    }
    bool knows(int32_t n_running) const { return ordinary(n_running) > 0.0; }
    double prompt_token() const { return token_s; }

    // As many prompt tokens as fit beside `n_running` into `budget` ordinary steps. Into more of them, in proportion, where
    // many wait and few run: what costs those that run a moment saves it to each that waits, who weighs as much as eight,
    // having had nothing yet. And no less than what the step will cost anyway once the `n_joining` prompts run too. At least one.
    int32_t prompt_tokens(int32_t n_running, int32_t n_joining, double budget, int32_t most) const {
        if (token_s <= 0.0) {
            return std::min(first_guess, most);
        }
        const double now  = ordinary(n_running);
        const double then = ordinary(std::min(n_running + n_joining, (int32_t) ordinary_s.size() - 1));
        const double waiting = std::max(1.0, n_joining / std::max(1.0, n_running / 8.0));
        const double n = std::floor(std::max(budget * waiting * now, then - now) / token_s);
        return (int32_t) std::clamp(n, 1.0, (double) std::max(most, 1));
    }

private:
    // An outlier (a page fault, another process) moves the estimate less than an ordinary sample.
    static void blend(double & estimate, double sample) {
        if (estimate <= 0.0) {
            estimate = sample;
            return;
        }
        const double weight = sample > 3.0 * estimate ? 0.05 : 0.25;
        estimate += weight * (sample - estimate);
    }

    static constexpr int32_t first_guess = 8;
    std::vector<double> ordinary_s;
    double token_s = 0.0;
};

// What bringing back a saved sequence costs, learned likewise: seconds a byte, by where it was kept.
class RestoreCost {
public:
    // Not 0: what each costs is given, not learned.
    RestoreCost(double given_byte_s, double given_token_s) : given_byte_s(given_byte_s), given_token_s(given_token_s) {}

    void saw(bool disk, size_t bytes, double seconds) {
        const double sample = seconds / (double) std::max<size_t>(bytes, 1);
        double & estimate = byte_s[disk];
        estimate += estimate > 0.0 ? 0.25 * (sample - estimate) : sample;
    }

    // Whether `n` tokens are sooner computed again, at `token_s` each, than so many bytes are brought back. While
    // either is unknown they are brought back, which teaches one of the two.
    bool recompute(bool disk, size_t bytes, int32_t n, double token_s) const {
        const double byte  = given_byte_s > 0.0 ? given_byte_s : byte_s[disk];
        const double token = given_token_s > 0.0 ? given_token_s : token_s;
        return byte > 0.0 && token > 0.0 && n * token < (double) bytes * byte;
    }

private:
    const double given_byte_s;
    const double given_token_s;
    double byte_s[2] = {0.0, 0.0};
};

// llama.cpp asks whether to stop between the nodes of its graph, and the longest node is a layer's attention: tokens times
// positions. Deep in a prompt fewer tokens at once keep that as short as it is for a full ubatch at position `span`.
class AttentionBudget {
public:
    // span 0: no limit but the ubatch
    AttentionBudget(int32_t n_ubatch, int32_t span) : n_ubatch(n_ubatch), left(span > 0 ? (int64_t) span * n_ubatch : INT64_MAX) {}

    // Tokens of a prompt at `position` that may join the ubatch. The first prompt always gets some.
    int32_t room(int32_t position) const {
        const int64_t n = left / std::max(position, 1) / tile * tile;
        return (int32_t) std::clamp<int64_t>(n, untouched ? std::min(tile, n_ubatch) : 0, n_ubatch);
    }

    void spend(int32_t position, int32_t n) {
        left -= std::min(left, (int64_t) n * position);
        untouched = false;
    }

private:
    static constexpr int32_t tile = 32;         // matrix products take so many tokens at once; a remainder costs as much
    int32_t n_ubatch;
    int64_t left;
    bool untouched = true;
};

}  // namespace triollama::native
