#include "sampling/impl.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace triollama::native {

namespace {

bool is_patch(Stage stage) {
    return stage == Stage::logit_bias || stage == Stage::penalties || stage == Stage::dry;
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

}  // namespace

Sampler::Impl::Impl(const llama_vocab * vocab, SamplingParams new_params)
    : vocab(vocab), n_vocab(llama_vocab_n_tokens(vocab)) {
    configure(std::move(new_params));
    restart();
}

Sampler::Impl::Impl(const Impl & other)
    : vocab(other.vocab), n_vocab(other.n_vocab), state(other.state),
      grammar(other.grammar ? other.grammar->clone() : nullptr), dry(other.dry) {
    configure(other.params);
}

void Sampler::Impl::configure(SamplingParams p) {
    validate(p, n_vocab);
    std::unique_ptr<Grammar> new_grammar;
    const bool same_grammar = grammar && grammar->params() == p.grammar;
    if (!same_grammar) {
        new_grammar = make_grammar(vocab, p.grammar);
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
    banned.insert(banned.end(), params.banned.begin(), params.banned.end());

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

bool Sampler::Impl::is_active(Stage stage) const {
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

bool Sampler::Impl::forbids(llama_token token) const {
    const bool biased = std::find(active.begin(), active.end(), Stage::logit_bias) != active.end();
    return std::find(banned.begin(), banned.end(), token) != banned.end() ||
           (biased && std::any_of(params.logit_bias.begin(), params.logit_bias.end(), [token](const llama_logit_bias & bias) {
                return bias.token == token && bias.bias == -infinity;
            }));
}

void Sampler::Impl::restart() {
    state.rng     = CountedEngine(params.seed);
    state.xtc_rng = CountedEngine(params.seed);
    start_mirostat();
    start_adaptive();
    state.history.clear();
    chosen = Chosen::nothing;
}

void Sampler::Impl::start_adaptive() {
    state.weighted_sum = params.adaptive_target / (1.0f - params.adaptive_decay);
    state.total_weight = 1.0f / (1.0f - params.adaptive_decay);
    state.pending      = LLAMA_TOKEN_NULL;
    state.pending_prob = 0.0f;
}

llama_token Sampler::Impl::run(float * logits, bool constrained) {
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

llama_token Sampler::Impl::sample(float * logits) {
    llama_token token = run(logits, false);
    // As llama.cpp's own programs do: choose freely first, and only if that fails ask the grammar about the
    // others and choose again. Both draws count.
    while (grammar && !grammar->allows(token)) {
        token = run(logits, true);
    }
    return token;
}

void Sampler::Impl::accept(llama_token token, bool generated) {
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

void Sampler::Impl::candidates(std::vector<llama_token_data> & out) const {
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

void Sampler::Impl::update(SamplingParams p) {
    p.seed    = params.seed;
    p.grammar.special = params.grammar.special;     // what a stream shows does not change with its parameters
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
        impl->grammar = make_grammar(impl->vocab, impl->grammar->params());
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

std::vector<llama_token> Sampler::forced() const {
    std::vector<llama_token> tokens;
    if (impl->grammar) {
        tokens = impl->grammar->forced();
        tokens.erase(std::find_if(tokens.begin(), tokens.end(), [this](llama_token token) { return impl->forbids(token); }),
                     tokens.end());
    }
    return tokens;
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

}  // namespace triollama::native
