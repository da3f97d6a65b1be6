// The stages on the list: few candidates, mostly by llama.cpp's own stateless samplers.
#include "sampling/impl.hpp"

#include <algorithm>
#include <cmath>
#include <unordered_map>

namespace triollama::native {

void Sampler::Impl::apply(llama_sampler * sampler) {
    llama_token_data_array array = { list.data(), list.size(), -1, list_sorted };
    llama_sampler_apply(sampler, &array);
    list.resize(array.size);
    list_sorted = array.sorted;
}

void Sampler::Impl::apply_to_list(Stage stage) {
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
            std::vector<std::pair<llama_token, float>> found_losses;
            if (!dry.penalties(vocab, dry_params, state.history, found_losses)) {
                break;
            }
            const std::unordered_map<llama_token, float> losses(found_losses.begin(), found_losses.end());
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

void Sampler::Impl::softmax(bool sorted) {
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

size_t Sampler::Impl::draw_discrete() {
    std::vector<double> probabilities;
    probabilities.reserve(list.size());
    for (const llama_token_data & token : list) {
        probabilities.push_back(token.p);
    }
    std::discrete_distribution<int> distribution(probabilities.begin(), probabilities.end());
    return (size_t) distribution(state.rng);
}

}  // namespace triollama::native
