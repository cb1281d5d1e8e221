// Targets whose kernels take numbers of tokens or responses: advantages, whitening, policy, ranking and preference losses.
#pragma once
#include <algorithm>

#include "fuzz.h"

namespace fuzz {
namespace {

void require_finite(const char* what, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) REQUIRE(isfinite(x[i]), "%s[%ld] = %g from finite input", what, (long)i, x[i]);
}

// Padded rows of tokens, or packed ones; garbage stands under the mask's zeros.
struct Tokens {
    Source& source;
    Memory& memory;
    int64_t B, T, total;
    int64_t* cu;
    Matrix<uint8_t> mask;
    bool masked;

    Tokens(Source& s, Memory& m)
        : source(s), memory(m), B(s.size(9)), T(s.size(70)), total(B * T), cu(nullptr), mask(), masked(s.coin()) {
        if (s.coin()) {
            cu = m.offsets(B, T);
            total = cu[B];
            T = 0;
        }
        if (masked) mask = cu ? m.mask(1, total) : m.mask(B, T);
    }
    int64_t rows() const { return cu ? 1 : B; }
    int64_t columns() const { return cu ? total : T; }
    int64_t stride(int64_t of) const { return cu ? 0 : of; }
    const uint8_t* kept() const { return masked ? mask.data : nullptr; }
    bool keeps(int64_t i) const { return !masked || (cu ? mask.data[i] : mask.row(i / T)[i % T]); }
    Matrix<float> numbers(const Numbers& kind) const {
        const Matrix<float> x = memory.matrix(rows(), columns(), kind);
        for (int64_t i = 0; x.stride > 0 && i < total; ++i)
            if (!keeps(i)) x.row(i / columns())[i % columns()] = source.garbage();
        return x;
    }
    void require_zero(const char* what, const float* x) const {
        for (int64_t i = 0; i < total; ++i) REQUIRE(keeps(i) || x[i] == 0.0f, "%s[%ld] = %g under mask 0", what, (long)i, x[i]);
    }
};

void gae(Source& s, Memory& m) {
    const bool tame = s.coin();
    const Numbers numbers = s.numbers(tame);
    const Tokens t(s, m);
    const Matrix<float> rewards = t.numbers(numbers), values = t.numbers(numbers);
    const float* last = s.coin() ? m.numbers(t.B, numbers) : nullptr;
    const double gamma = s.pick({1.0, 0.99, 0.0}), lam = s.pick({0.95, 1.0, 0.0});
    float *advantages = m.array<float>(t.total), *returns = m.array<float>(t.total);
    m.call("gae_fwd_f32", rewards.data, t.stride(rewards.stride), values.data, t.stride(values.stride), t.kept(),
           t.stride(t.mask.stride), last, t.cu, t.B, t.T, gamma, lam, advantages, returns);
    t.require_zero("advantages", advantages);
    t.require_zero("returns", returns);
    if (!tame) return;
    require_finite("advantages", advantages, t.total);
    require_finite("returns", returns, t.total);
}

void rlhf_advantages(Source& s, Memory& m) {
    const bool tame = s.coin(), whiten = s.coin();
    const Numbers numbers = s.numbers(tame);
    const Tokens t(s, m);
    Matrix<float> x[3];  // log-probs, the reference's, values
    for (auto& matrix : x) matrix = t.numbers(numbers);
    const float* scores = m.numbers(t.B, numbers);
    float* out[4];  // advantages, returns, rewards, kl
    for (auto& array : out) array = m.array<float>(t.total);
    double* row_stats = whiten ? m.array<double>(3 * t.B) : nullptr;
    const double clip = s.pick<double>({INFINITY, 0.5}), kl_coef = s.pick({0.0, 0.1}), lam = s.pick({0.95, 1.0, 0.0});
    m.call("rlhf_advantages_fwd_f32", scores, x[0].data, t.stride(x[0].stride), x[1].data, t.stride(x[1].stride),
           x[2].data, t.stride(x[2].stride), t.kept(), t.stride(t.mask.stride), t.cu, t.B, t.T, kl_coef, 1.0, lam,
           1 + s.below(3), clip, (int64_t)whiten, row_stats, out[0], out[1], out[2], out[3]);
    for (const float* array : out) {
        t.require_zero("a result", array);
        if (tame) require_finite("a result", array, t.total);
    }
}

void whiten(Source& s, Memory& m) {
    const bool tame = s.coin();
    const Numbers numbers = s.numbers(tame);
    const Tokens t(s, m);
    if (t.cu) return;
    const Matrix<float> x = t.numbers(numbers);
    double *row_stats = m.array<double>(3 * t.B), *stats = m.array<double>(3);
    m.call("whiten_stats_f32", x.data, x.stride, t.kept(), t.mask.stride, t.B, t.T, row_stats, stats);
    REQUIRE(!(stats[2] < 0.0), "a sum of squares is %g", stats[2]);
    float* out = m.array<float>(t.total);
    m.call("whiten_fwd_f32", x.data, x.stride, t.kept(), t.mask.stride, t.B, t.T, stats, (int64_t)s.coin(), out);
    t.require_zero("whitened", out);
    if (tame) require_finite("whitened", out, t.total);
}

void policy(Source& s, Memory& m) {
    const bool tame = s.coin(), with_policy = s.coin(), with_values = !with_policy || s.coin(), with_entropy = s.coin();
    const Numbers numbers = s.numbers(tame);
    const int64_t B = s.size(9), T = s.size(70, s.pick({1024, 512})), N = B * T;
    uint8_t* mask = m.array<uint8_t>(N, Use::input);
    const uint32_t share = s.pick({16u, 0u, 1u, 8u, 15u});
    int64_t kept = 0;
    for (int64_t i = 0; i < N; ++i) kept += mask[i] = s.random() % 16 < share;
    // log-probs, old ones, advantages, those of the reference, weights, coefficients; values, old ones, returns; entropy
    const bool full = s.coin(), clip_values = s.coin(), old_values = clip_values || s.coin();
    const bool present[10] = {with_policy, with_policy, with_policy, with_policy && full && s.coin(), with_policy && full && s.coin(),
                              with_policy, with_values, with_values && old_values, with_values, with_entropy};
    float* x[10] = {};
    for (int i = 0; i < 10; ++i) {
        if (present[i]) x[i] = m.numbers(N, numbers);
        for (int64_t t = 0; x[i] && t < N; ++t)
            if (!mask[t]) x[i][t] = s.garbage();
    }
    float* normalizers[2];
    for (auto& one : normalizers) {
        one = s.coin() ? m.array<float>(1, Use::input) : nullptr;
        if (one) *one = s.pick({1.0f, 7.0f, 3.5f});
    }
    const double inf = INFINITY;
    const double settings[18] = {
        full ? (double)s.below(10) : 0.0, s.pick({0.8, 0.0, 1.0}), s.pick({1.2, 1.28}), s.pick({inf, 1.5}),
        (double)s.coin(), s.pick({inf, 20.0, 0.5}), (double)s.below(4), (double)s.below(4), s.pick({0.0, 0.1}),
        s.pick({-inf, -10.0}), s.pick({inf, 20.0}), s.pick({inf, 10.0}), s.pick({inf, 10.0}), clip_values ? 0.2 : inf,
        s.pick({1.0, 0.1}), s.pick({1.0, -0.01}), (double)s.below(5), (double)s.below(5)};
    double* copied = m.array<double>(18, Use::input);
    for (int i = 0; i < 18; ++i) copied[i] = settings[i];
    const bool by_sequence = with_policy && (settings[0] == 1.0 || settings[0] == 4.0);
    const int64_t piece = s.pick({16384, 1024, 64, 33}), pieces = (N + piece - 1) / piece;
    int64_t* lengths = m.array<int64_t>(B);
    float* sequences = by_sequence ? m.array<float>(2 * B) : nullptr;
    double* workspace = m.array<double>(pieces * 33);
    float *losses = m.array<float>(4), *stats = m.array<float>(19);
    const int64_t counts[3] = {with_policy ? N : 0, with_values ? N : 0, with_entropy ? N : 0};
    float* grads[3];
    for (int i = 0; i < 3; ++i) grads[i] = m.array<float>(counts[i]);
    m.call("policy_fwd_f32", mask, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], normalizers[0],
           normalizers[1], copied, B, T, piece, lengths, sequences, workspace, losses, grads[0], grads[1],
           grads[2], stats);
    REQUIRE(stats[0] == (float)kept, "%g tokens of %ld are kept", stats[0], (long)kept);
    for (int i = 0; i < 3; ++i)
        for (int64_t t = 0; t < counts[i]; ++t) REQUIRE(mask[t] || grads[i][t] == 0.0f, "gradient %g under mask 0", grads[i][t]);
    if (tame && !full) require_finite("losses", losses, 4);
    for (int i = 1; tame && i < 3; ++i) require_finite("a gradient", grads[i], counts[i]);
    const float* upstream[3];
    for (auto& g : upstream) g = s.coin() ? m.numbers(1, numbers) : nullptr;
    float* out[3];
    for (int i = 0; i < 3; ++i) out[i] = m.array<float>(counts[i]);
    m.call("policy_bwd_f32", upstream[0], upstream[1], upstream[2], s.pick({0.1, 0.0, 1.0}), grads[0], grads[1], grads[2],
           counts[0], counts[1], counts[2], out[0], out[1], out[2]);
}

