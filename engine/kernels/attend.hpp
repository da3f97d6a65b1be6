// What attention is made of, for any instruction set: see attention.hpp for the order of sums, multiply.hpp for V.
#pragma once

#include "kernels/attention.hpp"

#include <cstring>

namespace triollama::native::kernels {
namespace {

constexpr int lanes = 16;   // of a partial sum

template <class V> struct Lanes {
    static constexpr int n = lanes / V::width;
    typename V::Floats part[n];

    static Lanes zero() {
        Lanes made;
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) {
            made.part[i] = V::zero();
        }
        return made;
    }
    template <int kind> static Lanes load(const char * at) {
        Lanes made;
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) {
            if constexpr (kind == in_halves) {
                made.part[i] = V::halves(reinterpret_cast<const uint8_t *>(at) + 2 * V::width * i);
            } else {
                made.part[i] = V::load_floats(reinterpret_cast<const float *>(at) + V::width * i);
            }
        }
        return made;
    }
    static Lanes load(const float * at) { return load<in_floats>(reinterpret_cast<const char *>(at)); }
    void store(float * at) const {
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) {
            V::store(at + V::width * i, part[i]);
        }
    }
    void add(const Lanes & x, const Lanes & y) {
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) {
            part[i] = V::fma(x.part[i], y.part[i], part[i]);
        }
    }
    void add(typename V::Floats x, const Lanes & y) {
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) {
            part[i] = V::fma(x, y.part[i], part[i]);
        }
    }
    float total() const {
        float x[lanes];
        store(x);
        for (int half = lanes / 2; half; half /= 2) {
            for (int i = 0; i < half; ++i) {
                x[i] += x[i + half];
            }
        }
        return x[0];
    }
};

template <int kind> inline const char * cell_at(const Cells & cells, int64_t i) {
    return cells.data + static_cast<size_t>(cells.list[i]) * cells.stride;
}

// R rows with C cells at a time, R * C = V::sums.
template <class V, int kind, int R>
inline void scores_of(const Cells & keys, const float * rows, int64_t n_rows, float * to, int64_t stride) {
    constexpr int C = V::sums / R;
    const float * row[R];
    for (int r = 0; r < R; ++r) {
        row[r] = rows + (r < n_rows ? r : n_rows - 1) * keys.width;
    }
    for (int64_t i = 0; i < keys.n; i += C) {
        const char * cell[C];
        for (int c = 0; c < C; ++c) {
            cell[c] = cell_at<kind>(keys, i + c < keys.n ? i + c : keys.n - 1);
        }
        Lanes<V> sum[R * C];
#pragma GCC unroll 16
        for (int s = 0; s < R * C; ++s) {
            sum[s] = Lanes<V>::zero();
        }
        for (int64_t d = 0; d < keys.width; d += lanes) {
            Lanes<V> q[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                q[r] = Lanes<V>::load(row[r] + d);
            }
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) {
                const Lanes<V> k = Lanes<V>::template load<kind>(cell[c] + d * (kind == in_halves ? 2 : 4));
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    sum[r * C + c].add(q[r], k);
                }
            }
        }
        float made[R * C];
        V::totals(sum, made);
        const size_t n = static_cast<size_t>(keys.n - i < C ? keys.n - i : C) * sizeof(float);
        for (int r = 0; r < R && r < n_rows; ++r) {
            std::memcpy(to + r * stride + i, made + r * C, n);
        }
    }
}

template <class V, int kind> void scores(const Cells & keys, const float * rows, int64_t m, float * to, int64_t stride) {
    constexpr int R = V::sums == 16 ? 4 : 2;
    int64_t r = 0;
    for (; r + 1 < m; r += R) {
        scores_of<V, kind, R>(keys, rows + r * keys.width, m - r, to + r * stride, stride);
    }
    if (r < m) {
        scores_of<V, kind, 1>(keys, rows + r * keys.width, 1, to + r * stride, stride);
    }
}

// R rows, N times 16 of the width.
template <class V, int kind, int R, int N>
inline void gather_part(const Cells & values, int64_t d, const float * p, int64_t stride, float * out) {
    Lanes<V> sum[R * N];
#pragma GCC unroll 16
    for (int s = 0; s < R * N; ++s) {
        sum[s] = Lanes<V>::load(out + (s / N) * values.width + d + (s % N) * lanes);
    }
    for (int64_t i = 0; i < values.n; ++i) {
        const char * cell = cell_at<kind>(values, i) + d * (kind == in_halves ? 2 : 4);
        Lanes<V> v[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            v[n] = Lanes<V>::template load<kind>(cell + n * lanes * (kind == in_halves ? 2 : 4));
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const auto weight = V::floats(p[r * stride + i]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                sum[r * N + n].add(weight, v[n]);
            }
        }
    }
#pragma GCC unroll 16
    for (int s = 0; s < R * N; ++s) {
        sum[s].store(out + (s / N) * values.width + d + (s % N) * lanes);
    }
}

