#include "sampling.hpp"

#include "grammar.hpp"
#include "native_errors.hpp"
#include "repetition.hpp"
#include "select.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <unordered_map>

namespace triollama {

namespace {

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

bool is_patch(Stage stage) {
    return stage == Stage::logit_bias || stage == Stage::penalties || stage == Stage::dry;
}

// Stages that never drop the most likely token, nor change which it is.
bool keeps_first(Stage stage) {
    return stage == Stage::top_k || stage == Stage::top_p || stage == Stage::min_p || stage == Stage::top_n_sigma;
}

void check(bool good, const char * name, double value, const char * what) {
    if (!good) {
        throw std::invalid_argument(std::string(name) + " must be " + what + ", not " + std::to_string(value));
    }
}

void validate(const SamplingParams & p, int32_t n_vocab) {
    const char * from_zero = "a finite number of at least 0";
    const char * share     = "from 0 to 1";
    auto finite_from = [](double value, double low) { return std::isfinite(value) && value >= low; };
    check(p.seed != LLAMA_DEFAULT_SEED, "seed", p.seed, "less than 4294967295");
    check(p.min_keep >= 1, "min_keep", p.min_keep, "at least 1");
    check(finite_from(p.temperature, 0), "temperature", p.temperature, from_zero);
    check(finite_from(p.dynatemp_range, 0), "dynatemp_range", p.dynatemp_range, from_zero);
    check(finite_from(p.dynatemp_exponent, 0), "dynatemp_exponent", p.dynatemp_exponent, from_zero);
    check(p.top_k >= 0, "top_k", p.top_k, "at least 0");
    check(p.top_p >= 0 && p.top_p <= 1, "top_p", p.top_p, share);
    check(p.min_p >= 0 && p.min_p <= 1, "min_p", p.min_p, share);
    check(p.typical_p >= 0 && p.typical_p <= 1, "typical_p", p.typical_p, share);
    check(std::isfinite(p.top_n_sigma), "top_n_sigma", p.top_n_sigma, "finite");
    check(p.xtc_probability >= 0 && p.xtc_probability <= 1, "xtc_probability", p.xtc_probability, share);
    check(p.xtc_threshold >= 0 && p.xtc_threshold <= 1, "xtc_threshold", p.xtc_threshold, share);
    check(std::isfinite(p.repeat_penalty) && p.repeat_penalty > 0 && std::isfinite(1.0f / p.repeat_penalty),
          "repeat_penalty", p.repeat_penalty, "a finite number above 0");
    check(std::isfinite(p.frequency_penalty), "frequency_penalty", p.frequency_penalty, "finite");
    check(std::isfinite(p.presence_penalty), "presence_penalty", p.presence_penalty, "finite");
    check(p.penalty_last_n >= 0, "penalty_last_n", p.penalty_last_n, "at least 0");
    check(finite_from(p.dry_multiplier, 0), "dry_multiplier", p.dry_multiplier, from_zero);
    check(finite_from(p.dry_base, 1), "dry_base", p.dry_base, "a finite number of at least 1");
    check(p.dry_allowed_length >= 0, "dry_allowed_length", p.dry_allowed_length, "at least 0");
    check(p.dry_last_n >= 0, "dry_last_n", p.dry_last_n, "at least 0");
    check(p.mirostat >= 0 && p.mirostat <= 2, "mirostat", p.mirostat, "0, 1 or 2");
    check(finite_from(p.mirostat_tau, 0), "mirostat_tau", p.mirostat_tau, from_zero);
    check(finite_from(p.mirostat_eta, 0), "mirostat_eta", p.mirostat_eta, from_zero);
    check(p.mirostat_m >= 1, "mirostat_m", p.mirostat_m, "at least 1");
    check(p.adaptive_target <= 1, "adaptive_target", p.adaptive_target, "at most 1");
    check(p.adaptive_decay >= 0 && p.adaptive_decay <= 0.99f, "adaptive_decay", p.adaptive_decay, "from 0 to 0.99");
    for (const llama_logit_bias & bias : p.logit_bias) {
        check(bias.token >= 0 && bias.token < n_vocab, "logit_bias's token", bias.token, "in the vocabulary");
        check(!std::isnan(bias.bias) && bias.bias < infinity, "logit_bias", bias.bias, "a finite number or -inf");
    }
    std::vector<Stage> seen;
    for (const Stage stage : p.stages) {
        check(std::find(seen.begin(), seen.end(), stage) == seen.end(), "a stage", (double) stage, "named once");
        seen.push_back(stage);
    }
}

GrammarParams grammar_params(const SamplingParams & p) {
    return { p.grammar, p.grammar_root, p.grammar_lazy, p.grammar_trigger_patterns, p.grammar_trigger_tokens };
}

float highest(const std::vector<llama_token_data> & list) {
    float best = -infinity;
    for (const llama_token_data & token : list) {
        best = std::max(best, token.logit);
    }
    return best;
}

[[noreturn]] void throw_nothing_left() {
    throw std::invalid_argument("every token is banned (a logit of -inf): there is nothing to choose from; "
                                "look at logit_bias and ignore_eos");
}

// Little-endian writer and reader of state bytes.
class ByteWriter {
public:
    std::string bytes;

    void u32(uint32_t value) { put(value, 4); }
    void u64(uint64_t value) { put(value, 8); }
    void f32(float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        u32(bits);
    }
    void tokens(const std::vector<llama_token> & values) {
        u32((uint32_t) values.size());
        for (const llama_token value : values) {
            u32((uint32_t) value);
        }
    }

private:
    void put(uint64_t value, int size) {
        for (int i = 0; i < size; ++i) {
            bytes.push_back((char) (value >> (8 * i)));
        }
    }
};

class ByteReader {
public:
    explicit ByteReader(std::string_view bytes) : bytes(bytes) {}

