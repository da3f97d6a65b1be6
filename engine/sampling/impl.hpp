// The insides of a Sampler. The files that work on them: sampler.cpp (parameters, the chain), row.cpp and
// list.cpp (the stages), choice.cpp (the last stage), state.cpp (save and load).
#pragma once

#include "grammar/grammar.hpp"
#include "guards/errors.hpp"
#include "sampling/repetition.hpp"
#include "sampling/sampler.hpp"
#include "sampling/select.hpp"

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace triollama::native {

constexpr float infinity = std::numeric_limits<float>::infinity();

// std::mt19937 that knows how often it was asked: seed and count are all of its state.
class CountedEngine {
public:
    using result_type = std::mt19937::result_type;

    explicit CountedEngine(uint32_t seed = 0, uint64_t draws = 0) : seed_(seed), draws_(draws), engine(seed) {
        engine.discard(draws);
    }

    result_type operator()() {
        ++draws_;
        return engine();
    }
    static constexpr result_type min() { return std::mt19937::min(); }
    static constexpr result_type max() { return std::mt19937::max(); }

    uint32_t seed()  const { return seed_; }
    uint64_t draws() const { return draws_; }

private:
    uint32_t seed_;
    uint64_t draws_;
    std::mt19937 engine;
};

// What decides the next token, besides the parameters and the grammar.
struct State {
    CountedEngine rng;                  // of the stage that chooses
    CountedEngine xtc_rng;              // XTC has its own, with the same seed
    float       mu           = 0.0f;    // mirostat's running bound of surprise
    float       weighted_sum = 0.0f;    // adaptive-p's running averages
    float       total_weight = 0.0f;
    llama_token pending      = LLAMA_TOKEN_NULL;   // adaptive-p: chosen, not yet accepted
    float       pending_prob = 0.0f;
    History     history;
};

struct SamplerDeleter {
    void operator()(llama_sampler * sampler) const { llama_sampler_free(sampler); }
};
using OwnedSampler = std::unique_ptr<llama_sampler, SamplerDeleter>;

// Puts patched logits back when the call ends, whichever way it ends.
class Patches {
public:
    explicit Patches(float * logits) : logits(logits) {}
    ~Patches() {
        for (auto patch = saved.rbegin(); patch != saved.rend(); ++patch) {
            logits[patch->first] = patch->second;
        }
    }
    Patches(const Patches &) = delete;
    Patches & operator=(const Patches &) = delete;

    void set(llama_token token, float logit) {
        saved.emplace_back(token, logits[token]);
        logits[token] = logit;
    }

private:
    float * logits;
    std::vector<std::pair<llama_token, float>> saved;
};

inline float highest(const std::vector<llama_token_data> & list) {
    float best = -infinity;
    for (const llama_token_data & token : list) {
        best = std::max(best, token.logit);
    }
    return best;
}

[[noreturn]] inline void throw_nothing_left() {
    throw std::invalid_argument("every token is banned (a logit of -inf): there is nothing to choose from; "
                                "look at logit_bias and ignore_eos");
}

// A chain runs on the row (all logits, in order of id) until a stage leaves few candidates; from there on it runs on
// a list. On the list llama.cpp's own stateless samplers do the work, so that the result is theirs bit for bit; on the row
// everything is ours, and nothing is sorted but what is kept.
struct Sampler::Impl {
    const llama_vocab * vocab;
    int32_t n_vocab;
    SamplingParams params;
    State state;
    std::unique_ptr<Grammar> grammar;
    Dry dry;

    // Derived from the parameters.
    std::vector<Stage> active;                  // the stages that do something
    std::vector<llama_token> banned;            // by the model, or by params
    PenaltyParams penalty;
    DryParams dry_params;
    OwnedSampler sorter, top_k, top_p, min_p, typical, top_n_sigma, temperature;

    // The working set of one sample() call, kept for its memory and for candidates().
    RowScan scan;
    bool scanned = false;
    std::vector<float> scratch;                 // the row, once a stage had to change all of it
    float * x = nullptr;                        // the row: the caller's logits or scratch
    size_t row_size = 0;                        // candidates on the row, as llama.cpp counts them
    bool row_sorted = false;                    // llama.cpp's array would be sorted here: ranks decide the order
    std::vector<llama_token_data> list;
    bool list_sorted = false;
    std::vector<float> weights;
    std::vector<double> block_sums;
    double total_weight = 0.0;
    Rings rings;
    enum class Chosen { nothing, row, list } chosen = Chosen::nothing;

    // ---- sampler.cpp: parameters
    Impl(const llama_vocab * vocab, SamplingParams new_params);
    Impl(const Impl & other);           // in the same state; its working set starts empty
    void configure(SamplingParams p);
    bool is_active(Stage stage) const;
    bool forbids(llama_token token) const;      // whatever the row
    float dynamic_range() const { return params.mirostat ? 0.0f : params.dynatemp_range; }
    bool is_greedy() const { return params.temperature == 0.0f && dynamic_range() == 0.0f; }
    void restart();
    void start_mirostat() { state.mu = 2.0f * params.mirostat_tau; }
    void start_adaptive();

    // ---- row.cpp
    void ensure_scan();
    void patch(Patches & patches, llama_token token, float logit);
    void patch_row(Stage stage, Patches & patches);
    float * use_scratch();
    void list_top_k(size_t k, llama_sampler * exact);
    void list_ranked(size_t k);
    bool has_ties(size_t k) const;
    void pad_list(size_t k);
    void list_everything();
    bool list_allowed_top_k(size_t k, bool ranked);
    [[noreturn]] void throw_dead_end() const {
        throw grammar_error("no token of the vocabulary continues the text under the grammar "
                            "(tokens banned by logit_bias or ignore_eos do not count)");
    }
    void mask_row();
    bool is_greedy_from(size_t i) const;
    bool sorts_from(size_t i) const;
    void list_only(llama_token token, float logit);
    void list_argmax();
    double weigh_row();
    bool apply_to_row(Stage stage);
    void list_top_p();
    bool cut_at_top_p(double total);
    void list_typical();
    bool xtc_strikes();
    void exclude_top_choices();
    bool heat_row();

    // ---- list.cpp
    void apply(llama_sampler * sampler);
    void apply_to_list(Stage stage);
    void softmax(bool sorted);
    size_t draw_discrete();

    // ---- choice.cpp
    double draw_uniform();
    llama_token choose_from_list();
    llama_token last_likely() const;
    llama_token choose_from_row();
    llama_token pick_by_id(double target) const;
    llama_token pick_by_rank(double target);
    void list_for_mirostat();
    size_t mirostat_1_size() const;
    size_t mirostat_2_size() const;
    void cut_for_mirostat();
    llama_token choose_by_mirostat();
    float adapted_target() const;
    llama_token choose_adaptively_from_list();
    llama_token choose_adaptively_from_row();

    // ---- sampler.cpp: the chain
    llama_token run(float * logits, bool constrained);
    llama_token sample(float * logits);
    void accept(llama_token token, bool generated);
    void candidates(std::vector<llama_token_data> & out) const;
    void update(SamplingParams p);

    // ---- state.cpp
    std::string save() const;
    void load(std::string_view bytes);
};

}  // namespace triollama::native