// Prompts with ranked responses; a rank below 0 is absent.
struct Responses {
    int64_t P;
    int64_t *cu, *ranks;
    float* scores;
    int64_t count() const { return cu[P]; }

    Responses(Source& s, Memory& m, const Numbers& numbers) : P(s.size(9)), cu(m.offsets(P, s.size(40))) {
        ranks = m.array<int64_t>(count(), Use::input);
        scores = m.numbers(count(), numbers);
        const int64_t kinds = s.pick({40, 1, 3}), absent = s.pick({0, 4}), scale = s.pick<int64_t>({1, 1ll << 31, 1ll << 55});
        for (int64_t i = 0; i < count(); ++i)
            ranks[i] = absent && s.random() % absent == 0 ? -1 : (int64_t)(s.random() % kinds) * scale;
        for (int64_t i = 0; i < count(); ++i)
            if (ranks[i] < 0) scores[i] = s.garbage();
    }
    void require_sound(const float* loss, const float* grad, const float* stats, bool tame) const {
        for (int64_t i = 0; i < count(); ++i)
            REQUIRE(ranks[i] >= 0 || grad[i] == 0.0f, "an absent response has gradient %g", grad[i]);
        for (int64_t p = 0; p < P; ++p) {
            int64_t present = 0;
            for (int64_t i = cu[p]; i < cu[p + 1]; ++i) present += ranks[i] >= 0;
            REQUIRE(stats[8 * p + 4] == (float)present, "%g responses of %ld", stats[8 * p + 4], (long)present);
            if (tame) require_finite("stats", stats + 8 * p, present ? 8 : 6);
        }
        if (!tame) return;
        require_finite("loss", loss, P);
        require_finite("grad", grad, count());
        for (int64_t p = 0; p < P; ++p) {
            double sum = 0.0;
            for (int64_t i = cu[p]; i < cu[p + 1]; ++i) sum += grad[i];
            REQUIRE(loss[p] >= 0.0f, "a loss of %g", loss[p]);
            REQUIRE(fabs(sum) < 1e-4, "the gradient of a loss of differences sums to %g", sum);
        }
    }
    void backward(Memory& m, const float* grad, const Numbers& numbers) const {
        const float* upstream = m.numbers(P, numbers);
        m.call("bradley_terry_bwd_f32", upstream, grad, cu, P, m.array<float>(count()));
    }
};