    uint32_t u32() { return (uint32_t) get(4); }
    uint64_t u64() { return get(8); }
    float f32() {
        const uint32_t bits = u32();
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        if (!std::isfinite(value)) {
            throw state_error("the sampler state holds a number that is not finite");
        }
        return value;
    }
    std::vector<llama_token> tokens(int32_t n_vocab) {
        const uint32_t count = u32();
        if ((bytes.size() - pos) / 4 < count) {
            throw state_error("the sampler state is cut short");
        }
        std::vector<llama_token> values(count);
        for (llama_token & value : values) {
            value = (llama_token) u32();
            if (value < 0 || value >= n_vocab) {
                throw state_error("the sampler state holds a token outside the vocabulary");
            }
        }
        return values;
    }
    size_t left() const { return bytes.size() - pos; }

private:
    std::string_view bytes;
    size_t pos = 0;

    uint64_t get(size_t size) {
        if (bytes.size() - pos < size) {
            throw state_error("the sampler state is cut short");
        }
        uint64_t value = 0;
        for (size_t i = 0; i < size; ++i) {
            value |= (uint64_t) (unsigned char) bytes[pos + i] << (8 * i);
        }
        pos += size;
        return value;
    }
};

constexpr uint32_t state_magic    = 0x53534c54;            // "TLSS"
constexpr uint32_t state_version  = 1;
constexpr uint64_t most_draws     = 1ull << 32;            // replaying them takes seconds at most

uint64_t checksum(std::string_view bytes) {
    uint64_t value = 0xcbf29ce484222325ull;                // FNV-1a
    for (const char byte : bytes) {
        value = (value ^ (unsigned char) byte) * 0x100000001b3ull;
    }
    return value;
}

}  // namespace

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
    std::vector<llama_token> banned;            // by the model, or by ignore_eos
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

    Impl(const llama_vocab * vocab, SamplingParams new_params)
        : vocab(vocab), n_vocab(llama_vocab_n_tokens(vocab)) {
        configure(std::move(new_params));
        restart();
    }

    // A copy in the same state; its working set starts empty.
    Impl(const Impl & other)
        : vocab(other.vocab), n_vocab(other.n_vocab), state(other.state),
          grammar(other.grammar ? std::make_unique<Grammar>(*other.grammar) : nullptr), dry(other.dry) {
        configure(other.params);
    }

    void configure(SamplingParams p) {
        validate(p, n_vocab);
        std::unique_ptr<Grammar> new_grammar;
        const bool same_grammar = grammar && grammar->params() == grammar_params(p);
        if (!p.grammar.empty() && !same_grammar) {
            new_grammar = std::make_unique<Grammar>(vocab, grammar_params(p));
        }
        // Nothing is changed before this line; allocation aside, nothing throws after it.
        if (!same_grammar) {
            grammar = std::move(new_grammar);
        }
        if (p.dry_breakers != params.dry_breakers) {
            dry.forget_breakers();
        }
        params = std::move(p);

        penalty    = { params.penalty_last_n, params.repeat_penalty, params.frequency_penalty, params.presence_penalty };
        dry_params = { params.dry_multiplier, params.dry_base, params.dry_allowed_length, params.dry_last_n,
                       params.dry_breakers };
        active.clear();
        for (const Stage stage : params.stages) {
            if (is_active(stage)) {
                active.push_back(stage);
            }
        }
        banned.clear();
        int32_t n_suppressed = 0;
        const llama_token * suppressed = llama_vocab_get_suppress_tokens(vocab, &n_suppressed);
        for (int32_t i = 0; i < n_suppressed; ++i) {
            if (suppressed[i] >= 0 && suppressed[i] < n_vocab) {
                banned.push_back(suppressed[i]);
            }
        }
        if (params.ignore_eos) {
            for (llama_token id = 0; id < n_vocab; ++id) {
                if (llama_vocab_is_eog(vocab, id)) {
                    banned.push_back(id);
                }
            }
        }

        const auto keep = (size_t) params.min_keep;
        sorter.reset(llama_sampler_init_top_k(std::numeric_limits<int32_t>::max()));
        top_k.reset(llama_sampler_init_top_k(params.top_k));
        top_p.reset(llama_sampler_init_top_p(params.top_p, keep));
        min_p.reset(llama_sampler_init_min_p(params.min_p, keep));
        typical.reset(llama_sampler_init_typical(params.typical_p, keep));
        top_n_sigma.reset(llama_sampler_init_top_n_sigma(params.top_n_sigma));
        temperature.reset(params.mirostat ? llama_sampler_init_temp(params.temperature)
                                          : llama_sampler_init_temp_ext(params.temperature, params.dynatemp_range,
                                                                        params.dynatemp_exponent));
        state.history.configure((size_t) std::max(params.penalty_last_n, params.dry_last_n),
                                penalty.enabled() ? (size_t) params.penalty_last_n : 0);
    }

    bool is_active(Stage stage) const {
        switch (stage) {
            case Stage::logit_bias:  return !params.logit_bias.empty();
            case Stage::penalties:   return penalty.enabled();
            case Stage::dry:         return dry_params.enabled();
            case Stage::temperature: return params.temperature != 1.0f || dynamic_range() > 0.0f;
            default: break;
        }
        if (params.mirostat) {
            return false;
        }
        switch (stage) {
            case Stage::top_n_sigma: return params.top_n_sigma > 0.0f;
            case Stage::top_k:       return params.top_k > 0;
            case Stage::typical_p:   return params.typical_p < 1.0f;
            case Stage::top_p:       return params.top_p < 1.0f;
            case Stage::min_p:       return params.min_p > 0.0f;
            case Stage::xtc:         return params.xtc_probability > 0.0f && params.xtc_threshold <= 0.5f;
            default:                 return false;
        }
    }

