#include "sampling/select.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

// The passes are written once, in the vector extension of GCC and Clang. Where the build does not already target
// AVX2, glibc's loader picks the widest version that the processor has.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__AVX2__) && defined(__has_attribute)
#  if __has_attribute(target_clones)
#    define TRIOLLAMA_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#  endif
#endif
#ifndef TRIOLLAMA_CLONES
#  define TRIOLLAMA_CLONES
#endif

// Small steps must be inlined into each version, or they would be compiled for the baseline only.
#define TRIOLLAMA_INLINE static inline __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__)
#  pragma GCC diagnostic ignored "-Wpsabi"      // no vector crosses a function that is not inlined
#endif

namespace triollama::native {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

constexpr int lanes = 16;
typedef float   vfloat __attribute__((vector_size(lanes * 4)));
typedef int32_t vint   __attribute__((vector_size(lanes * 4)));

TRIOLLAMA_INLINE vfloat splat(float value) {
    return vfloat{} + value;
}

TRIOLLAMA_INLINE void load(vfloat & v, const float * x) {
    std::memcpy(&v, x, sizeof(v));
}

TRIOLLAMA_INLINE void store(float * x, const vfloat & v) {
    std::memcpy(x, &v, sizeof(v));
}

// The tail of a row, filled up with `filler`.
TRIOLLAMA_INLINE void load_tail(vfloat & v, const float * x, int32_t n, float filler) {
    v = splat(filler);
    std::memcpy(&v, x, (size_t) n * sizeof(float));
}

TRIOLLAMA_INLINE double sum_lanes(const vfloat & v) {
    double total = 0.0;
    for (int i = 0; i < lanes; ++i) {
        total += v[i];
    }
    return total;
}

// exp(d) for d <= 0 within 2 units in the last place: d = k ln 2 + r, a polynomial for exp(r), k into the exponent.
// Below -87 the result is 0 (the float would be subnormal), so -inf gives 0.
TRIOLLAMA_INLINE void exp_lanes(vfloat & d) {
    const vint   normal = d > splat(-87.0f);
    const vfloat x      = normal ? d : splat(-87.0f);
    const vfloat magic  = splat(12582912.0f);           // 1.5 * 2^23: adding it rounds to an integer
    const vfloat biased = x * 1.44269504f + magic;
    const vfloat k      = biased - magic;
    const vfloat r      = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    vfloat p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vint bits;
    std::memcpy(&bits, &biased, sizeof(bits));
    vint scaled;
    std::memcpy(&scaled, &p, sizeof(scaled));
    scaled += bits << 23;
    vfloat result;
    std::memcpy(&result, &scaled, sizeof(result));
    d = normal ? result : splat(0.0f);
}

TRIOLLAMA_CLONES
bool scan_blocks(const float * x, int32_t n, float * maxima) {
    vint nan = {};
    for (int32_t start = 0, block = 0; start < n; start += block_size, ++block) {
        const int32_t length = std::min(block_size, n - start);
        vfloat best0 = splat(-infinity);
        vfloat best1 = best0;
        int32_t i = 0;
        for (; i + 2 * lanes <= length; i += 2 * lanes) {
            vfloat a;
            vfloat b;
            load(a, x + start + i);
            load(b, x + start + i + lanes);
            nan  |= (a != a) | (b != b);
            best0 = a > best0 ? a : best0;
            best1 = b > best1 ? b : best1;
        }
        for (; i < length; i += lanes) {
            vfloat a;
            load_tail(a, x + start + i, std::min(lanes, length - i), -infinity);
            nan  |= a != a;
            best0 = a > best0 ? a : best0;
        }
        best0 = best0 > best1 ? best0 : best1;
        float best = best0[0];
        for (int lane = 1; lane < lanes; ++lane) {
            best = best0[lane] > best ? best0[lane] : best;
        }
        maxima[block] = best;
    }
    for (int lane = 0; lane < lanes; ++lane) {
        if (nan[lane]) {
            return true;
        }
    }
    return false;
}

TRIOLLAMA_CLONES
double exp_blocks(const float * x, int32_t n, float shift, float * weights, double * block_sums) {
    double total = 0.0;
    for (int32_t start = 0, block = 0; start < n; start += block_size, ++block) {
        const int32_t length = std::min(block_size, n - start);
        vfloat sum = {};
        for (int32_t i = 0; i < length; i += lanes) {
            const int32_t m = std::min(lanes, length - i);
            vfloat d;
            if (m == lanes) {
                load(d, x + start + i);
            } else {
                load_tail(d, x + start + i, m, -infinity);
            }
            d -= shift;
            exp_lanes(d);
            sum += d;
            if (weights) {
                if (m == lanes) {
                    store(weights + start + i, d);
                } else {
                    std::memcpy(weights + start + i, &d, (size_t) m * sizeof(float));
                }
            }
        }
        const double block_sum = sum_lanes(sum);
        if (block_sums) {
            block_sums[block] = block_sum;
        }
        total += block_sum;
    }
    return total;
}

TRIOLLAMA_CLONES
ExpSums exp_distance_blocks(const float * x, int32_t n, float shift) {
    ExpSums total = { 0.0, 0.0 };
    for (int32_t start = 0; start < n; start += block_size) {
        const int32_t length = std::min(block_size, n - start);
        vfloat sum      = {};
        vfloat distance = {};
        for (int32_t i = 0; i < length; i += lanes) {
            const int32_t m = std::min(lanes, length - i);
            vfloat d;
            if (m == lanes) {
                load(d, x + start + i);
            } else {
                load_tail(d, x + start + i, m, -infinity);
            }
            d -= shift;
            vfloat w = d;
            exp_lanes(w);
            sum += w;
            distance += w * (d > splat(-87.0f) ? d : splat(0.0f));     // 0 * -inf would be NaN
        }
        total.sum          += sum_lanes(sum);
        total.sum_distance += sum_lanes(distance);
    }
    return total;
}

// Count, sum and sum of squares of (x - shift) over the finite logits.
struct RawMoments {
    double n;
    double sum;
    double squares;
};

TRIOLLAMA_CLONES
RawMoments moment_blocks(const float * x, int32_t n, float shift) {
    RawMoments total = { 0.0, 0.0, 0.0 };
    for (int32_t start = 0; start < n; start += block_size) {
        const int32_t length = std::min(block_size, n - start);
        vfloat number  = {};
        vfloat sum     = {};
        vfloat squares = {};
        for (int32_t i = 0; i < length; i += lanes) {
            const int32_t m = std::min(lanes, length - i);
            vfloat v;
            if (m == lanes) {
                load(v, x + start + i);
            } else {
                load_tail(v, x + start + i, m, -infinity);
            }
            const vint   finite = v > splat(-infinity);
            const vfloat d      = finite ? v - shift : splat(0.0f);
            number  += finite ? splat(1.0f) : splat(0.0f);
            sum     += d;
            squares += d * d;
        }
        total.n       += sum_lanes(number);
        total.sum     += sum_lanes(sum);
        total.squares += sum_lanes(squares);
    }
    return total;
}

TRIOLLAMA_CLONES
void divide_row(const float * x, int32_t n, float divisor, float * out) {
    for (int32_t i = 0; i < n; ++i) {
        out[i] = x[i] / divisor;
    }
}

TRIOLLAMA_CLONES
void mask_row(const float * x, int32_t n, float threshold, float * out) {
    for (int32_t i = 0; i < n; ++i) {
        out[i] = x[i] < threshold ? -infinity : x[i];
    }
}

TRIOLLAMA_CLONES
void reward_row(const float * x, const float * weights, int32_t n, float total, float target, float * out) {
    for (int32_t i = 0; i < n; i += lanes) {
        const int32_t m = std::min(lanes, n - i);
        vfloat v;
        vfloat w;
        if (m == lanes) {
            load(v, x + i);
            load(w, weights + i);
        } else {
            load_tail(v, x + i, m, -infinity);
            load_tail(w, weights + i, m, 0.0f);
        }
        vfloat distance = (w / total - target) * (1.0f / 0.3f);
        distance = distance < splat(0.0f) ? -distance : distance;
        vfloat reward = 5.0f - 10.0f * distance * distance / (1.0f + distance);
        reward = v > splat(-infinity) ? reward : splat(-infinity);
        if (m == lanes) {
            store(out + i, reward);
        } else {
            std::memcpy(out + i, &reward, (size_t) m * sizeof(float));
        }
    }
}

TRIOLLAMA_INLINE int32_t ring_of(float x, float centre) {
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
    has_nan = scan_blocks(x, n, maxima.data());
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
    return exp_blocks(x, n, shift, weights, block_sums);
}

ExpSums exp_sums(const float * x, int32_t n, float shift) {
    return exp_distance_blocks(x, n, shift);
}

Moments finite_moments(const float * x, int32_t n, float shift) {
    // A first shift near the mean keeps the squares small, so that their difference loses nothing.
    const RawMoments rough = moment_blocks(x, n, shift);
    if (rough.n == 0.0) {
        return { 0.0, 0.0 };
    }
    const auto centre = (float) (shift + rough.sum / rough.n);
    const RawMoments fine = moment_blocks(x, n, centre);
    const double offset = fine.sum / fine.n;
    return { centre + offset, std::sqrt(std::max(0.0, fine.squares / fine.n - offset * offset)) };
}

void divide(const float * x, int32_t n, float divisor, float * out) {
    divide_row(x, n, divisor, out);
}

void mask_below(const float * x, int32_t n, float threshold, float * out) {
    mask_row(x, n, threshold, out);
}

void reward_nearness(const float * x, const float * weights, int32_t n, float total, float target, float * out) {
    reward_row(x, weights, n, total, target, out);
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
