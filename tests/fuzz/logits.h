// Targets whose kernels take rows of logits: log-probs and entropy, KL, and the chunks of a linear head.
#pragma once
#include <algorithm>

#include "fuzz.h"

namespace fuzz {
namespace {

struct Logits {
    int64_t N, V;
    bool tame, banned;
    Numbers numbers, upstream;
    double temperature, softcap;

    explicit Logits(Source& s) : N(s.size(5)), V(1 + s.size(90, s.pick({2048, 128, 4096}))), tame(s.coin()), banned(s.coin()) {
        numbers = upstream = s.numbers(tame);
        if (tame && banned) numbers.rarity = s.pick({2, 10, 1}), numbers.specials = 1 << 4;  // -inf
        temperature = s.pick({1.0, 0.7, 20.0});
        softcap = s.pick({0.0, 0.0, 5.0});
    }
};

// Whether a row holds a NaN, and whether all else in it is -inf or, divided by the temperature, still finite.
template <class T>
struct RowFacts {
    bool nan = false, sound = true;
    RowFacts(const Matrix<T>& x, int64_t row, double temperature) {
        for (int64_t c = 0; c < x.columns; ++c) {
            const float v = x.at(row, c);
            nan |= v != v;
            sound &= v == -INFINITY || fabs(v) / temperature < 1e38;
        }
    }
};

int64_t* labels_of(Source& s, Memory& m, int64_t N, int64_t V, bool stray) {
    int64_t* labels = m.array<int64_t>(N, Use::input);
    for (int64_t n = 0; n < N; ++n) {
        const uint32_t kind = s.random() % 8;
        labels[n] = kind == 0 ? -100 : (int64_t)(s.random() % (uint32_t)V);
        if (stray && kind == 1) labels[n] = s.random() & 1 ? V : INT64_MIN + (int64_t)(s.random() % 3);
    }
    return labels;
}

template <class T>
void logprobs_of(Source& s, Memory& m, int64_t dtype) {
    const Logits l(s);
    Matrix<T> x = m.matrix<T>(l.N, l.V, l.numbers);
    const bool with_entropy = s.coin(), with_labels = !with_entropy || s.coin();
    const int64_t* labels = with_labels ? labels_of(s, m, l.N, l.V, s.coin()) : nullptr;
    for (int64_t n = 0; labels && x.stride > 0 && n < l.N; ++n)
        for (int64_t c = 0; labels[n] == -100 && c < l.V; ++c) assign(x.row(n)[c], s.garbage());
    float *logprobs = m.array<float>(with_labels ? l.N : 0), *entropy = with_entropy ? m.array<float>(l.N) : nullptr;
    float *row_max = m.array<float>(l.N), *log_sum = m.array<float>(l.N);
    const int64_t length = l.N == 0 ? 0 : 1 + s.below(l.N);  // any: the rows all lie at one distance
    float* temperatures = s.coin() ? m.array<float>(l.N, Use::input) : nullptr;
    for (int64_t n = 0; temperatures && n < l.N; ++n) temperatures[n] = (float)l.temperature;
    if (with_entropy && with_labels && s.coin()) {
        float *log_squares = m.array<float>(l.N), *mean = m.array<float>(l.N);
        uint8_t* top = m.array<uint8_t>(l.N);
        m.call("token_statistics_fwd", x.data, dtype, length, length * x.stride, x.stride, labels, l.N, l.V, temperatures,
               l.temperature, l.softcap, (int64_t)-100, logprobs, entropy, row_max, log_sum, log_squares, mean, top);
        for (int64_t n = 0; n < l.N; ++n) {
            REQUIRE(!(log_squares[n] > 0.0f), "log sum p^2 is %g", log_squares[n]);
            REQUIRE(top[n] < 2 && (!top[n] || labels[n] >= 0), "label %ld is the first: %d", (long)labels[n], top[n]);
        }
    } else {
        m.call("logprobs_fwd", x.data, dtype, length, length * x.stride, x.stride, labels, l.N, l.V, temperatures,
               l.temperature, l.softcap, (int64_t)-100, logprobs, entropy, row_max, log_sum);
    }
    for (int64_t n = 0; n < l.N; ++n) {
        const bool ignored = labels && labels[n] == -100, stray = labels && !ignored && (labels[n] < 0 || labels[n] >= l.V);
        const RowFacts<T> row(x, n, l.temperature);
        if (labels) {
            const float lp = logprobs[n];
            if (ignored) REQUIRE(lp == 0.0f, "an ignored row has log-prob %g", lp);
            if (stray) REQUIRE(lp != lp, "a stray label has log-prob %g", lp);
            if (!ignored && !stray) {
                if (row.nan) REQUIRE(lp != lp, "a row with a NaN has log-prob %g", lp);
                if (row.sound) REQUIRE(lp <= 0.0f, "log-prob %g of %g", lp, x.at(n, labels[n]));
            }
        }
        if (entropy && l.tame && !stray)
            REQUIRE(entropy[n] > -1e-4f && entropy[n] < logf((float)l.V) + 1e-3f, "entropy %g", entropy[n]);
    }
    const float* for_logprobs = labels && (!with_entropy || s.coin()) ? m.numbers(l.N, l.upstream) : nullptr;
    const float* for_entropy = with_entropy && (!for_logprobs || s.coin()) ? m.numbers(l.N, l.upstream) : nullptr;
    const bool inplace = s.coin() && x.stride != 0;
    Matrix<T> out = {x.data, l.N, l.V, x.stride};
    if (inplace)
        m.overwrite(x.data);
    else
        out = {m.array<T>(l.N * l.V), l.N, l.V, l.V};
    std::vector<float> logits;
    for (int64_t i = 0; i < l.N * l.V; ++i) logits.push_back(x.at(i / l.V, i % l.V));
    const float* for_sum = s.coin() ? m.numbers(l.N, l.upstream) : nullptr;
    const float* for_each = s.coin() ? m.numbers(l.N, l.upstream) : nullptr;
    m.call("logprobs_bwd", for_logprobs, for_entropy, for_sum, for_each, x.data, dtype, length, length * x.stride, x.stride, labels, logprobs,
           entropy, row_max, log_sum, l.N, l.V, temperatures, l.temperature, l.softcap, (int64_t)-100, out.data, length * out.stride,
           out.stride);
    for (int64_t i = 0; i < l.N * l.V; ++i) {
        const int64_t n = i / l.V;
        const float g = out.at(n, i % l.V);
        const bool ignored = labels && labels[n] == -100, stray = labels && !ignored && (labels[n] < 0 || labels[n] >= l.V);
        if (ignored) REQUIRE(g == 0.0f, "an ignored row has gradient %g", g);
        if (stray) REQUIRE(g != g, "a stray label has gradient %g", g);
        if (!ignored && !stray && l.tame && logits[i] == -INFINITY) REQUIRE(g == 0.0f, "-inf has gradient %g", g);
        if (!stray && l.tame) REQUIRE(isfinite(g), "gradient %g of %g", g, logits[i]);
    }
}

void logprobs(Source& s, Memory& m) {
    const int64_t dtype = s.below(3);
    (dtype == 0 ? logprobs_of<float> : dtype == 1 ? logprobs_of<Bf16> : logprobs_of<Half>)(s, m, dtype);
}

template <class T, class U>
void kl_of(Source& s, Memory& m, int64_t dtype_a, int64_t dtype_b) {
    const Logits l(s);
    const Matrix<T> a = m.matrix<T>(l.N, l.V, l.numbers);
    const Matrix<U> b = m.matrix<U>(l.N, l.V, l.numbers);
    float* rows[5];  // kl, then maximum and log of the sum of each side
    for (auto& array : rows) array = m.array<float>(l.N);
    const int64_t length = l.N == 0 ? 0 : 1 + s.below(l.N);  // any: the rows all lie at one distance
    m.call("kl_fwd", a.data, dtype_a, length, length * a.stride, a.stride, b.data, dtype_b, length * b.stride, b.stride, l.N,
           l.V, l.temperature, rows[0], rows[1], rows[2], rows[3], rows[4]);
    for (int64_t n = 0; n < l.N; ++n) {
        const float kl = rows[0][n];
        const RowFacts<T> row_a(a, n, l.temperature);
        const RowFacts<U> row_b(b, n, l.temperature);
        if (row_a.nan || row_b.nan) REQUIRE(kl != kl || kl == INFINITY, "a row with a NaN has KL %g", kl);
        if (l.tame) REQUIRE(kl >= 0.0f, "KL %g", kl);
        if (l.tame && !l.banned) REQUIRE(isfinite(kl), "KL %g", kl);
    }
    const float* upstream = m.numbers(l.N, l.upstream);
    const bool need_a = s.coin(), need_b = !need_a || s.coin();
    T* grad_a = need_a ? m.array<T>(l.N * l.V) : nullptr;
    U* grad_b = need_b ? m.array<U>(l.N * l.V) : nullptr;
    m.call("kl_bwd", upstream, a.data, dtype_a, length, length * a.stride, a.stride, b.data, dtype_b, length * b.stride,
           b.stride, rows[0], rows[1], rows[2], rows[3], rows[4], l.N, l.V, l.temperature, grad_a, grad_b);
    for (int64_t i = 0; l.tame && i < l.N * l.V; ++i) {
        if (grad_a) REQUIRE(isfinite(value(grad_a[i])), "gradient %g", value(grad_a[i]));
        if (grad_b) REQUIRE(isfinite(value(grad_b[i])), "gradient %g", value(grad_b[i]));
    }
}

void kl(Source& s, Memory& m) {
    const int64_t a = s.below(3), b = s.below(3);
    using Kind = void (*)(Source&, Memory&, int64_t, int64_t);
    static const Kind kKinds[3][3] = {{kl_of<float, float>, kl_of<float, Bf16>, kl_of<float, Half>},
                                      {kl_of<Bf16, float>, kl_of<Bf16, Bf16>, kl_of<Bf16, Half>},
                                      {kl_of<Half, float>, kl_of<Half, Bf16>, kl_of<Half, Half>}};
    kKinds[a][b](s, m, a, b);
}

template <class T>
void approx_kl_of(Source& s, Memory& m, int64_t dtype) {
    const bool tame = s.coin();
    const Numbers numbers = s.numbers(tame);
    const int64_t rows = s.size(9), columns = s.size(90, s.pick({1024, 2048, 4096})), estimator = 1 + s.below(3);
    const Matrix<T> p = m.matrix<T>(rows, columns, numbers), q = m.matrix<T>(rows, columns, numbers);
    float* kl = m.array<float>(rows * columns);
    m.call("approx_kl_fwd", p.data, dtype, p.stride, q.data, dtype, q.stride, rows, columns, estimator, kl);
    for (int64_t i = 0; i < rows * columns; ++i) {
        const float a = p.at(i / columns, i % columns), b = q.at(i / columns, i % columns);
        if (a == b) REQUIRE(kl[i] == 0.0f, "%g of equal log-probs %g", kl[i], a);
        if (a != a || b != b) REQUIRE(kl[i] != kl[i], "%g of a NaN", kl[i]);
        if (a == a && b == b && estimator > 1) REQUIRE(kl[i] >= 0.0f, "estimate %ld of %g, %g is %g", (long)estimator, a, b, kl[i]);
    }
    const Matrix<float> upstream = m.matrix(rows, columns, numbers);
    const bool need_p = s.coin(), need_q = !need_p || s.coin();
    T *grad_p = need_p ? m.array<T>(rows * columns) : nullptr, *grad_q = need_q ? m.array<T>(rows * columns) : nullptr;
    m.call("approx_kl_bwd", upstream.data, upstream.stride, p.data, dtype, p.stride, q.data, dtype, q.stride, rows, columns,
           estimator, grad_p, grad_q);
}

void approx_kl(Source& s, Memory& m) {
    const int64_t dtype = s.below(3);
    (dtype == 0 ? approx_kl_of<float> : dtype == 1 ? approx_kl_of<Bf16> : approx_kl_of<Half>)(s, m, dtype);
}

template <class T>
void row_sums_of(Source& s, Memory& m, int64_t dtype) {
    const Logits l(s);
    const Matrix<T> x = m.matrix<T>(l.N, l.V, l.numbers);
    uint8_t* kept = m.array<uint8_t>(l.N, Use::input);
    double *total = m.array<double>(l.N, Use::both), *count = m.array<double>(l.N, Use::both);
    float* temperatures = s.coin() ? m.array<float>(l.N, Use::input) : nullptr;
    for (int64_t n = 0; n < l.N; ++n) {
        kept[n] = s.coin(), total[n] = count[n] = 0.0;
        if (temperatures) temperatures[n] = (float)l.temperature;
    }
    m.call("row_sums", x.data, dtype, x.stride, l.N, l.V, temperatures, l.temperature, l.softcap, kept, total, count);
    for (int64_t n = 0; n < l.N; ++n) {
        REQUIRE(count[n] >= 0.0 && count[n] <= (double)l.V, "%g entries of %ld", count[n], (long)l.V);
        REQUIRE(kept[n] || (total[n] == 0.0 && count[n] == 0.0), "a row that is not kept adds up to %g", total[n]);
        if (l.tame) REQUIRE(isfinite(total[n]), "a sum of %g", total[n]);
    }
}

void row_sums(Source& s, Memory& m) {
    const int64_t dtype = s.below(3);
    (dtype == 0 ? row_sums_of<float> : dtype == 1 ? row_sums_of<Bf16> : row_sums_of<Half>)(s, m, dtype);
}

// One row's vocabulary in chunks of any width, folded one after the other, then turned into gradients.
void linear(Source& s, Memory& m) {
    const Logits l(s);
    const bool with_entropy = s.coin(), with_bias = s.coin(), with_temperatures = s.coin();
    const int64_t* labels = labels_of(s, m, l.N, l.V, false);
    uint8_t* kept = m.array<uint8_t>(l.N, Use::input);
    for (int64_t n = 0; n < l.N; ++n) kept[n] = labels[n] != -100;
    const Numbers bias_numbers = s.numbers(l.tame);
    float* temperatures = with_temperatures ? m.array<float>(l.N, Use::input) : nullptr;
    for (int64_t n = 0; with_temperatures && n < l.N; ++n) temperatures[n] = 0.5f + s.unit();
    float *max = m.array<float>(l.N, Use::both), *label_logit = m.array<float>(l.N, Use::both);
    double *rest = m.array<double>(l.N, Use::both), *weighted = with_entropy ? m.array<double>(l.N, Use::both) : nullptr;
    uint8_t* here = m.array<uint8_t>(l.N, Use::both);
    const bool with_extras = with_entropy && s.coin();
    double* extras[3] = {};
    for (double*& x : extras) x = with_extras ? m.array<double>(l.N, Use::both) : nullptr;
    int64_t* top = with_extras ? m.array<int64_t>(l.N, Use::both) : nullptr;
    for (int64_t n = 0; n < l.N; ++n) {
        for (double* x : extras)
            if (x) x[n] = 0.0;
        if (top) top[n] = -1;
        max[n] = -INFINITY, rest[n] = 0.0, label_logit[n] = 0.0f, here[n] = 0;
        if (weighted) weighted[n] = 0.0;
    }
    const int64_t width = 1 + l.V / 5 + s.below(l.V);  // a few chunks
    std::vector<Matrix<float>> chunks;
    std::vector<const float*> biases;
    for (int64_t first = 0; first < l.V; first += width) {
        const int64_t v = std::min(width, l.V - first);
        chunks.push_back(m.matrix(l.N, v, l.numbers, Use::both));
        for (int64_t n = 0; n < l.N; ++n)
            for (int64_t c = 0; !kept[n] && c < v; ++c) chunks.back().row(n)[c] = s.garbage();
        biases.push_back(with_bias ? m.numbers(v, bias_numbers) : nullptr);
        if (with_extras)
            m.call("linear_fold_extras_f32", chunks.back().data, chunks.back().stride, l.N, v, first, biases.back(),
                   temperatures, l.temperature, l.softcap, labels, kept, max, rest, weighted, label_logit, here, extras[0],
                   extras[1], extras[2], top);
        else
            m.call("linear_fold_f32", chunks.back().data, chunks.back().stride, l.N, v, first, biases.back(), temperatures,
                   l.temperature, l.softcap, labels, kept, max, rest, weighted, label_logit, here);
    }
    for (int64_t n = 0; top && n < l.N; ++n)
        REQUIRE(top[n] >= -1 && top[n] < l.V && (top[n] >= 0) == (max[n] > -INFINITY), "the first of maxima is %ld", (long)top[n]);
    float *logprobs = m.array<float>(l.N, Use::input), *entropy = m.array<float>(l.N, Use::input);
    float* log_sum = m.array<float>(l.N, Use::input);
    for (int64_t n = 0; n < l.N; ++n) {
        REQUIRE(kept[n] || (rest[n] == 0.0 && max[n] == -INFINITY), "a row that is not kept adds up to %g", rest[n]);
        REQUIRE(here[n] == kept[n], "label %ld was found %d times", (long)labels[n], here[n]);
        const bool dead = max[n] == -INFINITY && rest[n] == 0.0;
        log_sum[n] = (float)log1p(rest[n]);
        logprobs[n] = dead ? -INFINITY : label_logit[n] - max[n] - log_sum[n];
        entropy[n] = dead || !weighted ? 0.0f : (float)(log1p(rest[n]) - weighted[n] / (1.0 + rest[n]));
        if (l.tame && kept[n]) REQUIRE(logprobs[n] <= 1e-4f, "log-prob %g", logprobs[n]);
    }
    const float *for_logprobs = m.numbers(l.N, l.upstream), *for_entropy = with_entropy ? m.numbers(l.N, l.upstream) : nullptr;
    for (size_t i = 0; i < chunks.size(); ++i) {
        const Matrix<float> x = chunks[i];
        m.call("linear_gradient_f32", x.data, x.stride, l.N, x.columns, (int64_t)i * width, biases[i], (int64_t)1,
               temperatures, l.temperature, l.softcap, labels, kept, for_logprobs, for_entropy, (const float*)nullptr, (const float*)nullptr,
               logprobs, entropy, max, log_sum);
        for (int64_t j = 0; j < l.N * x.columns; ++j) {
            const int64_t n = j / x.columns;
            const float g = x.at(n, j % x.columns);
            if (!kept[n]) REQUIRE(g == 0.0f, "a row that is not kept has gradient %g", g);
            if (l.tame) REQUIRE(isfinite(g), "gradient %g", g);
        }
    }
}

}  // namespace
}  // namespace fuzz
