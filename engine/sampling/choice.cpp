// The last stage: a draw, the most likely, mirostat (arXiv:2007.14966) or adaptive-p.
#include "sampling/impl.hpp"

#include <algorithm>
#include <cmath>

namespace triollama::native {

double Sampler::Impl::draw_uniform() {
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    return uniform(state.rng);
}

llama_token Sampler::Impl::choose_from_list() {
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

llama_token Sampler::Impl::last_likely() const {
    for (size_t i = list.size(); i-- > 0;) {
        if (list[i].p > 0.0f) {
            return list[i].id;
        }
    }
    return list.front().id;
}

llama_token Sampler::Impl::choose_from_row() {
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
llama_token Sampler::Impl::pick_by_id(double target) const {
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
llama_token Sampler::Impl::pick_by_rank(double target) {
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

// What mirostat can choose from is the head of the ranking; its bound tells how long a head. Where it holds equals, all is
// sorted, as llama.cpp does: which of them comes first no shorter way tells.
void Sampler::Impl::list_for_mirostat() {
    const double total = exp_weights(x, n_vocab, scan.max, nullptr, nullptr);
    auto weigh = [&] {
        for (llama_token_data & token : list) {
            token.p = (float) (expf(token.logit - scan.max) / total);
        }
    };
    if (params.mirostat == 1) {
        list_ranked((size_t) params.mirostat_m);
        weigh();
        list_ranked(mirostat_1_size());
        return;
    }
    const double bound = std::log(total) - state.mu * 0.693147180559945309;
    list.clear();
    scan.collect(x, n_vocab, (float) (scan.max + bound - 1e-3), list);
    sort_by_logit(list);
    weigh();
    const size_t keep = mirostat_2_size();
    if (list.empty() || has_ties(keep)) {
        list_ranked(keep);
    } else {
        list.resize(keep);
        list_sorted = true;
    }
}

// Zipf's exponent, estimated from the head of the ranking, tells how many tokens have the wanted surprise.
size_t Sampler::Impl::mirostat_1_size() const {
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
size_t Sampler::Impl::mirostat_2_size() const {
    size_t keep = 0;
    while (keep < list.size() && !(-log2f(list[keep].p) > state.mu)) {
        ++keep;
    }
    return std::max<size_t>(keep, 1);
}

void Sampler::Impl::cut_for_mirostat() {
    softmax(true);
    list.resize(std::min(list.size(), params.mirostat == 1 ? mirostat_1_size() : mirostat_2_size()));
}

llama_token Sampler::Impl::choose_by_mirostat() {
    chosen = Chosen::list;
    softmax(true);
    const llama_token_data & pick = list[draw_discrete()];
    const float surprise = -log2f(pick.p);
    state.mu = state.mu - params.mirostat_eta * (surprise - params.mirostat_tau);
    return pick.id;
}

// adaptive-p prefers tokens whose probability is near a target, which is corrected by what was chosen before.
float Sampler::Impl::adapted_target() const {
    const float target = std::min(std::max(params.adaptive_target, 0.0f), 1.0f);
    if (state.total_weight == 0.0f) {
        return target;
    }
    return std::min(std::max(2.0f * target - (state.weighted_sum / state.total_weight), 0.0f), 1.0f);
}

llama_token Sampler::Impl::choose_adaptively_from_list() {
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

llama_token Sampler::Impl::choose_adaptively_from_row() {
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

}  // namespace triollama::native