    float dynamic_range() const { return params.mirostat ? 0.0f : params.dynatemp_range; }
    bool is_greedy() const { return params.temperature == 0.0f && dynamic_range() == 0.0f; }

    void restart() {
        state.rng     = CountedEngine(params.seed);
        state.xtc_rng = CountedEngine(params.seed);
        start_mirostat();
        start_adaptive();
        state.history.clear();
        chosen = Chosen::nothing;
    }

    void start_mirostat() { state.mu = 2.0f * params.mirostat_tau; }

    void start_adaptive() {
        state.weighted_sum = params.adaptive_target / (1.0f - params.adaptive_decay);
        state.total_weight = 1.0f / (1.0f - params.adaptive_decay);
        state.pending      = LLAMA_TOKEN_NULL;
        state.pending_prob = 0.0f;
    }

    // ---- the row

    void ensure_scan() {
        if (scanned) {
            return;
        }
        scan.run(x, n_vocab);
        scanned = true;
        if (scan.has_nan || scan.max == infinity) {
            throw std::runtime_error("the logits hold NaN or infinity: the model's computation failed "
                                     "(damaged weights, or values beyond the range of their type)");
        }
        if (scan.max == -infinity) {
            throw_nothing_left();
        }
    }

    void patch(Patches & patches, llama_token token, float logit) {
        if (x == scratch.data()) {
            x[token] = logit;
        } else {
            patches.set(token, logit);
        }
        scanned = false;
    }

    void patch_row(Stage stage, Patches & patches) {
        if (stage == Stage::logit_bias) {
            for (const llama_logit_bias & bias : params.logit_bias) {
                patch(patches, bias.token, x[bias.token] + bias.bias);
            }
        } else if (stage == Stage::penalties) {
            for (const auto & entry : state.history.counts()) {
                patch(patches, entry.first, penalty.apply(x[entry.first], entry.second));
            }
        } else {
            for (const auto & loss : dry_losses()) {
                patch(patches, loss.first, x[loss.first] - loss.second);
            }
        }
    }

    std::vector<std::pair<llama_token, float>> dry_losses() {
        std::vector<std::pair<llama_token, float>> losses;
        dry.penalties(vocab, dry_params, state.history, losses);
        return losses;
    }

    float * use_scratch() {
        scratch.resize((size_t) n_vocab);
        return scratch.data();
    }

    // The k most likely tokens become the list, in llama.cpp's order.
    void list_top_k(size_t k) {
        ensure_scan();
        k = std::min(k, (size_t) n_vocab);
        list.clear();
        if (k == 1 && scan.is_max_unique(x, n_vocab)) {
            const int32_t best = scan.argmax(x, n_vocab);
            list.push_back({ best, x[best], 0.0f });
        } else {
            scan.collect(x, n_vocab, scan.threshold_for(x, n_vocab, k), list);
            sort_by_logit(list);
            if (has_ties(k)) {
                // Which of equals come first, or are kept at all, only llama.cpp's own algorithm can tell.
                list_everything();
                apply(OwnedSampler(llama_sampler_init_top_k((int32_t) k)).get());
                return;
            }
            pad_list(k);
        }
        list_sorted = true;
    }

    bool has_ties(size_t k) const {
        for (size_t i = 1; i < std::min(list.size(), k + 1); ++i) {
            if (list[i - 1].logit == list[i].logit) {
                return true;
            }
        }
        return false;
    }

    // Cuts to k; places that no token with a finite logit takes are filled, since some stages count candidates.
    void pad_list(size_t k) {
        const llama_token filler = list.front().id;
        list.resize(k, { filler, -infinity, 0.0f });
    }

    void list_everything() {
        list.resize((size_t) n_vocab);
        for (int32_t id = 0; id < n_vocab; ++id) {
            list[(size_t) id] = { id, x[id], 0.0f };
        }
        list_sorted = false;
    }

    // The k most likely tokens that the grammar allows become the list. Whether a token is allowed does not depend
    // on the others, so the most likely are tried first, and all of them only if these do not hold k.
    // Returns false if there are equals whose order only llama.cpp's algorithm can tell (unless order does not matter).
    bool list_allowed_top_k(size_t k, bool ranked) {
        ensure_scan();
        k = std::min(k, (size_t) n_vocab);
        std::vector<llama_token_data> tokens;
        scan.collect(x, n_vocab, scan.threshold_for(x, n_vocab, std::max<size_t>(256, 2 * k)), tokens);
        std::vector<llama_token_data> masked(tokens);
        grammar->mask(masked);
        list.clear();
        for (size_t i = 0; i < tokens.size(); ++i) {
            if (masked[i].logit != -infinity) {
                list.push_back(tokens[i]);
            }
        }
        if (list.size() < k) {
            list.clear();
            for (const llama_token token : grammar->allowed()) {
                if (x[token] != -infinity) {
                    list.push_back({ token, x[token], 0.0f });
                }
            }
            if (list.empty()) {
                throw_dead_end();
            }
        }
        sort_by_logit(list);
        if (ranked && has_ties(k)) {
            return false;
        }
        pad_list(k);
        list_sorted = true;
        return true;
    }

    [[noreturn]] void throw_dead_end() const {
        throw grammar_error("no token of the vocabulary continues the text under the grammar "
                            "(tokens banned by logit_bias or ignore_eos do not count)");
    }

    // The row without the tokens that the grammar forbids.
    void mask_row() {
        ensure_scan();
        std::vector<float> masked((size_t) n_vocab, -infinity);
        for (const llama_token token : grammar->allowed()) {
            masked[(size_t) token] = x[token];
        }
        scratch = std::move(masked);
        x = scratch.data();
        scan.run(x, n_vocab);
        if (scan.max == -infinity) {
            throw_dead_end();
        }
    }

