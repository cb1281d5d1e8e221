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
    Lanes compared(int64_t i, int64_t count) const {
        Lanes x = load_some(log_probs + i, count, 0.0f);
        if (ref) x -= load_some(ref + i, count, 0.0f);
        return lengths ? x / length(i, count) : x;
    }
    void write(int64_t i, int64_t count, Lanes slope, Lanes reward) const {
        store_some(grad + i, lengths ? slope / length(i, count) : slope, count);
        store_some(rewards + i, reward, count);
    }
};

struct Job {
    Side chosen, rejected;
    PreferenceNumbers numbers;
    float* loss;
};

template <int Kind>
void pairs(void* context, int64_t begin, int64_t end) {
    const Job& j = *(const Job*)context;
    for (int64_t i = begin; i < end; i += W) {
        const int64_t count = end - i < W ? end - i : W;
        const Lanes chosen = j.chosen.compared(i, count), rejected = j.rejected.compared(i, count);
        const PreferenceTerm<Lanes> term = preference_term<Kind>(chosen, rejected, j.numbers);
        store_some(j.loss + i, term.loss, count);
        j.chosen.write(i, count, term.slope_chosen, j.numbers.beta * chosen);
        j.rejected.write(i, count, term.slope_rejected, j.numbers.beta * rejected);
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
        const Lanes x = j.side.compared(i, count);
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
                        int64_t rejected_count, int64_t kind, const float* kl, double beta, double label_smoothing,
                        double target_margin, double chosen_weight, double rejected_weight, float* loss,
                        float* grad_chosen, float* grad_rejected, float* chosen_rewards, float* rejected_rewards,
                        int64_t threads) {
    Job job = {{chosen, ref_chosen, chosen_lengths, grad_chosen, chosen_rewards},
               {rejected, ref_rejected, rejected_lengths, grad_rejected, rejected_rewards},
               {(float)beta, (float)label_smoothing, (float)target_margin},
               loss};
    if (kind == PREF_KTO) {
        const float anchor = *kl < 0.0f ? 0.0f : *kl;
        KtoJob good = {job.chosen, (float)beta, (float)chosen_weight, anchor, 1.0f, loss};
        KtoJob bad = {job.rejected, (float)beta, (float)rejected_weight, anchor, -1.0f, loss + chosen_count};
        parallel_for(chosen_count, GRAIN, threads, kto, &good);
        parallel_for(rejected_count, GRAIN, threads, kto, &bad);
        return;
    }
    const auto body = kind == PREF_IPO     ? pairs<PREF_IPO>
                      : kind == PREF_HINGE ? pairs<PREF_HINGE>
                      : kind == PREF_ORPO  ? pairs<PREF_ORPO>
                                           : pairs<PREF_SIGMOID>;  // simpo differs in its numbers only
    parallel_for(chosen_count, GRAIN, threads, body, &job);
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
