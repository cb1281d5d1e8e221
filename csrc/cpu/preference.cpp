// Losses of pairs of responses, or of KTO's single responses, with gradients and rewards in one pass.
#include "preference.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int W = RK_LANES;

template <class S>
inline Lanes load_some(const S* x, int64_t count, float fill) {
    Lanes lanes = splat<Lanes>(fill);
    if (count >= W)
        for (int i = 0; i < W; ++i) lanes[i] = (float)x[i];
    else
        for (int64_t i = 0; i < count; ++i) lanes[i] = (float)x[i];
    return lanes;
}

inline void store_some(float* to, Lanes lanes, int64_t count) {
    if (count >= W) return store(to, lanes);
    float some[W];
    store(some, lanes);
    for (int64_t i = 0; i < count; ++i) to[i] = some[i];
}

struct Side {                      // one response of each pair
    const float *log_probs, *ref;  // ref null: no reference model
    const int64_t* lengths;        // null: sums, not means
    float *grad, *rewards;

    Lanes length(int64_t i, int64_t count) const { return load_some(lengths + i, count, 1.0f); }
    Lanes ratio(int64_t i, int64_t count) const {
        Lanes x = load_some(log_probs + i, count, 0.0f);
        if (ref) x -= load_some(ref + i, count, 0.0f);
        return x;
    }
    Lanes compared(Lanes x, int64_t i, int64_t count) const { return lengths ? x / length(i, count) : x; }
    void write(int64_t i, int64_t count, Lanes slope, Lanes reward) const {
        store_some(grad + i, lengths ? slope / length(i, count) : slope, count);
        store_some(rewards + i, reward, count);
    }
};

struct Job {
    Side chosen, rejected;
    PreferenceNumbers numbers;
    int64_t divergence;
    float power;
    float* loss;
};

template <int Kind>
void pairs(void* context, int64_t begin, int64_t end) {
    const Job& j = *(const Job*)context;
    for (int64_t i = begin; i < end; i += W) {
        const int64_t count = end - i < W ? end - i : W;
        Score<Lanes> good = {j.chosen.ratio(i, count), {}}, bad = {j.rejected.ratio(i, count), {}};
        if (j.divergence != REVERSE_KL) {
            good = score_of(good.value, j.divergence, j.power);
            bad = score_of(bad.value, j.divergence, j.power);
        }
        const Lanes chosen = j.chosen.compared(good.value, i, count), rejected = j.rejected.compared(bad.value, i, count);
        PreferenceTerm<Lanes> term = preference_term<Kind>(chosen, rejected, j.numbers);
        if (j.divergence != REVERSE_KL) {
            term.slope_chosen *= good.slope;
            term.slope_rejected *= bad.slope;
        }
        store_some(j.loss + i, term.loss, count);
        j.chosen.write(i, count, term.slope_chosen, j.numbers.beta * chosen);
        j.rejected.write(i, count, term.slope_rejected, j.numbers.beta * rejected);
    }
}

using Body = void (*)(void*, int64_t, int64_t);

Body body_of(int64_t kind) {
    switch (kind) {
        case PREF_IPO: return pairs<PREF_IPO>;
        case PREF_HINGE: return pairs<PREF_HINGE>;
        case PREF_ORPO: return pairs<PREF_ORPO>;
        case PREF_EXO_PAIR: return pairs<PREF_EXO_PAIR>;
        case PREF_DISCOPOP: return pairs<PREF_DISCOPOP>;
        case PREF_NCA_PAIR: return pairs<PREF_NCA_PAIR>;
        case PREF_BCO_PAIR: return pairs<PREF_BCO_PAIR>;
        case PREF_SPPO_HARD: return pairs<PREF_SPPO_HARD>;
        case PREF_APO_ZERO: return pairs<PREF_APO_ZERO>;
        case PREF_APO_DOWN: return pairs<PREF_APO_DOWN>;
        default: return pairs<PREF_SIGMOID>;
    }
}

struct KtoJob {
    Side side;
    float beta, weight, anchor, sign;  // sign: +1 desirable, -1 undesirable
    float* loss;
};

void kto(void* context, int64_t begin, int64_t end) {
    const KtoJob& j = *(const KtoJob*)context;
    for (int64_t i = begin; i < end; i += W) {
        const int64_t count = end - i < W ? end - i : W;
        const Lanes x = j.side.compared(j.side.ratio(i, count), i, count);
        const KtoTerm<Lanes> term = kto_term(j.sign * j.beta * (x - j.anchor), j.weight);
        store_some(j.loss + i, term.loss, count);
        j.side.write(i, count, -j.sign * j.beta * term.slope, j.beta * x);
    }
}

constexpr int64_t GRAIN = 8192;  // pairs a thread takes at once: about 30 us of work; a multiple of W

struct Product {
    const float *a, *b;
    float* out;
};

void multiply(void* context, int64_t begin, int64_t end) {
    const Product& p = *(const Product*)context;
    for (int64_t i = begin; i < end; ++i) p.out[i] = p.a[i] * p.b[i];
}

}  // namespace

void preference_fwd_f32(const float* chosen, const float* rejected, const float* ref_chosen, const float* ref_rejected,
                        const int64_t* chosen_lengths, const int64_t* rejected_lengths, int64_t chosen_count,
                        int64_t rejected_count, int64_t kind, const float* anchor, double beta, double a, double b,
                        int64_t divergence, double alpha, float* loss, float* grad_chosen, float* grad_rejected,
                        float* chosen_rewards, float* rejected_rewards, int64_t threads) {
    Job job = {{chosen, ref_chosen, chosen_lengths, grad_chosen, chosen_rewards},
               {rejected, ref_rejected, rejected_lengths, grad_rejected, rejected_rewards},
               {(float)beta, (float)a, (float)b, anchor ? *anchor : 0.0f},
               divergence,
               (float)(alpha - 1.0),
               loss};
    if (kind == PREF_KTO) {
        const float kl = *anchor < 0.0f ? 0.0f : *anchor;
        KtoJob good = {job.chosen, (float)beta, (float)a, kl, 1.0f, loss};
        KtoJob bad = {job.rejected, (float)beta, (float)b, kl, -1.0f, loss + chosen_count};
        parallel_for(chosen_count, GRAIN, threads, kto, &good);
        parallel_for(rejected_count, GRAIN, threads, kto, &bad);
        return;
    }
    parallel_for(chosen_count, GRAIN, threads, body_of(kind), &job);
}

// Each gradient times the upstream gradient of its loss; the two upstream arrays may be one.
void preference_bwd_f32(const float* for_chosen, const float* for_rejected, const float* grad_chosen,
                        const float* grad_rejected, int64_t chosen_count, int64_t rejected_count, float* out_chosen,
                        float* out_rejected, int64_t threads) {
    Product chosen = {for_chosen, grad_chosen, out_chosen}, rejected = {for_rejected, grad_rejected, out_rejected};
    parallel_for(chosen_count, 8 * GRAIN, threads, multiply, &chosen);
    parallel_for(rejected_count, 8 * GRAIN, threads, multiply, &rejected);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(preference_fwd_f32);
RK_REGISTER(preference_bwd_f32);