    // From stage i on, does the chain do nothing but choose the most likely token?
    bool is_greedy_from(size_t i) const {
        while (i < active.size() && keeps_first(active[i])) {
            ++i;
        }
        return i < active.size() && active[i] == Stage::temperature && is_greedy();
    }

    // Does a stage before the temperature sort? Then it decides which of several equal maxima comes first.
    bool sorts_from(size_t i) const {
        for (; i < active.size() && keeps_first(active[i]); ++i) {
            if (active[i] == Stage::top_k || active[i] == Stage::top_p) {
                return true;
            }
        }
        return false;
    }

    // One candidate; and one without probability, where llama.cpp would have kept the others as such.
    void list_only(llama_token token, float logit) {
        list.assign(1, { token, logit, 0.0f });
        if (n_vocab > 1) {
            list.push_back({ token == 0 ? 1 : 0, -infinity, 0.0f });
        }
        list_sorted = true;
    }

    void list_argmax() {
        ensure_scan();
        const int32_t best = scan.argmax(x, n_vocab);
        list_only(best, x[best]);
    }

    double weigh_row() {
        ensure_scan();
        weights.resize((size_t) n_vocab);
        block_sums.resize((size_t) block_count(n_vocab));
        total_weight = exp_weights(x, n_vocab, scan.max, weights.data(), block_sums.data());
        return total_weight;
    }

    // Applies a stage to the row. Returns true once the candidates are on the list.
    bool apply_to_row(Stage stage) {
        ensure_scan();
        switch (stage) {
            case Stage::top_n_sigma: {
                const Moments moments = finite_moments(x, n_vocab, scan.max);
                const float threshold = scan.max - params.top_n_sigma * (float) moments.deviation;
                float * masked = use_scratch();
                mask_below(x, n_vocab, threshold, masked);
                mask_below(scan.maxima.data(), (int32_t) scan.maxima.size(), threshold, scan.maxima.data());
                x = masked;
                return false;
            }
            case Stage::top_k:
                list_top_k((size_t) params.top_k);
                return true;
            case Stage::typical_p:
                list_typical();
                return true;
            case Stage::top_p:
                list_top_p();
                return true;
            case Stage::min_p: {
                list.clear();
                scan.collect(x, n_vocab, scan.max + logf(params.min_p), list);
                list_sorted = false;
                if (list.size() < (size_t) params.min_keep) {
                    list_top_k((size_t) params.min_keep);
                } else if (row_sorted) {
                    sort_by_logit(list);
                    list_sorted = true;
                }
                return true;
            }
            case Stage::xtc:
                exclude_top_choices();
                return false;
            case Stage::temperature:
                return heat_row();
            default:
                throw std::logic_error("not a stage of the row");
        }
    }

    // The smallest set of the most likely tokens whose probability reaches top_p.
    void list_top_p() {
        const auto keep = (size_t) params.min_keep;
        const double total = exp_weights(x, n_vocab, scan.max, nullptr, nullptr);
        constexpr size_t usually_enough = 256;
        list.clear();
        scan.collect(x, n_vocab, scan.threshold_for(x, n_vocab, std::max(keep, usually_enough)), list);
        sort_by_logit(list);
        if (cut_at_top_p(total)) {
            return;
        }
        // A flat distribution: find how far down the set reaches before anything is sorted.
        weigh_row();
        rings.run(x, weights.data(), n_vocab, scan.max);
        const int32_t ring = rings.reach((double) params.top_p * total * (1.0 + 1e-6), keep);
        list.clear();
        rings.members_within(x, n_vocab, ring, list);
        sort_by_logit(list);
        cut_at_top_p(total);
        pad_list(std::max(list.size(), std::min(keep, (size_t) n_vocab)));
    }

    bool cut_at_top_p(double total) {
        list_sorted = true;
        double running = 0.0;
        for (size_t i = 0; i < list.size(); ++i) {
            running += expf(list[i].logit - scan.max) / total;
            if (running >= params.top_p && i + 1 >= (size_t) params.min_keep) {
                list.resize(i + 1);
                return true;
            }
        }
        return false;
    }

    // The tokens whose surprise is nearest to the expected surprise. Since surprise is a constant less the logit, these
    // are the logits nearest to the expected logit: no entropy is needed to order them.
    void list_typical() {
        const ExpSums sums = exp_sums(x, n_vocab, scan.max);
        const double expected = scan.max + sums.sum_distance / sums.sum;
        weigh_row();
        rings.run(x, weights.data(), n_vocab, (float) expected);
        const auto keep = (size_t) params.min_keep;
        const int32_t ring = rings.reach((double) params.typical_p * sums.sum * (1.0 + 1e-6), keep);
        list.clear();
        rings.members_within(x, n_vocab, ring, list);
        std::sort(list.begin(), list.end(), [&](const llama_token_data & a, const llama_token_data & b) {
            const double da = std::fabs(a.logit - expected);
            const double db = std::fabs(b.logit - expected);
            return da != db ? da < db : a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
        });
        double running = 0.0;
        for (size_t i = 0; i < list.size(); ++i) {
            running += expf(list[i].logit - scan.max) / sums.sum;
            if (running > params.typical_p && i + 1 >= keep) {
                list.resize(i + 1);
                break;
            }
        }
        list_sorted = false;
    }

    bool xtc_strikes() {
        std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
        return uniform(state.xtc_rng) <= params.xtc_probability;
    }

