// Random numbers by counter: the n-th value of a stream is a function of (seed, stream, n) alone. So a layer that is
// computed a second time sees the same dropout mask, and a resumed run the same as one never stopped.
#pragma once

#include <cstdint>

namespace triollama::native {

// The finaliser of splitmix64 (Steele, Lea and Flood, 2014): a bijection in which every input bit reaches every output bit.
inline uint64_t mix64(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebull;
    x ^= x >> 31;
    return x;
}

class CounterRandom {
public:
    CounterRandom(uint64_t seed, uint64_t stream) : key(mix64(mix64(seed + step) + stream * step)) {}

    uint64_t bits(uint64_t n) const { return mix64(key + (n + 1) * step); }

    // Uniform in [0, 1), 24 bits: exact in float.
    float uniform(uint64_t n) const { return static_cast<float>(bits(n) >> 40) * 0x1p-24f; }

private:
    static constexpr uint64_t step = 0x9e3779b97f4a7c15ull;   // odd, so that multiples of it do not repeat
    uint64_t key;
};

}  // namespace triollama::native