template <class V, int kind, int R> inline void gather_rows(const Cells & values, const float * p, int64_t stride, float * out) {
    constexpr int N = V::sums / 4;
    int64_t d = 0;
    for (; d + N * lanes <= values.width; d += N * lanes) {
        gather_part<V, kind, R, N>(values, d, p, stride, out);
    }
    for (; d < values.width; d += lanes) {
        gather_part<V, kind, R, 1>(values, d, p, stride, out);
    }
}

template <class V, int kind> void gather(const Cells & values, const float * p, int64_t stride, int64_t m, float * out) {
    for (; m >= 4; m -= 4, p += 4 * stride, out += 4 * values.width) {
        gather_rows<V, kind, 4>(values, p, stride, out);
    }
    switch (m) {
        case 3: return gather_rows<V, kind, 3>(values, p, stride, out);
        case 2: return gather_rows<V, kind, 2>(values, p, stride, out);
        case 1: return gather_rows<V, kind, 1>(values, p, stride, out);
    }
}

template <class V> float scaled(float * scores, int64_t n, float scale, float least) {
    const auto by = V::floats(scale);
    auto most = V::floats(least);
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
        const auto x = V::multiply(V::load_floats(scores + i), by);
        V::store(scores + i, x);
        most = V::larger(most, x);
    }
    float each[V::width];
    V::store(each, most);
    for (; i < n; ++i) {
        scores[i] *= scale;
        least = least > scores[i] ? least : scores[i];
    }
    for (int l = 0; l < V::width; ++l) {
        least = least > each[l] ? least : each[l];
    }
    return least;
}

// exp(x) for x <= 0, to a unit in the last place or two; 1e-38 and the like below -87. By halves of log 2 (Cody and
// Waite), then the Taylor series to the sixth power.
template <class V> inline typename V::Floats exponential_of(typename V::Floats x) {
    x = V::larger(V::floats(-87.0f), x);
    const auto whole = V::to_ints(V::multiply(x, V::floats(1.44269504f)));
    const auto n = V::to_floats(whole);
    auto r = V::fma(n, V::floats(-0.693359375f), x);
    r = V::fma(n, V::floats(2.12194440e-4f), r);
    auto p = V::floats(1.0f / 720);
    p = V::fma(p, r, V::floats(1.0f / 120));
    p = V::fma(p, r, V::floats(1.0f / 24));
    p = V::fma(p, r, V::floats(1.0f / 6));
    p = V::fma(p, r, V::floats(0.5f));
    p = V::fma(p, r, V::floats(1.0f));
    p = V::fma(p, r, V::floats(1.0f));
    return V::multiply(p, V::power_of_two(whole));
}

template <class V> float soften(float * scores, int64_t n, float largest) {
    const auto less = V::floats(-largest), one = V::floats(1.0f);
    Lanes<V> total = Lanes<V>::zero();
    int64_t i = 0;
    const auto step = [&](float * at) {
        Lanes<V> x = Lanes<V>::load(at);
#pragma GCC unroll 4
        for (int l = 0; l < Lanes<V>::n; ++l) {
            x.part[l] = exponential_of<V>(V::fma(x.part[l], one, less));
        }
        x.store(at);
        return x;
    };
    for (; i + lanes <= n; i += lanes) {
        total.add(one, step(scores + i));
    }
    if (i < n) {
        float rest[lanes] = {};
        const size_t bytes = static_cast<size_t>(n - i) * sizeof(float);
        std::memcpy(rest, scores + i, bytes);
        step(rest);
        std::memcpy(scores + i, rest, bytes);
        std::memset(rest + (n - i), 0, sizeof(rest) - bytes);
        total.add(one, Lanes<V>::load(rest));
    }
    return total.total();
}

template <class V> float exponential(float x) {
    float each[V::width];
    V::store(each, exponential_of<V>(V::floats(x)));
    return each[0];
}

template <class V> void widen(const void * halves, int64_t n, float * to) {
    for (int64_t i = 0; i < n; i += lanes) {
        Lanes<V>::template load<in_halves>(static_cast<const char *>(halves) + 2 * i).store(to + i);
    }
}

template <class V> constexpr Attend attend_with() {
    return { { scores<V, in_floats>, scores<V, in_halves> }, { gather<V, in_floats>, gather<V, in_halves> },
             scaled<V>, soften<V>, exponential<V>, widen<V> };
}

}  // namespace
}  // namespace triollama::native::kernels
