#include "sampling/passes.hpp"
#include "kernels/processor.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace triollama::native {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

const Passes & widest_passes() {
#if TRIOLLAMA_X86_PASSES
    if (processor::has(processor::avx512)) {
        return avx512_passes;
    }
    if (processor::has(processor::avx2)) {
        return avx2_passes;
    }
#endif
    return baseline_passes;
}

// Asked while the extension is loaded: a child could be forked in the middle of a first call.
const Passes & passes = widest_passes();

inline int32_t ring_of(float x, float centre) {
    const float scaled = std::fabs(x - centre) * Rings::rings_per_unit;
    return scaled < (float) (Rings::count - 1) ? (int32_t) scaled : Rings::count - 1;
}

// No token of the rings up to `ring` around the maximum lies below this; a few of the next ring may lie above.
float lower_edge(float max, int32_t ring) {
    const float radius = Rings::outer_radius(ring);
    return (max - radius) - 1e-5f * (std::fabs(max) + radius);
}

}  // namespace

void RowScan::run(const float * x, int32_t n) {
    maxima.resize((size_t) block_count(n));
    has_nan = passes.scan(x, n, maxima.data());
    max     = *std::max_element(maxima.begin(), maxima.end());
}

int32_t RowScan::argmax(const float * x, int32_t n) const {
    const auto block = (int32_t) (std::max_element(maxima.begin(), maxima.end()) - maxima.begin());
    const int32_t end = std::min(n, (block + 1) * block_size);
    for (int32_t i = block * block_size; i < end; ++i) {
        if (x[i] == max) {
            return i;
        }
    }
    return 0;
}

bool RowScan::is_max_unique(const float * x, int32_t n) const {
    int found = 0;
    for (size_t block = 0; block < maxima.size(); ++block) {
        if (maxima[block] == max) {
            const auto start = (int32_t) block * block_size;
            found += (int) std::count(x + start, x + std::min(n, start + block_size), max);
        }
    }
    return found == 1;
}

void RowScan::collect(const float * x, int32_t n, float threshold, std::vector<llama_token_data> & out) const {
    const float lowest = std::max(threshold, std::numeric_limits<float>::lowest());
    for (size_t block = 0; block < maxima.size(); ++block) {
        if (maxima[block] < lowest) {
            continue;
        }
        const auto start = (int32_t) block * block_size;
        const int32_t end = std::min(n, start + block_size);
        for (int32_t i = start; i < end; ++i) {
            if (x[i] >= lowest) {
                out.push_back({ i, x[i], 0.0f });
            }
        }
    }
}

float RowScan::threshold_for(const float * x, int32_t n, size_t k) const {
    if (k == 0 || k >= (size_t) n) {
        return -infinity;
    }
    if (k <= maxima.size() / 2) {
        // k blocks have a maximum of at least the k-th largest, so k logits have.
        std::vector<float> sorted(maxima);
        std::nth_element(sorted.begin(), sorted.begin() + (ptrdiff_t) (k - 1), sorted.end(), std::greater<float>());
        return sorted[k - 1];
    }
    constexpr int32_t worth_counting = 4 * Rings::count;
    if (n > worth_counting) {
        uint32_t tokens[Rings::count] = {};
        for (int32_t i = 0; i < n; ++i) {
            ++tokens[ring_of(x[i], max)];
        }
        size_t have = 0;
        for (int32_t ring = 0; ring + 1 < Rings::count; ++ring) {
            have += tokens[ring];
            if (have >= k) {
                return lower_edge(max, ring);
            }
        }
    }
    std::vector<float> sorted(x, x + n);
    std::nth_element(sorted.begin(), sorted.begin() + (ptrdiff_t) (k - 1), sorted.end(), std::greater<float>());
    return sorted[k - 1];
}

double exp_weights(const float * x, int32_t n, float shift, float * weights, double * block_sums) {
    return passes.weights(x, n, shift, weights, block_sums);
}

ExpSums exp_sums(const float * x, int32_t n, float shift) {
    return passes.sums(x, n, shift);
}

Moments finite_moments(const float * x, int32_t n, float shift) {
    // A first shift near the mean keeps the squares small, so that their difference loses nothing.
    const RawMoments rough = passes.moments(x, n, shift);
    if (rough.n == 0.0) {
        return { 0.0, 0.0 };
    }
    const auto centre = (float) (shift + rough.sum / rough.n);
    const RawMoments fine = passes.moments(x, n, centre);
    const double offset = fine.sum / fine.n;
    return { centre + offset, std::sqrt(std::max(0.0, fine.squares / fine.n - offset * offset)) };
}

void divide(const float * x, int32_t n, float divisor, float * out) {
    passes.divide(x, n, divisor, out);
}

void mask_below(const float * x, int32_t n, float threshold, float * out) {
    passes.mask(x, n, threshold, out);
}

void reward_nearness(const float * x, const float * weights, int32_t n, float total, float target, float * out) {
    passes.reward(x, weights, n, total, target, out);
}

void Rings::run(const float * x, const float * weights, int32_t n, float centre) {
    this->centre = centre;
    weight.assign(count, 0.0);
    tokens.assign(count, 0);
    for (int32_t i = 0; i < n; ++i) {
        const int32_t ring = ring_of(x[i], centre);
        weight[(size_t) ring] += weights[i];
        ++tokens[(size_t) ring];
    }
}

int32_t Rings::reach(double target, size_t min_tokens) const {
    double have  = 0.0;
    size_t have_tokens = 0;
    for (int32_t ring = 0; ring < count; ++ring) {
        have        += weight[(size_t) ring];
        have_tokens += tokens[(size_t) ring];
        if (have >= target && have_tokens >= min_tokens) {
            return ring;
        }
    }
    return count - 1;
}

void Rings::members(const float * x, int32_t n, int32_t ring, std::vector<llama_token_data> & out) const {
    for (int32_t i = 0; i < n; ++i) {
        if (ring_of(x[i], centre) == ring && x[i] > -infinity) {
            out.push_back({ i, x[i], 0.0f });
        }
    }
}

void Rings::members_within(const float * x, int32_t n, int32_t ring, std::vector<llama_token_data> & out) const {
    for (int32_t i = 0; i < n; ++i) {
        if (ring_of(x[i], centre) <= ring && x[i] > -infinity) {
            out.push_back({ i, x[i], 0.0f });
        }
    }
}

double Rings::weight_before(int32_t ring) const {
    double total = 0.0;
    for (int32_t i = 0; i < ring; ++i) {
        total += weight[(size_t) i];
    }
    return total;
}

float Rings::outer_radius(int32_t ring) {
    return ring + 1 < count ? (float) (ring + 1) / rings_per_unit : infinity;
}

void sort_by_logit(std::vector<llama_token_data> & tokens) {
    std::sort(tokens.begin(), tokens.end(), [](const llama_token_data & a, const llama_token_data & b) {
        return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
    });
}

}  // namespace triollama::native