    // Of the tokens with at least the threshold's probability, all but the least likely are dropped.
    void exclude_top_choices() {
        if (row_size < 2 || !xtc_strikes()) {
            return;
        }
        const double total = exp_weights(x, n_vocab, scan.max, nullptr, nullptr);
        const auto log_total = (float) std::log(total);
        std::vector<llama_token_data> top;
        scan.collect(x, n_vocab, scan.max + logf(params.xtc_threshold) + log_total - 1e-3f, top);
        sort_by_logit(top);
        size_t last = 0;
        for (size_t i = 0; i < top.size(); ++i) {
            if (expf(top[i].logit - scan.max) / (float) total < params.xtc_threshold) {
                break;
            }
            last = i;
        }
        row_sorted = true;
        if (last == 0 || row_size - last < (size_t) params.min_keep) {
            return;
        }
        float * kept = use_scratch();
        if (kept != x) {
            std::copy(x, x + n_vocab, kept);
            x = kept;
        }
        for (size_t i = 0; i < last; ++i) {
            x[top[i].id] = -infinity;
        }
        row_size -= last;
        scanned = false;
    }

    bool heat_row() {
        float divisor = params.temperature;
        if (dynamic_range() > 0.0f) {
            if (row_size <= 1) {
                return false;
            }
            // Temperature follows the entropy, as a share of the largest that so many candidates can have.
            const ExpSums sums = exp_sums(x, n_vocab, scan.max);
            const double entropy = std::log(sums.sum) - sums.sum_distance / sums.sum;
            const auto share = (float) (std::max(0.0, entropy) / std::log((double) row_size));
            const float low  = std::max(0.0f, params.temperature - params.dynatemp_range);
            const float high = params.temperature + params.dynatemp_range;
            divisor    = low + (high - low) * powf(share, params.dynatemp_exponent);
            row_sorted = true;
        }
        if (!(divisor > 0.0f) || !std::isfinite(scan.max / divisor)) {
            list_argmax();      // too cold for floats: the limit is greedy
            return true;
        }
        float * heated = use_scratch();
        divide(x, n_vocab, divisor, heated);
        divide(scan.maxima.data(), (int32_t) scan.maxima.size(), divisor, scan.maxima.data());
        scan.max /= divisor;
        x = heated;
        return false;
    }

    // ---- the list

    void apply(llama_sampler * sampler) {
        llama_token_data_array array = { list.data(), list.size(), -1, list_sorted };
        llama_sampler_apply(sampler, &array);
        list.resize(array.size);
        list_sorted = array.sorted;
    }

    void apply_to_list(Stage stage) {
        switch (stage) {
            case Stage::logit_bias: {
                std::unordered_map<llama_token, float> bias;
                for (const llama_logit_bias & entry : params.logit_bias) {
                    bias[entry.token] += entry.bias;
                }
                for (llama_token_data & token : list) {
                    const auto found = bias.find(token.id);
                    if (found != bias.end()) {
                        token.logit += found->second;
                    }
                }
                list_sorted = false;
                break;
            }
            case Stage::penalties:
                for (llama_token_data & token : list) {
                    const auto found = state.history.counts().find(token.id);
                    if (found != state.history.counts().end()) {
                        token.logit = penalty.apply(token.logit, found->second);
                    }
                }
                list_sorted = false;
                break;
            case Stage::dry: {
                std::unordered_map<llama_token, float> losses;
                for (const auto & loss : dry_losses()) {
                    losses.insert(loss);
                }
                for (llama_token_data & token : list) {
                    const auto found = losses.find(token.id);
                    if (found != losses.end()) {
                        token.logit -= found->second;
                    }
                }
                list_sorted = false;
                break;
            }
            case Stage::top_n_sigma: apply(top_n_sigma.get()); break;
            case Stage::top_k:       apply(top_k.get()); break;
            case Stage::top_p:       apply(top_p.get()); break;
            case Stage::min_p:       apply(min_p.get()); break;
            case Stage::typical_p: {
                // A probability of 0 would make the entropy NaN.
                const float lowest = highest(list) - 87.0f;
                list.erase(std::remove_if(list.begin(), list.end(), [&](const llama_token_data & token) {
                    return token.logit < lowest;
                }), list.end());
                apply(typical.get());
                break;
            }
            case Stage::xtc:
                if (list.size() >= 2 && xtc_strikes()) {
                    softmax(true);
                    size_t last = 0;
                    for (size_t i = 0; i < list.size() && list[i].p > 0.0f && list[i].p >= params.xtc_threshold; ++i) {
                        last = i;
                    }
                    if (last > 0 && list.size() - last >= (size_t) params.min_keep) {
                        list.erase(list.begin(), list.begin() + (ptrdiff_t) last);
                    }
                }
                break;
            case Stage::temperature: {
                const auto best = *std::max_element(list.begin(), list.end(), [](const auto & a, const auto & b) {
                    return a.logit < b.logit;
                });
                apply(temperature.get());
                if (!std::isfinite(highest(list))) {
                    list_only(best.id, best.logit);
                }
                break;
            }
        }
        if (highest(list) == -infinity) {
            throw_nothing_left();
        }
    }

    void softmax(bool sorted) {
        if (sorted && !list_sorted) {
            apply(sorter.get());
        }
        const float best = list_sorted ? list.front().logit : highest(list);
        float sum = 0.0f;
        for (llama_token_data & token : list) {
            token.p = expf(token.logit - best);
            sum += token.p;
        }
        for (llama_token_data & token : list) {
            token.p /= sum;
        }
    }

    size_t draw_discrete() {
        std::vector<double> probabilities;
        probabilities.reserve(list.size());
        for (const llama_token_data & token : list) {
            probabilities.push_back(token.p);
        }
        std::discrete_distribution<int> distribution(probabilities.begin(), probabilities.end());
        return (size_t) distribution(state.rng);
    }

    // ---- the choice

    double draw_uniform() {
        std::uniform_real_distribution<double> uniform(0.0, 1.0);
        return uniform(state.rng);
    }

