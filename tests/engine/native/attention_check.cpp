// Attention of our own against sums in double precision, and its bits: on every instruction set, with any number of
// threads, and of each row alone. Random shapes, masks with holes, ALiBi, soft caps, sinks and types of caches.
// Nothing may be allocated while it computes.
#include "kernels/attention.hpp"
#include "kernels/product.hpp"
#include "threads_of_check.hpp"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

using namespace triollama::native::kernels;

namespace {

struct Tensor : ggml_tensor {
    std::vector<char> memory;

    // `mixed`: rows of all n2 behind each other, as heads of a cell lie.
    Tensor(ggml_type of, int64_t n0, int64_t n1, int64_t n2, int64_t n3, bool mixed = false) : ggml_tensor{} {
        type = of;
        const int64_t shape[] = { n0, n1, n2, n3 };
        std::copy(shape, shape + 4, ne);
        nb[0] = ggml_type_size(type);
        nb[1] = ggml_row_size(type, n0);
        nb[2] = nb[1] * static_cast<size_t>(n1);
        nb[3] = nb[2] * static_cast<size_t>(n2);
        if (mixed) {
            nb[2] = nb[1];
            nb[1] *= static_cast<size_t>(n2);
        }
        memory.resize(nb[3] * static_cast<size_t>(n3));
        data = memory.data();
    }
    Tensor(const Tensor &) = delete;

    char * row(int64_t i1, int64_t i2, int64_t i3) const {
        return static_cast<char *>(data) + static_cast<size_t>(i1) * nb[1] + static_cast<size_t>(i2) * nb[2] + static_cast<size_t>(i3) * nb[3];
    }
    std::vector<float> floats(int64_t i1, int64_t i2, int64_t i3) const {
        std::vector<float> to(static_cast<size_t>(ne[0]));
        if (type == GGML_TYPE_F32) {
            std::memcpy(to.data(), row(i1, i2, i3), to.size() * sizeof(float));
        } else {
            ggml_get_type_traits(type)->to_float(row(i1, i2, i3), to.data(), ne[0]);
        }
        return to;
    }
};

using Random = std::mt19937;

int64_t among(Random & random, std::initializer_list<int64_t> values) { return values.begin()[random() % values.size()]; }

void fill(Tensor & tensor, Random & random, float scale) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> row(static_cast<size_t>(tensor.ne[0]));
    for (int64_t i3 = 0; i3 < tensor.ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < tensor.ne[2]; ++i2) {
            for (int64_t i1 = 0; i1 < tensor.ne[1]; ++i1) {
                for (float & x : row) {
                    x = normal(random);
                }
                if (tensor.type == GGML_TYPE_F32) {
                    std::memcpy(tensor.row(i1, i2, i3), row.data(), row.size() * sizeof(float));
                } else {
                    ggml_get_type_traits(tensor.type)->from_float_ref(row.data(), tensor.row(i1, i2, i3), tensor.ne[0]);
                }
            }
        }
    }
}

struct Case {
    float   scale, max_bias, softcap;
    Tensor *q, *k, *v, *mask, *sinks;

    std::vector<float> run(int64_t first, int64_t n, int n_threads) const {
        Tensor out(GGML_TYPE_F32, v->ne[0], q->ne[2], n, q->ne[3]);
        ggml_tensor queries = *q;   // some of the tokens
        queries.ne[1] = n;
        queries.data = static_cast<char *>(queries.data) + static_cast<size_t>(first) * queries.nb[1];
        ggml_tensor seen{};
        if (mask) {
            seen = *mask;
            seen.ne[1] = n;
            seen.data = static_cast<char *>(seen.data) + static_cast<size_t>(first) * seen.nb[1];
        }
        out.op = GGML_OP_FLASH_ATTN_EXT;
        const float options[] = { scale, max_bias, softcap };
        std::memcpy(out.op_params, options, sizeof(options));
        ggml_tensor * sources[] = { &queries, k, v, mask ? &seen : nullptr, sinks };
        std::copy(sources, sources + 5, out.src);
        if (!can_attend(&out)) {
            std::printf("a case that is not taken\n");
            std::exit(1);
        }
        std::vector<char> memory(attend_bytes(&out, n_threads));
        in_threads(n_threads, [&](Team & team) { attend(&out, false, team, memory.data()); });
        std::vector<float> result(out.memory.size() / sizeof(float));
        std::memcpy(result.data(), out.data, out.memory.size());
        return result;
    }