void bradley_terry(Source& s, Memory& m) {
    const bool tame = s.coin();
    const Numbers numbers = s.numbers(tame);
    const Responses r(s, m, numbers);
    int64_t columns = 0;
    const float* margins = nullptr;
    if (s.coin()) {
        for (int64_t p = 0; p < r.P; ++p) columns = std::max(columns, r.cu[p + 1] - r.cu[p]);
        columns = s.coin() ? columns + s.below(3) : 0;
        margins = m.numbers(columns ? r.count() * columns : r.P, numbers);
    }
    float *loss = m.array<float>(r.P), *grad = m.array<float>(r.count()), *stats = m.array<float>(8 * r.P);
    m.call("bradley_terry_fwd_f32", r.scores, r.ranks, r.cu, r.P, margins, columns, (int64_t)s.coin(), loss, grad, stats);
    r.require_sound(loss, grad, stats, tame);
    r.backward(m, grad, numbers);
}

void plackett_luce(Source& s, Memory& m) {
    const bool tame = s.coin();
    const Numbers numbers = s.numbers(tame);
    const Responses r(s, m, numbers);
    float *loss = m.array<float>(r.P), *grad = m.array<float>(r.count()), *stats = m.array<float>(8 * r.P);
    m.call("plackett_luce_fwd_f32", r.scores, r.ranks, r.cu, r.P, loss, grad, stats);
    r.require_sound(loss, grad, stats, tame);
    r.backward(m, grad, numbers);
}