    llama_token choose_from_list() {
        chosen = Chosen::list;
        if (highest(list) == -infinity) {
            throw_nothing_left();
        }
        if (params.mirostat) {
            cut_for_mirostat();
            return choose_by_mirostat();
        }
        if (params.adaptive_target >= 0.0f) {
            return choose_adaptively_from_list();
        }
        const double uniform = draw_uniform();
        if (list.size() == 1) {
            list[0].p = 1.0f;
            return list[0].id;
        }
        const float best = list_sorted ? list.front().logit : highest(list);
        double sum = 0.0;
        for (llama_token_data & token : list) {
            token.p = expf(token.logit - best);
            sum += token.p;
        }
        const double target = sum * uniform;
        double running = 0.0;
        size_t pick = list.size();
        for (size_t i = 0; i < list.size(); ++i) {
            if (pick == list.size()) {
                running += list[i].p;
                if (running >= target && list[i].p > 0.0f) {
                    pick = i;
                }
            }
            list[i].p /= sum;
        }
        return pick < list.size() ? list[pick].id : last_likely();
    }

    llama_token last_likely() const {
        for (size_t i = list.size(); i-- > 0;) {
            if (list[i].p > 0.0f) {
                return list[i].id;
            }
        }
        return list.front().id;
    }

    llama_token choose_from_row() {
        ensure_scan();
        if (params.mirostat) {
            list_for_mirostat();
            return choose_by_mirostat();
        }
        if (params.adaptive_target >= 0.0f) {
            return choose_adaptively_from_row();
        }
        chosen = Chosen::row;
        weigh_row();
        const double target = draw_uniform() * total_weight;
        return row_sorted ? pick_by_rank(target) : pick_by_id(target);
    }

    // The first token, in order of id, at which the running weight reaches the target.
    llama_token pick_by_id(double target) const {
        double running = 0.0;
        size_t block = 0;
        while (block + 1 < block_sums.size() && running + block_sums[block] < target) {
            running += block_sums[block++];
        }
        llama_token last = 0;
        for (auto id = (int32_t) block * block_size; id < n_vocab; ++id) {
            running += weights[(size_t) id];
            if (weights[(size_t) id] > 0.0f) {
                last = id;
                if (running >= target) {
                    return id;
                }
            }
        }
        return weights[(size_t) last] > 0.0f ? last : scan.argmax(x, n_vocab);
    }

    // The same in order of probability: only the ring in which the target lies is sorted.
    llama_token pick_by_rank(double target) {
        rings.run(x, weights.data(), n_vocab, scan.max);
        const int32_t ring = rings.reach(target, 1);
        double running = rings.weight_before(ring);
        std::vector<llama_token_data> members;
        rings.members(x, n_vocab, ring, members);
        sort_by_logit(members);
        for (const llama_token_data & token : members) {
            running += weights[(size_t) token.id];
            if (running >= target) {
                return token.id;
            }
        }
        return members.empty() ? scan.argmax(x, n_vocab) : members.back().id;
    }

    // What mirostat can choose from is the head of the ranking; its bound tells how long a head.
    void list_for_mirostat() {
        const double total = exp_weights(x, n_vocab, scan.max, nullptr, nullptr);
        auto probability = [&](const llama_token_data & token) {
            return (float) (expf(token.logit - scan.max) / total);
        };
        if (params.mirostat == 1) {
            list_top_k((size_t) params.mirostat_m);
            for (llama_token_data & token : list) {
                token.p = probability(token);
            }
            list_top_k(mirostat_1_size());
            return;
        }
        const double bound = std::log(total) - state.mu * 0.693147180559945309;
        list.clear();
        scan.collect(x, n_vocab, (float) (scan.max + bound - 1e-3), list);
        sort_by_logit(list);
        for (llama_token_data & token : list) {
            token.p = probability(token);
        }
        const size_t keep = mirostat_2_size();
        if (list.empty()) {
            list_top_k(1);
        } else {
            list.resize(keep);
        }
        list_sorted = true;
    }

    // Zipf's exponent, estimated from the head of the ranking, tells how many tokens have the wanted surprise.
    size_t mirostat_1_size() const {
        float sum_tb = 0.0f;
        float sum_tt = 0.0f;
        const size_t m = std::min((size_t) params.mirostat_m, list.size());
        for (size_t i = 0; i + 1 < m; ++i) {
            const float t = logf(float(i + 2) / float(i + 1));
            const float b = logf(list[i].p / list[i + 1].p);
            sum_tb += t * b;
            sum_tt += t * t;
        }
        const float s       = sum_tb / sum_tt;
        const float epsilon = s - 1;
        const float k = powf((epsilon * powf(2, state.mu)) / (1 - powf((float) n_vocab, -epsilon)), 1 / s);
        if (!(k >= 1.0f)) {
            return 1;       // also where it is no number: the ranking falls to nothing within the head
        }
        // Where the ranking is flat this overflows: everything is kept. (llama.cpp converts to int unchecked.)
        return k < (float) n_vocab ? (size_t) k : (size_t) n_vocab;
    }

    // The tokens whose surprise does not exceed the bound; at least one.
    size_t mirostat_2_size() const {
        size_t keep = 0;
        while (keep < list.size() && !(-log2f(list[keep].p) > state.mu)) {
            ++keep;
        }
        return std::max<size_t>(keep, 1);
    }

    void cut_for_mirostat() {
        softmax(true);
        list.resize(std::min(list.size(), params.mirostat == 1 ? mirostat_1_size() : mirostat_2_size()));
    }

    llama_token choose_by_mirostat() {
        chosen = Chosen::list;
        softmax(true);
        const llama_token_data & pick = list[draw_discrete()];
        const float surprise = -log2f(pick.p);
        state.mu = state.mu - params.mirostat_eta * (surprise - params.mirostat_tau);
        return pick.id;
    }

