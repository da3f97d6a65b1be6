// Products of packed weights against sums in double precision, and their bits: on every instruction set, with any number
// of threads, and of each row alone. Random shapes and groups of all types. Nothing may be allocated while they compute.
#include "kernels/product.hpp"
#include "kernels/types.hpp"
#include "threads_of_check.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

using namespace triollama::native::kernels;

namespace {

using Random = std::mt19937;

int64_t up_to(Random & random, int64_t most) { return 1 + static_cast<int64_t>(random() % static_cast<unsigned>(most)); }

// About normal, and the same on every machine.
float number(Random & random) {
    float sum = 0;
    for (int i = 0; i < 4; ++i) {
        sum += static_cast<float>(random() >> 8) * 0x1p-24f - 0.5f;
    }
    return sum;
}

// Some matrices of one type and width; each meets some rows.
struct Case {
    Type                              type;
    int64_t                           width;
    std::vector<std::vector<uint8_t>> panels;
    std::vector<int64_t>              columns, rows;
    std::vector<float>                x;

    Case(Random & random, Type type) : type(type) {
        const bool super = ggml_blck_size(shapes[type].of) > block;
        width = super ? 256 * up_to(random, 3) : block * (random() % 4 ? up_to(random, 12) : 40 + up_to(random, 40));
        const size_t row_bytes = ggml_row_size(shapes[type].of, width);
        for (int64_t g = up_to(random, 3); g > 0; --g) {
            columns.push_back(up_to(random, 100));
            rows.push_back(random() % 3 ? up_to(random, 9) : up_to(random, 70));
            std::vector<float> weights(static_cast<size_t>(columns.back() * width));
            for (float & w : weights) {
                w = number(random);
            }
            std::vector<uint8_t> packed(static_cast<size_t>(columns.back()) * row_bytes);
            ggml_get_type_traits(shapes[type].of)->from_float_ref(weights.data(), packed.data(), columns.back() * width);
            const size_t of_panel = panel_bytes(shapes[type], width / block);
            panels.emplace_back(static_cast<size_t>((columns.back() + panel_rows - 1) / panel_rows) * of_panel + 64);
            for (int64_t first = 0; first < columns.back(); first += panel_rows) {
                pack_panel(type, packed.data(), row_bytes, first, columns.back(), width / block,
                           panel(panels.size() - 1) + static_cast<size_t>(first / panel_rows) * of_panel);
            }
            for (int64_t i = 0; i < rows.back() * width; ++i) {
                x.push_back(number(random) * (random() % 50 ? 1.0f : 10.0f));
            }
        }
    }

    uint8_t * panel(size_t g) { return reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(panels[g].data()) + 63) / 64 * 64); }

    // Rows [from, to) of each group, counted from its end where there are fewer.
    std::vector<float> run(int64_t from, int64_t to, int n_threads, bool mixed = false) {
        size_t  n_out = 0;
        int64_t n_rows = 0;
        for (size_t g = 0; g < rows.size(); ++g) {
            const int64_t n = std::min(to, rows[g]) - std::min(from, rows[g]);
            n_out += static_cast<size_t>(n * columns[g]);
            n_rows += n;
        }
        std::vector<float> out(n_out);
        Workspace counted;
        const auto n_groups = static_cast<int64_t>(rows.size());
        Product(counted, type, width / block, n_rows, n_groups, 0, n_threads);
        std::vector<char> memory(counted.bytes());
        in_threads(n_threads, [&](Team & team) {
            Workspace workspace(memory.data());
            Product product(workspace, type, width / block, n_rows, n_groups, team.ith, team.nth);
            const float * at = x.data();
            float * result = out.data();
            for (size_t g = 0; g < rows.size(); at += rows[g++] * width) {
                product.begin_group(panel(g), columns[g]);
                for (int64_t r = std::min(from, rows[g]); r < std::min(to, rows[g]); ++r, result += columns[g]) {
                    product.add_row({ at + r * width, result });
                }
            }
            if (mixed) {   // with whatever is chosen when it begins
                choose_kernel(available_kernels()[static_cast<size_t>(team.ith) % available_kernels().size()]->name);
            }
            product.multiply(team);
        });
        return out;
    }
};

double worst[n_types] = {};
int64_t compared = 0;
uint64_t bits = 14695981039346656037u;   // of all numbers