void preference(Source& s, Memory& m) {
    enum { SIGMOID, IPO, HINGE, ORPO, KTO, EXO_PAIR, DISCOPOP, NCA_PAIR, BCO_PAIR, SPPO_HARD, APO_ZERO, APO_DOWN, KINDS };
    const bool tame = s.coin();
    const Numbers numbers = s.numbers(tame);
    const int64_t kind = s.below(KINDS), C = s.size(90), R = kind == KTO ? s.size(90) : C;
    const float *chosen = m.numbers(C, numbers), *rejected = m.numbers(R, numbers);
    const bool free = kind == ORPO || (kind == SIGMOID && s.coin()), by_length = free || s.coin();
    const float *ref_chosen = free ? nullptr : m.numbers(C, numbers), *ref_rejected = free ? nullptr : m.numbers(R, numbers);
    int64_t* lengths[2] = {};
    for (int side = 0; by_length && side < 2; ++side) {
        lengths[side] = m.array<int64_t>(side ? R : C, Use::input);
        for (int64_t i = 0; i < (side ? R : C); ++i) lengths[side][i] = 1 + s.random() % 50;
    }
    const float* anchor = kind == KTO || (kind == BCO_PAIR && s.coin()) ? m.numbers(1, numbers) : nullptr;
    const double beta = s.pick({0.1, 2.0}), a = kind == SIGMOID ? s.pick({0.0, 0.1, -0.125}) : s.pick({0.05, 0.5});
    const double b = kind == SIGMOID ? s.pick({0.0, 0.5}) : 0.8, alpha = s.pick({0.0, 0.5, 2.0});
    const int64_t divergence = free || kind == KTO ? 0 : s.below(3);
    float* loss = m.array<float>(kind == KTO ? C + R : C);
    float* out[4];  // gradients, then rewards, of chosen and rejected
    for (int i = 0; i < 4; ++i) out[i] = m.array<float>(i % 2 ? R : C);
    m.call("preference_fwd_f32", chosen, rejected, ref_chosen, ref_rejected, lengths[0], lengths[1], C, R, kind, anchor,
           beta, a, b, divergence, alpha, loss, out[0], out[1], out[2], out[3]);
    for (int64_t i = 0; i < (kind == KTO ? C + R : C); ++i) {
        if (tame && divergence < 2) REQUIRE(isfinite(loss[i]), "loss %g", loss[i]);  // an alpha divergence may reach e^80
        if (kind == IPO || kind == HINGE || kind == KTO) REQUIRE(!(loss[i] < 0.0f), "loss %g", loss[i]);
    }
    for (int i = 0; tame && divergence < 2 && i < 4; ++i) require_finite("a result", out[i], i % 2 ? R : C);
    const float* upstream = m.numbers(C + R, numbers);
    m.call("preference_bwd_f32", upstream, kind == KTO ? upstream + C : upstream, out[0], out[1], C, R, m.array<float>(C),
           m.array<float>(R));
}

}  // namespace
}  // namespace fuzz
