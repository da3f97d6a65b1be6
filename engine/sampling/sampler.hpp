// The sampling chain: from a row of logits to one token, without the GIL and without a sort of the vocabulary.
#pragma once

#include "grammar/params.hpp"

#include "llama.h"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace triollama::native {

// The stages of a chain, in the order of upstream's default (common.h: common_params_sampling::samplers).
enum class Stage : int32_t {
    logit_bias,
    penalties,
    dry,
    top_n_sigma,
    top_k,
    typical_p,
    top_p,
    min_p,
    xtc,
    temperature,
};

// What every stage does is documented in params.py; a value named here "off" makes its stage a no-op.
struct SamplingParams {
    uint32_t seed = 42;                 // never LLAMA_DEFAULT_SEED: the caller draws the effective seed
    std::vector<Stage> stages;          // applied in this order, each at most once
    int32_t min_keep = 1;
    float   temperature = 0.7f;         // 0: greedy
    float   dynatemp_range = 0.0f;      // off: 0
    float   dynatemp_exponent = 1.0f;
    int32_t top_k = 40;                 // off: 0
    float   top_p = 0.9f;               // off: 1
    float   min_p = 0.0f;               // off: 0
    float   typical_p = 1.0f;           // off: 1
    float   top_n_sigma = -1.0f;        // off: <= 0
    float   xtc_probability = 0.0f;     // off: 0
    float   xtc_threshold = 0.1f;
    float   repeat_penalty = 1.1f;      // off: 1
    float   frequency_penalty = 0.0f;
    float   presence_penalty = 0.0f;
    int32_t penalty_last_n = 64;        // off: 0
    float   dry_multiplier = 0.0f;      // off: 0
    float   dry_base = 1.75f;
    int32_t dry_allowed_length = 2;
    int32_t dry_last_n = 1024;
    std::vector<std::string> dry_breakers;
    int32_t mirostat = 0;               // 0, 1 or 2; replaces truncation (bias, penalties, DRY, temperature stay)
    float   mirostat_tau = 5.0f;
    float   mirostat_eta = 0.1f;
    int32_t mirostat_m = 100;
    float   adaptive_target = -1.0f;    // off: < 0
    float   adaptive_decay = 0.9f;
    std::vector<llama_logit_bias> logit_bias;
    std::vector<llama_token> banned;    // never chosen, whatever the stages
    GrammarParams grammar;
};

struct TokenLogprob {
    llama_token id;
    float       logprob;                // natural log of softmax(logits)
};

// One sequence's sampler. Not thread-safe; owned by whoever drives the sequence.
//
// For a seed, tokens equal those of llama.cpp's own samplers in the same order, closed by its dist, mirostat or
// adaptive-p: exactly where the first stage that drops tokens is top-k or min-p, or the choice is greedy; otherwise up to
// the rounding of sums over the vocabulary, which are taken in double here and in float there. Where llama.cpp computes
// with NaN (typical-p with a candidate of probability 0), converts out of range (mirostat 1 on a flat row) or takes for sorted
// what a bias has changed (logit_bias after a stage that sorts), this does not.
//
// Methods may throw std::invalid_argument (a parameter, or nothing left to choose from), grammar_error, state_error,
// std::runtime_error (logits that are no numbers) and std::bad_alloc.
class Sampler {
public:
    Sampler(const llama_vocab * vocab, SamplingParams params);
    ~Sampler();
    Sampler(const Sampler &) = delete;
    Sampler & operator=(const Sampler &) = delete;

    // Picks a token. `logits` has n_vocab floats; some are patched during the call and restored before it returns,
    // also by an exception. The token is not recorded: accept() does that.
    llama_token sample(float * logits);

    // Records a token, generated or of the prompt. Prompt tokens count for penalties and DRY, not for the grammar.
    // If it throws grammar_error because the token may not follow, nothing was recorded.
    void accept(llama_token token, bool generated);

    // Tokens that follow whatever is sampled, since the grammar leaves no choice (Grammar::forced) and nothing else forbids
    // them; none of them is recorded yet.
    std::vector<llama_token> forced() const;

    // The candidates that the last sample() chose from, with their final probabilities, most likely first.
    // Those without probability are left out.
    void candidates(std::vector<llama_token_data> & out) const;

    void reset();                                    // as constructed
    std::unique_ptr<Sampler> clone() const;          // same state, independent from here on

    // New parameters from the next token on. History and random state stay (so does their seed), mirostat's and
    // adaptive-p's averages if the new parameters use them too, the grammar's state if the grammar is the same.
    void update(SamplingParams params);

    // Everything that decides the next token except the parameters: random state, averages, history, the tokens the
    // grammar took. Versioned and checksummed; independent of the machine.
    std::string save_state() const;
    void load_state(std::string_view bytes);         // throws state_error and changes nothing if it does not fit

    const SamplingParams & params() const;
    uint32_t seed() const;                           // of the random state, which load_state may have replaced
    bool is_grammar_done() const;                    // a grammar is set and only end-of-generation may follow

private:
    struct Impl;
    explicit Sampler(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl;
};

// Selection straight from logits, vectorised. `n` is the vocabulary's size.
llama_token argmax(const float * logits, int32_t n);          // the first of equals, as upstream's greedy
double      log_sum_exp(const float * logits, int32_t n);     // natural log of the softmax denominator
// Fills `out` with the k most likely tokens, most likely first.
void        top_logprobs(const float * logits, int32_t n, int32_t k, std::vector<TokenLogprob> & out);

}  // namespace triollama::native