// Errors by the length of both factors: no more than quantising activations makes.
void check(Case & one, const std::vector<float> & made) {
    std::vector<float> w(static_cast<size_t>(one.width));
    const float * x = one.x.data();
    const float * row = made.data();
    for (size_t g = 0; g < one.rows.size(); ++g) {
        for (int64_t r = 0; r < one.rows[g]; ++r, x += one.width, row += one.columns[g]) {
            for (int64_t c = 0; c < one.columns[g]; ++c) {
                read_row(one.type, one.panel(g) + static_cast<size_t>(c / panel_rows) * panel_bytes(shapes[one.type], one.width / block),
                         one.width / block, static_cast<int>(c % panel_rows), w.data());
                double sum = 0, of_w = 0, of_x = 0;
                for (size_t k = 0; k < w.size(); ++k) {
                    sum += static_cast<double>(w[k]) * x[k];
                    of_w += static_cast<double>(w[k]) * w[k];
                    of_x += static_cast<double>(x[k]) * x[k];
                }
                worst[one.type] = std::max(worst[one.type], std::fabs(row[c] - sum) / std::sqrt(of_w * of_x));
                ++compared;
            }
        }
    }
    for (float value : made) {
        uint32_t four;
        std::memcpy(&four, &value, sizeof(four));
        bits = (bits ^ four) * 1099511628211u;
    }
}

bool same(const std::vector<float> & one, const std::vector<float> & other) {
    return std::memcmp(one.data(), other.data(), other.size() * sizeof(float)) == 0;
}

// A row that holds what is infinite or no number has no products that are numbers, and changes no other row's.
void spoil(Case & one, const std::vector<float> & whole, Random & random) {
    const auto at = static_cast<int64_t>(random() % one.x.size());
    const float kept = std::exchange(one.x[static_cast<size_t>(at)], random() % 3 ? (random() % 2 ? -INFINITY : INFINITY) : NAN);
    const auto made = one.run(0, *std::max_element(one.rows.begin(), one.rows.end()), 1);
    size_t i = 0;
    int64_t row = 0;
    for (size_t g = 0; g < one.rows.size(); ++g) {
        for (int64_t r = 0; r < one.rows[g]; ++r, ++row) {
            for (int64_t c = 0; c < one.columns[g]; ++c, ++i) {
                const bool fine = row != at / one.width         ? std::memcmp(&made[i], &whole[i], sizeof(float)) == 0
                                  : is_float(shapes[one.type]) ? !std::isfinite(made[i])
                                                                : std::isnan(made[i]);
                if (!fine) {
                    std::printf("%s with %s: %g in row %ld, beside what is no number in row %ld\n", ggml_type_name(shapes[one.type].of),
                                chosen_kernel().name, static_cast<double>(made[i]), static_cast<long>(row), static_cast<long>(at / one.width));
                    std::exit(1);
                }
            }
        }
    }
    one.x[static_cast<size_t>(at)] = kept;
}

void check(unsigned seed) {
    Random random(seed);
    Case one(random, static_cast<Type>(seed % n_types));
    choose_kernel("portable");
    const int64_t most = *std::max_element(one.rows.begin(), one.rows.end());
    const auto whole = one.run(0, most, 1);
    check(one, whole);
    const int64_t from = static_cast<int64_t>(random() % static_cast<unsigned>(most)), to = from + up_to(random, most - from);
    const auto part = one.run(from, to, 1);
    const float *at = whole.data(), *some = part.data();
    for (size_t g = 0; g < one.rows.size(); ++g) {
        const int64_t first = std::min(from, one.rows[g]), last = std::min(to, one.rows[g]);
        const auto n = static_cast<size_t>((last - first) * one.columns[g]);
        if (n && std::memcmp(at + first * one.columns[g], some, n * sizeof(float)) != 0) {
            std::printf("seed %u: rows %ld to %ld have other bits alone\n", seed, static_cast<long>(from), static_cast<long>(to));
            std::exit(1);
        }
        at += one.rows[g] * one.columns[g];
        some += n;
    }
    if (!same(one.run(0, most, 3, true), whole)) {
        std::printf("seed %u: other bits while others are chosen\n", seed);
        std::exit(1);
    }
    for (const Kernel * kernel : available_kernels()) {
        choose_kernel(kernel->name);
        for (int threads : { 1, 2, 3 }) {
            if (!same(one.run(0, most, threads), whole) || !same(one.run(from, to, threads), part)) {
                std::printf("seed %u: other bits with %s and %d threads\n", seed, kernel->name, threads);
                std::exit(1);
            }
        }
        spoil(one, whole, random);
    }
}

}  // namespace

int main(int, char ** arguments) {
    const unsigned n = static_cast<unsigned>(std::atoi(arguments[1]));
    for (unsigned seed = 0; seed < n; ++seed) {
        check(seed);
    }
    std::printf("%ld numbers, bits %016lx, worst errors", static_cast<long>(compared), static_cast<unsigned long>(bits));
    for (int t = 0; t < n_types; ++t) {
        std::printf(" %s %.1e", ggml_type_name(shapes[t].of), worst[t]);
    }
    std::printf(":");
    for (const Kernel * kernel : available_kernels()) {
        std::printf(" %s", kernel->name);
    }
    std::printf("\n");
}
