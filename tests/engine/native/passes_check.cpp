// The sampler's passes over random rows: every instruction set gives the same bytes. Prints how many.
#include "kernels/processor.hpp"
#include "sampling/passes.hpp"

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

using namespace triollama::native;

static std::vector<char> all_of(const Passes & passes, const std::vector<float> & x, bool has_nan) {
    const auto n = static_cast<int32_t>(x.size());
    std::vector<float> maxima(static_cast<size_t>(block_count(n))), weights(x.size()), divided(x), masked(x), rewarded(x);
    std::vector<double> sums(maxima.size());
    const bool nan = passes.scan(x.data(), n, maxima.data());
    std::vector<char> bytes = { static_cast<char>(nan) };
    if (has_nan) {
        return bytes;
    }
    const double sum = passes.weights(x.data(), n, 3.0f, weights.data(), sums.data());
    const ExpSums both = passes.sums(x.data(), n, 3.0f);
    const RawMoments moments = passes.moments(x.data(), n, 0.5f);
    passes.divide(x.data(), n, 0.7f, divided.data());
    passes.mask(x.data(), n, 0.1f, masked.data());
    passes.reward(x.data(), weights.data(), n, static_cast<float>(sum), 0.3f, rewarded.data());
    const auto add = [&](const void * data, size_t size) {
        bytes.insert(bytes.end(), static_cast<const char *>(data), static_cast<const char *>(data) + size);
    };
    for (const auto * row : { &maxima, &weights, &divided, &masked, &rewarded }) {
        add(row->data(), row->size() * sizeof(float));
    }
    add(sums.data(), sums.size() * sizeof(double));
    add(&sum, sizeof(sum));
    add(&both, sizeof(both));
    add(&moments, sizeof(moments));
    return bytes;
}

int main() {
    std::vector<const Passes *> sets = { &baseline_passes };
#if TRIOLLAMA_X86_PASSES
    if (processor::has(processor::avx2)) {
        sets.push_back(&avx2_passes);
    }
    if (processor::has(processor::avx512)) {
        sets.push_back(&avx512_passes);
    }
#endif
    std::mt19937 rng(1);
    std::normal_distribution<float> normal(0, 6);
    size_t compared = 0;
    for (int t = 0; t < 300; ++t) {
        std::vector<float> x(1 + rng() % 3000);
        for (float & value : x) {
            value = rng() % 50 ? normal(rng) : -std::numeric_limits<float>::infinity();
        }
        const bool has_nan = t % 37 == 0;
        if (has_nan) {
            x[rng() % x.size()] = NAN;
        }
        const std::vector<char> expected = all_of(*sets[0], x, has_nan);
        if (expected[0] != has_nan) {
            std::printf("row %d: a NaN was missed, or seen where none is\n", t);
            return 1;
        }
        for (const Passes * some : sets) {
            if (all_of(*some, x, has_nan) != expected) {
                std::printf("row %d of %zu values differs\n", t, x.size());
                return 1;
            }
            compared += expected.size();
        }
    }
    std::printf("%zu sets, %zu bytes\n", sets.size(), compared);
    return 0;
}