    // As a textbook has it.
    std::vector<double> expected(int64_t token, int64_t head, int64_t stream) const {
        const int64_t of_head = q->ne[2] / k->ne[2], n = k->ne[1], below = 1 << static_cast<int>(std::floor(std::log2(q->ne[2])));
        const double slope = max_bias <= 0 ? 1
                             : head < below ? std::pow(2.0, -max_bias / below * (head + 1))
                                            : std::pow(2.0, -max_bias / 2 / below * (2 * (head - below) + 1));
        const auto query = q->floats(token, head, stream);
        std::vector<double> scores(static_cast<size_t>(n)), out(static_cast<size_t>(v->ne[0]));
        const double sink = sinks ? static_cast<const float *>(sinks->data)[head] : -std::numeric_limits<double>::infinity();
        double largest = sink;
        const auto * seen = mask ? reinterpret_cast<const ggml_fp16_t *>(mask->row(token, 0, stream % mask->ne[3])) : nullptr;
        for (int64_t i = 0; i < n; ++i) {
            double & score = scores[static_cast<size_t>(i)];
            if (seen && seen[i] == 0xfc00) {
                score = -std::numeric_limits<double>::infinity();
                continue;
            }
            const auto key = k->floats(i, head / of_head, stream);
            for (size_t d = 0; d < query.size(); ++d) {
                score += static_cast<double>(query[d]) * key[d];
            }
            score *= scale;
            if (softcap != 0) {
                score = softcap * std::tanh(score / softcap);
            }
            if (seen) {
                score += slope * ggml_fp16_to_fp32(seen[i]);
            }
            largest = std::max(largest, score);
        }
        if (largest == -std::numeric_limits<double>::infinity()) {
            return out;
        }
        double total = std::exp(sink - largest);
        for (int64_t i = 0; i < n; ++i) {
            const double weight = std::exp(scores[static_cast<size_t>(i)] - largest);
            total += weight;
            if (weight > 0) {
                const auto value = v->floats(i, head / of_head, stream);
                for (size_t d = 0; d < out.size(); ++d) {
                    out[d] += weight * value[d];
                }
            }
        }
        for (double & x : out) {
            x /= total;
        }
        return out;
    }
};

// A cell that nobody may see holds what is no number.
void spoil(Tensor & tensor, int64_t cell) {
    for (int64_t i3 = 0; i3 < tensor.ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < tensor.ne[2]; ++i2) {
            std::memset(tensor.row(cell, i2, i3), 0xff, ggml_row_size(tensor.type, tensor.ne[0]));
        }
    }
}

double worst = 0;
int64_t compared = 0;

