// The stages on the row: every token of the vocabulary, in order of id.
#include "sampling/impl.hpp"

#include <algorithm>
#include <cmath>

namespace triollama::native {

namespace {

// Stages that never drop the most likely token, nor change which it is.
bool keeps_first(Stage stage) {
    return stage == Stage::top_k || stage == Stage::top_p || stage == Stage::min_p || stage == Stage::top_n_sigma;
}

}  // namespace

void Sampler::Impl::ensure_scan() {
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

void Sampler::Impl::patch(Patches & patches, llama_token token, float logit) {
    if (x == scratch.data()) {
        x[token] = logit;
    } else {
        patches.set(token, logit);
    }
    scanned = false;
}

void Sampler::Impl::patch_row(Stage stage, Patches & patches) {
    if (stage == Stage::logit_bias) {
        for (const llama_logit_bias & bias : params.logit_bias) {
            patch(patches, bias.token, x[bias.token] + bias.bias);
        }
    } else if (stage == Stage::penalties) {
        for (const auto & entry : state.history.counts()) {
            patch(patches, entry.first, penalty.apply(x[entry.first], entry.second));
        }
    } else {
        std::vector<std::pair<llama_token, float>> losses;
        dry.penalties(vocab, dry_params, state.history, losses);
        for (const auto & loss : losses) {
            patch(patches, loss.first, x[loss.first] - loss.second);
        }
    }
}

float * Sampler::Impl::use_scratch() {
    scratch.resize((size_t) n_vocab);
    return scratch.data();
}

// The k most likely tokens become the list, in the order of `exact`, the stage of llama.cpp that keeps so many.
void Sampler::Impl::list_top_k(size_t k, llama_sampler * exact) {
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
            if (row_sorted) {
                apply(sorter.get());
            }
            apply(exact);
            return;
        }
        pad_list(k);
    }
    list_sorted = true;
}

// The k most likely of all tokens, in the order that sorting all of them gives.
void Sampler::Impl::list_ranked(size_t k) {
    list_top_k(k, sorter.get());
    list.resize(std::min(list.size(), k));
}

bool Sampler::Impl::has_ties(size_t k) const {
    for (size_t i = 1; i < std::min(list.size(), k + 1); ++i) {
        if (list[i - 1].logit == list[i].logit) {
            return true;
        }
    }
    return false;
}

// Cuts to k; places that no token with a finite logit takes are filled, since some stages count candidates.
void Sampler::Impl::pad_list(size_t k) {
    const llama_token filler = list.front().id;
    list.resize(k, { filler, -infinity, 0.0f });
}

void Sampler::Impl::list_everything() {
    list.resize((size_t) n_vocab);
    for (int32_t id = 0; id < n_vocab; ++id) {
        list[(size_t) id] = { id, x[id], 0.0f };
    }
    list_sorted = false;
}

// The k most likely tokens that the grammar allows become the list. Whether a token is allowed does not depend
// on the others, so the most likely are tried first, and all of them only if these do not hold k.
// Returns false if there are equals whose order only llama.cpp's algorithm can tell (unless order does not matter).
bool Sampler::Impl::list_allowed_top_k(size_t k, bool ranked) {
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

// The row without the tokens that the grammar forbids.
void Sampler::Impl::mask_row() {
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
bool Sampler::Impl::is_greedy_from(size_t i) const {
    while (i < active.size() && keeps_first(active[i])) {
        ++i;
    }
    return i < active.size() && active[i] == Stage::temperature && is_greedy();
}

// Does a stage before the temperature sort? Then it decides which of several equal maxima comes first.
bool Sampler::Impl::sorts_from(size_t i) const {
    for (; i < active.size() && keeps_first(active[i]); ++i) {
        if (active[i] == Stage::top_k || active[i] == Stage::top_p ||
            (active[i] == Stage::min_p && params.min_keep > 1)) {  // it sorts where fewer would be left
            return true;
        }
    }
    return false;
}

// One candidate; and one without probability, where llama.cpp would have kept the others as such.
void Sampler::Impl::list_only(llama_token token, float logit) {
    list.assign(1, { token, logit, 0.0f });
    if (n_vocab > 1) {
        list.push_back({ token == 0 ? 1 : 0, -infinity, 0.0f });
    }
    list_sorted = true;
}

void Sampler::Impl::list_argmax() {
    ensure_scan();
    const int32_t best = scan.argmax(x, n_vocab);
    list_only(best, x[best]);
}

double Sampler::Impl::weigh_row() {
    ensure_scan();
    weights.resize((size_t) n_vocab);
    block_sums.resize((size_t) block_count(n_vocab));
    total_weight = exp_weights(x, n_vocab, scan.max, weights.data(), block_sums.data());
    return total_weight;
}

// Applies a stage to the row. Returns true once the candidates are on the list.
bool Sampler::Impl::apply_to_row(Stage stage) {
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
            list_top_k((size_t) params.top_k, top_k.get());
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
                list_top_k((size_t) params.min_keep, min_p.get());
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
void Sampler::Impl::list_top_p() {
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

bool Sampler::Impl::cut_at_top_p(double total) {
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
void Sampler::Impl::list_typical() {
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

bool Sampler::Impl::xtc_strikes() {
    std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
    return uniform(state.xtc_rng) <= params.xtc_probability;
}

// Of the tokens with at least the threshold's probability, all but the least likely are dropped.
void Sampler::Impl::exclude_top_choices() {
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

bool Sampler::Impl::heat_row() {
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

}  // namespace triollama::native