    // adaptive-p prefers tokens whose probability is near a target, which is corrected by what was chosen before.
    float adapted_target() const {
        const float target = std::min(std::max(params.adaptive_target, 0.0f), 1.0f);
        if (state.total_weight == 0.0f) {
            return target;
        }
        return std::min(std::max(2.0f * target - (state.weighted_sum / state.total_weight), 0.0f), 1.0f);
    }

    llama_token choose_adaptively_from_list() {
        softmax(false);
        std::vector<float> original;
        original.reserve(list.size());
        const float target = adapted_target();
        for (llama_token_data & token : list) {
            original.push_back(token.p);
            if (token.logit != -infinity) {
                const float distance = std::abs((token.p - target) * (1.0f / 0.3f));
                token.logit = 5.0f - 10.0f * distance * distance / (1.0f + distance);
            }
        }
        softmax(false);
        const size_t pick = draw_discrete();
        state.pending      = list[pick].id;
        state.pending_prob = original[pick];
        return list[pick].id;
    }

    llama_token choose_adaptively_from_row() {
        if (row_sorted) {
            list_everything();
            apply(sorter.get());
            chosen = Chosen::list;
            return choose_adaptively_from_list();
        }
        chosen = Chosen::row;
        const double original_total = weigh_row();
        const float  original_max   = scan.max;
        std::vector<float> reshaped((size_t) n_vocab);
        reward_nearness(x, weights.data(), n_vocab, (float) original_total, adapted_target(), reshaped.data());
        const float * const original = x;
        x = reshaped.data();
        scan.run(x, n_vocab);
        weigh_row();
        const llama_token pick = pick_by_id(draw_uniform() * total_weight);
        state.pending      = pick;
        state.pending_prob = (float) (expf(original[pick] - original_max) / original_total);
        x = nullptr;
        return pick;
    }

    // ---- the chain

    llama_token run(float * logits, bool constrained) {
        Patches patches(logits);
        x          = logits;
        scanned    = false;
        row_size   = (size_t) n_vocab;
        row_sorted = false;
        chosen     = Chosen::nothing;
        list.clear();
        list_sorted = false;

        for (const llama_token token : banned) {
            patch(patches, token, -infinity);
        }
        bool on_list = false;
        bool masked  = !constrained;
        for (size_t i = 0; i < active.size(); ++i) {
            const Stage stage = active[i];
            if (on_list) {
                apply_to_list(stage);
                continue;
            }
            if (is_patch(stage)) {
                patch_row(stage, patches);
                continue;
            }
            if (!masked) {
                masked = true;
                const bool greedy = is_greedy_from(i);
                const bool ranked = !greedy || sorts_from(i);
                if ((greedy || stage == Stage::top_k) &&
                    list_allowed_top_k(greedy ? 1 : (size_t) params.top_k, ranked)) {
                    on_list = true;
                    if (greedy) {
                        list_only(list.front().id, list.front().logit);
                        break;
                    }
                    continue;
                }
                mask_row();
            }
            ensure_scan();
            if (is_greedy_from(i) && (!sorts_from(i) || scan.is_max_unique(x, n_vocab))) {
                list_argmax();
                on_list = true;
                break;
            }
            on_list = apply_to_row(stage);
        }
        if (!masked) {
            mask_row();
        }
        return on_list ? choose_from_list() : choose_from_row();
    }

    llama_token sample(float * logits) {
        llama_token token = run(logits, false);
        // As llama.cpp's own programs do: choose freely first, and only if that fails ask the grammar about the
        // others and choose again. Both draws count.
        while (grammar && !grammar->allows(token)) {
            token = run(logits, true);
        }
        return token;
    }

    void accept(llama_token token, bool generated) {
        if (token < 0 || token >= n_vocab) {
            throw std::out_of_range("token " + std::to_string(token) + " is outside the vocabulary of " +
                                    std::to_string(n_vocab) + " tokens");
        }
        if (generated && grammar) {
            grammar->accept(token);
        }
        state.history.push(token);
        if (state.pending == token) {
            state.weighted_sum = state.pending_prob + params.adaptive_decay * state.weighted_sum;
            state.total_weight = 1.0f + params.adaptive_decay * state.total_weight;
        }
        state.pending = LLAMA_TOKEN_NULL;
    }

    void candidates(std::vector<llama_token_data> & out) const {
        out.clear();
        if (chosen == Chosen::list) {
            std::copy_if(list.begin(), list.end(), std::back_inserter(out), [](const llama_token_data & token) {
                return token.p > 0.0f;
            });
        } else if (chosen == Chosen::row) {
            for (int32_t id = 0; id < n_vocab; ++id) {
                if (weights[(size_t) id] > 0.0f) {
                    const float p = (float) (weights[(size_t) id] / total_weight);
                    out.push_back({ id, logf(weights[(size_t) id]), p });
                }
            }
        }
        std::stable_sort(out.begin(), out.end(), [](const llama_token_data & a, const llama_token_data & b) {
            return a.p > b.p;
        });
    }

    void update(SamplingParams p) {
        p.seed = params.seed;
        const bool had_mirostat = params.mirostat != 0;
        const bool had_adaptive = params.adaptive_target >= 0.0f;
        configure(std::move(p));
        if (params.mirostat && !had_mirostat) {
            start_mirostat();
        }
        if (params.adaptive_target >= 0.0f && !had_adaptive) {
            start_adaptive();
        }
    }