void check(unsigned seed) {
    Random random(seed);
    const ggml_type types[] = { GGML_TYPE_F16, GGML_TYPE_F16, GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0 };
    // Values that are a part of keys, for many heads; and so many cells that not all heads go over them together.
    const bool latent = random() % 8 == 0, many = !latent && random() % 16 == 0;
    const ggml_type type_k = types[random() % (latent ? 5 : 6)], type_v = latent || random() % 2 ? type_k : types[random() % 6];
    const bool blocks = type_k == GGML_TYPE_Q8_0 || type_v == GGML_TYPE_Q8_0;
    const int64_t width = latent ? 576 : blocks ? among(random, { 32, 64, 96, 128, 256 }) : among(random, { 8, 16, 20, 32, 40, 48, 64, 72, 80, 112, 128, 192, 256 });
    const int64_t value_width = latent ? 512 : random() % 4 ? width : blocks ? 64 : among(random, { 16, 24, 64, 128 });
    const int64_t heads = latent || many ? 1 : among(random, { 1, 2, 3 }), streams = many ? 1 : among(random, { 1, 1, 2, 5 });
    const int64_t of_head = many ? 33 : latent ? 16 : among(random, { 1, 2, 3, 4, 7, 8 });
    const int64_t tokens = many ? 2 : latent ? 3 : among(random, { 1, 1, 2, 3, 9, 40 }), cells = many ? 8000 : among(random, { 1, 3, 16, 17, 64, 129, 256, 300 });
    const bool mixed = random() % 2;
    Tensor q(GGML_TYPE_F32, width, tokens, heads * of_head, streams, random() % 2), k(type_k, width, cells, heads, streams, mixed), v(type_v, value_width, cells, heads, streams, mixed);
    Tensor mask(GGML_TYPE_F16, cells, tokens, 1, random() % 2 ? streams : 1), sinks(GGML_TYPE_F32, heads * of_head, 1, 1, 1);
    fill(q, random, 1);
    fill(k, random, 1);
    if (latent) {
        v.data = k.data;
        std::copy(k.nb, k.nb + 4, v.nb);
    } else {
        fill(v, random, 1);
    }
    fill(sinks, random, 2);
    const bool masks = random() % 8, alibi = masks && random() % 4 == 0;
    const int kind = static_cast<int>(random() % 3), window = static_cast<int>(random() % 40) + 1;
    const int64_t hidden = masks && cells > 3 ? static_cast<int64_t>(random() % static_cast<unsigned>(cells)) : -1;
    for (int64_t s = 0; s < mask.ne[3]; ++s) {
        for (int64_t t = 0; t < tokens; ++t) {
            auto * row = reinterpret_cast<ggml_fp16_t *>(mask.row(t, 0, s));
            const int64_t at = std::max<int64_t>(0, cells - tokens + t);
            for (int64_t i = 0; i < cells; ++i) {
                const bool seen = i != hidden && (kind == 0   ? i <= at
                                                  : kind == 1 ? i <= at && i > at - window
                                                              : random() % 3 == 0);
                row[i] = seen ? ggml_fp32_to_fp16(alibi ? -std::fabs(static_cast<float>(at - i)) : 0.0f) : 0xfc00;
            }
        }
    }
    if (hidden >= 0 && type_k != GGML_TYPE_Q8_0 && type_v != GGML_TYPE_Q8_0) {
        spoil(k, hidden);
        spoil(v, hidden);
    }
    const Case one = { 1 / std::sqrt(static_cast<float>(width)), alibi ? 8.0f : 0.0f, random() % 4 ? 0.0f : 5.0f,
                       &q, &k, &v, masks ? &mask : nullptr, random() % 4 ? nullptr : &sinks };
    choose_kernel("portable");
    const auto whole = one.run(0, tokens, 1);
    for (int64_t s = 0; s < streams; ++s) {
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t h = 0; h < heads * of_head; ++h) {
                const float * row = whole.data() + ((s * tokens + t) * heads * of_head + h) * value_width;
                const auto expected = one.expected(t, h, s);
                for (size_t d = 0; d < expected.size(); ++d) {
                    const double error = std::fabs(row[d] - expected[d]);
                    worst = std::max(worst, error);
                    ++compared;
                    if (!(error < 2e-5)) {
                        std::printf("seed %u: stream %ld token %ld head %ld: %g for %g\n", seed, static_cast<long>(s), static_cast<long>(t),
                                    static_cast<long>(h), static_cast<double>(row[d]), expected[d]);
                        std::exit(1);
                    }
                }
            }
        }
    }
    const int64_t of_token = heads * of_head * value_width;
    for (const Kernel * kernel : available_kernels()) {
        choose_kernel(kernel->name);
        for (int threads : { 1, 2, 3 }) {
            const auto again = one.run(0, tokens, threads);
            if (std::memcmp(again.data(), whole.data(), whole.size() * sizeof(float)) != 0) {
                std::printf("seed %u: other bits with %s and %d threads\n", seed, kernel->name, threads);
                std::exit(1);
            }
        }
        const int64_t t = static_cast<int64_t>(random() % static_cast<unsigned>(tokens));
        const int64_t n = 1 + static_cast<int64_t>(random() % static_cast<unsigned>(tokens - t));
        const auto part = one.run(t, n, 2);
        for (int64_t s = 0; s < streams; ++s) {
            if (std::memcmp(part.data() + s * n * of_token, whole.data() + (s * tokens + t) * of_token, static_cast<size_t>(n * of_token) * sizeof(float)) != 0) {
                std::printf("seed %u: tokens %ld to %ld have other bits alone, with %s\n", seed, static_cast<long>(t), static_cast<long>(t + n), kernel->name);
                std::exit(1);
            }
        }
    }
}

}  // namespace

int main(int, char ** arguments) {
    const unsigned n = static_cast<unsigned>(std::atoi(arguments[1]));
    for (unsigned seed = 0; seed < n; ++seed) {
        check(seed);
    }
    std::printf("%ld numbers, worst error %.1e:", static_cast<long>(compared), worst);
    for (const Kernel * kernel : available_kernels()) {
        std::printf(" %s", kernel->name);
    }
    std::printf("\n");
}
