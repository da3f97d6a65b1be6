// Vectorised passes over one row of logits: what the sampler does instead of sorting the vocabulary.
#pragma once

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace triollama::native {

// Logits are summarised by blocks; a selection then reads only the blocks that matter.
constexpr int32_t block_size = 256;

inline int32_t block_count(int32_t n) { return (n + block_size - 1) / block_size; }

// The maxima of a row's blocks. One pass over memory; every selection starts from it.
struct RowScan {
    std::vector<float> maxima;
    float max     = 0.0f;
    bool  has_nan = false;

    void run(const float * x, int32_t n);

    int32_t argmax(const float * x, int32_t n) const;     // the first of equals
    bool    is_max_unique(const float * x, int32_t n) const;

    // Appends every token with a logit of at least `threshold`, and above -inf, in order of id.
    void collect(const float * x, int32_t n, float threshold, std::vector<llama_token_data> & out) const;

    // A logit that at least k finite logits reach, close to the k-th largest; -inf if there are fewer.
    float threshold_for(const float * x, int32_t n, size_t k) const;
};

// weights[i] = exp(x[i] - shift), 0 below the smallest normal float. Returns the sum; fills sums per block.
double exp_weights(const float * x, int32_t n, float shift, float * weights, double * block_sums);

// The sum alone, and with it sum(w * (x - shift)).
struct ExpSums {
    double sum;
    double sum_distance;
};
ExpSums exp_sums(const float * x, int32_t n, float shift);

// Mean and standard deviation (of the population) of the finite logits; zero if there are none.
struct Moments {
    double mean;
    double deviation;
};
Moments finite_moments(const float * x, int32_t n, float shift);

void divide(const float * x, int32_t n, float divisor, float * out);
void mask_below(const float * x, int32_t n, float threshold, float * out);      // -inf where x < threshold

// The logits of adaptive-p: highest where weights[i] / total is nearest to `target`, -inf where x is.
void reward_nearness(const float * x, const float * weights, int32_t n, float total, float target, float * out);

// The weight of a row in rings around `centre`: ring r holds the tokens with r <= |x - centre| * rings_per_unit < r + 1;
// the last ring holds the rest. Around the maximum, rings run from the most to the least likely token.
struct Rings {
    static constexpr int32_t count          = 4096;
    static constexpr float   rings_per_unit = 128.0f;

    std::vector<double>   weight;
    std::vector<uint32_t> tokens;
    float centre = 0.0f;

    void run(const float * x, const float * weights, int32_t n, float centre);

    // The ring in which the running weight reaches `target` and the running count `min_tokens`.
    int32_t reach(double target, size_t min_tokens) const;

    double weight_before(int32_t ring) const;
    static float outer_radius(int32_t ring);              // exclusive; infinity for the last

    // Append the finite tokens of a ring, or of it and all inside it, in order of id.
    void members(const float * x, int32_t n, int32_t ring, std::vector<llama_token_data> & out) const;
    void members_within(const float * x, int32_t n, int32_t ring, std::vector<llama_token_data> & out) const;
};

// Most likely first; equal logits in order of id.
void sort_by_logit(std::vector<llama_token_data> & tokens);

}  // namespace triollama::native