    std::string save() const {
        ByteWriter writer;
        writer.u32(state_magic);
        writer.u32(state_version);
        writer.u32((uint32_t) n_vocab);
        writer.u32(state.rng.seed());
        writer.u64(state.rng.draws());
        writer.u32(state.xtc_rng.seed());
        writer.u64(state.xtc_rng.draws());
        writer.f32(state.mu);
        writer.f32(state.weighted_sum);
        writer.f32(state.total_weight);
        writer.u32((uint32_t) state.pending);
        writer.f32(state.pending_prob);
        writer.tokens(state.history.kept());
        writer.u64(grammar ? grammar->params().hash() : 0);
        writer.tokens(grammar ? grammar->accepted() : std::vector<llama_token>());
        writer.u64(checksum(writer.bytes));
        return std::move(writer.bytes);
    }

    void load(std::string_view bytes) {
        if (bytes.size() < 12 || ByteReader(bytes).u32() != state_magic) {
            throw state_error("these bytes are no sampler state");
        }
        if (ByteReader(bytes.substr(bytes.size() - 8)).u64() != checksum(bytes.substr(0, bytes.size() - 8))) {
            throw state_error("the sampler state is damaged: its checksum does not match");
        }
        ByteReader reader(bytes.substr(0, bytes.size() - 8));
        reader.u32();
        const uint32_t version = reader.u32();
        if (version != state_version) {
            throw state_error("the sampler state has version " + std::to_string(version) +
                              "; this library reads version " + std::to_string(state_version));
        }
        const uint32_t saved_vocab = reader.u32();
        if (saved_vocab != (uint32_t) n_vocab) {
            throw state_error("the sampler state is for a vocabulary of " + std::to_string(saved_vocab) +
                              " tokens; this one has " + std::to_string(n_vocab));
        }
        State loaded(state);
        loaded.rng          = read_engine(reader);
        loaded.xtc_rng      = read_engine(reader);
        loaded.mu           = reader.f32();
        loaded.weighted_sum = reader.f32();
        loaded.total_weight = reader.f32();
        loaded.pending      = (llama_token) reader.u32();
        loaded.pending_prob = reader.f32();
        loaded.history.assign(reader.tokens(n_vocab));
        const uint64_t grammar_hash = reader.u64();
        const std::vector<llama_token> taken = reader.tokens(n_vocab);
        if (reader.left() != 0) {
            throw state_error("the sampler state is longer than it should be");
        }
        if (grammar_hash != (grammar ? grammar->params().hash() : 0)) {
            throw state_error("the sampler state belongs to another grammar");
        }
        std::unique_ptr<Grammar> replayed;
        if (grammar) {
            replayed = std::make_unique<Grammar>(vocab, grammar->params());
            try {
                for (const llama_token token : taken) {
                    replayed->accept(token);
                }
            } catch (const grammar_error & e) {
                throw state_error(std::string("the sampler state does not fit its grammar: ") + e.what());
            }
        }
        state   = std::move(loaded);
        grammar = std::move(replayed);
        chosen  = Chosen::nothing;
    }

    static CountedEngine read_engine(ByteReader & reader) {
        const uint32_t seed  = reader.u32();
        const uint64_t draws = reader.u64();
        if (draws > most_draws) {
            throw state_error("the sampler state holds an impossible number of random draws");
        }
        return CountedEngine(seed, draws);
    }
};

Sampler::Sampler(const llama_vocab * vocab, SamplingParams params)
    : impl(std::make_unique<Impl>(vocab, std::move(params))) {}

Sampler::Sampler(std::unique_ptr<Impl> impl) : impl(std::move(impl)) {}

Sampler::~Sampler() = default;

llama_token Sampler::sample(float * logits) {
    return impl->sample(logits);
}

void Sampler::accept(llama_token token, bool generated) {
    impl->accept(token, generated);
}

void Sampler::candidates(std::vector<llama_token_data> & out) const {
    impl->candidates(out);
}

void Sampler::reset() {
    if (impl->grammar) {
        impl->grammar = std::make_unique<Grammar>(impl->vocab, impl->grammar->params());
    }
    impl->restart();
}

std::unique_ptr<Sampler> Sampler::clone() const {
    return std::unique_ptr<Sampler>(new Sampler(std::make_unique<Impl>(*impl)));
}

void Sampler::update(SamplingParams params) {
    impl->update(std::move(params));
}

std::string Sampler::save_state() const {
    return impl->save();
}

void Sampler::load_state(std::string_view bytes) {
    impl->load(bytes);
}

const SamplingParams & Sampler::params() const {
    return impl->params;
}

uint32_t Sampler::seed() const {
    return impl->state.rng.seed();
}

bool Sampler::is_grammar_done() const {
    return impl->grammar && impl->grammar->is_done();
}

namespace {

RowScan scan_numbers(const float * logits, int32_t n) {
    RowScan scan;
    scan.run(logits, n);
    if (scan.has_nan || !std::isfinite(scan.max)) {
        throw std::runtime_error("the logits hold NaN or infinity, or nothing but -infinity");
    }
    return scan;
}

}  // namespace

llama_token argmax(const float * logits, int32_t n) {
    return scan_numbers(logits, n).argmax(logits, n);
}

double log_sum_exp(const float * logits, int32_t n) {
    const RowScan scan = scan_numbers(logits, n);
    return scan.max + std::log(exp_weights(logits, n, scan.max, nullptr, nullptr));
}

void top_logprobs(const float * logits, int32_t n, int32_t k, std::vector<TokenLogprob> & out) {
    out.clear();
    if (k <= 0) {
        return;
    }
    const RowScan scan = scan_numbers(logits, n);
    const double log_total = std::log(exp_weights(logits, n, scan.max, nullptr, nullptr));
    std::vector<llama_token_data> top;
    scan.collect(logits, n, scan.threshold_for(logits, n, (size_t) k), top);
    sort_by_logit(top);
    top.resize(std::min(top.size(), (size_t) k));
    for (const llama_token_data & token : top) {
        out.push_back({ token.id, (float) ((double) token.logit - scan.max - log_total) });
    }
}

}  // namespace triollama
