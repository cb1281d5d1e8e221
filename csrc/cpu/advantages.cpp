// GAE, KL-shaped rewards and whitening, one row (response) at a time; rows are shared among the threads.
//
// A row is walked from its last kept token to its first in blocks of RK_LANES tokens. Within a block the recursion is a
// scan by doubling; between blocks a carry in double is all that is handed on. A block with a gap in its mask takes the plain recursion.
#include "advantages.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int W = RK_LANES;

struct Rows {  // [B, T] with a row stride, or packed rows at offsets cu[b] .. cu[b + 1]
    const int64_t* cu;
    int64_t B, T;
    int64_t length(int64_t b) const { return cu ? cu[b + 1] - cu[b] : T; }
    int64_t start(int64_t b, int64_t stride) const { return cu ? cu[b] : b * stride; }
};

struct Decay {
    double gamma, decay;
    double power[W + 1];  // power[n] = decay^n
    Lanes carry;          // carry[i] = decay^(W - i)

    void fill(double gamma_, double lam) {
        gamma = gamma_;
        decay = gamma_ * lam;
        power[0] = 1.0;
        for (int i = 0; i < W; ++i) power[i + 1] = power[i] * decay;
        for (int i = 0; i < W; ++i) carry[i] = (float)power[W - i];
    }
};

// A_i = sum over j >= i of decay^(j - i) delta_j within the block, in log2(W) doublings.
inline Lanes scan(Lanes delta, const Decay& d) {
    delta += (float)d.power[1] * shift_down<1>(delta);
    delta += (float)d.power[2] * shift_down<2>(delta);
    if (W > 4) delta += (float)d.power[W > 4 ? 4 : 0] * shift_down<4>(delta);
    if (W > 8) delta += (float)d.power[W > 8 ? 8 : 0] * shift_down<8>(delta);
    return delta;
}

inline bool all_kept(const uint8_t* keep) {
    uint8_t all = 1;
    for (int i = 0; i < W; ++i) all &= keep[i];
    return all != 0;
}

// One past the last kept token.
inline int64_t kept_end(const uint8_t* keep, int64_t T) {
    if (keep)
        while (T > 0 && !keep[T - 1]) --T;
    return T;
}

inline void zero(float* out, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) out[t] = 0.0f;
}

void gae_row(const float* reward, const float* value, const uint8_t* keep, int64_t T, double last_value,
             const Decay& d, float* advantage, float* returns) {
    const int64_t end = kept_end(keep, T);
    zero(advantage, end, T);
    zero(returns, end, T);
    GaeCarry carry = {0.0, last_value};
    const float gamma = (float)d.gamma;
    int64_t t = end;
    while (t > 0) {
        if (t >= W && (!keep || all_kept(keep + t - W))) {
            t -= W;
            const Lanes now = load(value + t);
            Lanes next;
            if (t + W < end && (!keep || keep[t + W])) {
                next = load(value + t + 1);
            } else {
                next = shift_down<1>(now);
                next[W - 1] = (float)carry.value;
            }
            const Lanes sum = scan(load(reward + t) + gamma * next - now, d);
            const Lanes a = sum + d.carry * (float)carry.advantage;
            store(advantage + t, a);
            store(returns + t, a + now);
            carry.advantage = (double)sum[0] + d.power[W] * carry.advantage;
            carry.value = value[t];
            continue;
        }
        const int64_t stop = t >= W ? t - W : 0;
        while (t > stop) {
            --t;
            if (keep && !keep[t]) {
                advantage[t] = 0.0f;
                returns[t] = 0.0f;
                continue;
            }
            carry = gae_step(carry, reward[t], value[t], d.gamma, d.decay);
            advantage[t] = (float)carry.advantage;
            returns[t] = (float)(carry.advantage + carry.value);
        }
    }
}

template <int Estimator>
void reward_row(const float* log_prob, const float* ref, const uint8_t* keep, int64_t T, float score, float kl_coef,
                float* reward, float* kl) {
    const Lanes zero = {};
    int64_t t = 0;
    for (; t + W <= T; t += W) {
        Lanes p = load(log_prob + t), q = load(ref + t);
        if (keep) {
            const Ints kept = load_mask(keep + t);
            p = kept ? p : zero;
            q = kept ? q : zero;
        }
        const Lanes k = kl_estimate<Estimator>(log_ratio(p, q));
        store(kl + t, k);
        store(reward + t, -kl_coef * k);
    }
    for (; t < T; ++t) {
        const bool kept = !keep || keep[t];
        const float k = kl_estimate<Estimator>(log_ratio(kept ? log_prob[t] : 0.0f, kept ? ref[t] : 0.0f));
        kl[t] = k;
        reward[t] = -kl_coef * k;
    }
    const int64_t end = kept_end(keep, T);
    if (end > 0) reward[end - 1] += score;
}

Moments row_moments(const float* x, const uint8_t* keep, int64_t T) {
    double count[W], sum[W];
    for (int i = 0; i < W; ++i) count[i] = sum[i] = 0.0;
    const int64_t whole = T - T % W;
    for (int64_t t = 0; t < whole; t += W)
        for (int i = 0; i < W; ++i) {
            const bool kept = !keep || keep[t + i];
            count[i] += kept ? 1.0 : 0.0;
            sum[i] += kept ? (double)x[t + i] : 0.0;
        }
    for (int64_t t = whole; t < T; ++t)
        if (!keep || keep[t]) {
            count[t - whole] += 1.0;
            sum[t - whole] += (double)x[t];
        }
    Moments m = {0.0, 0.0, 0.0};
    for (int i = 0; i < W; ++i) {
        m.count += count[i];
        m.mean += sum[i];
    }
    if (m.count == 0.0) return m;
    m.mean /= m.count;
    for (int i = 0; i < W; ++i) sum[i] = 0.0;
    for (int64_t t = 0; t < whole; t += W)
        for (int i = 0; i < W; ++i) {
            const double gap = (double)x[t + i] - m.mean;
            sum[i] += !keep || keep[t + i] ? gap * gap : 0.0;
        }
    for (int64_t t = whole; t < T; ++t)
        if (!keep || keep[t]) sum[t - whole] += ((double)x[t] - m.mean) * ((double)x[t] - m.mean);
    for (int i = 0; i < W; ++i) m.m2 += sum[i];
    return m;
}

// Rows are merged in their order, whatever the threads did.
Moments merge_rows(const Moments* rows, int64_t B) {
    Moments all = {0.0, 0.0, 0.0};
    for (int64_t b = 0; b < B; ++b) all = moments_merge(all, rows[b]);
    return all;
}

// (x - mean) / sqrt(var + 1e-8), var over count - 1; `center` = false leaves the mean where it is.
struct Whitening {
    double mean, scale;
    bool center;
};

Whitening whitening_of(Moments m, bool center) {
    const double freedom = m.count > 1.0 ? m.count - 1.0 : 1.0;
    return {m.mean, 1.0 / __builtin_sqrt(m.m2 / freedom + 1e-8), center};
}

void whiten_row(const float* x, const uint8_t* keep, int64_t T, Whitening w, float* out) {
    const double add = w.center ? 0.0 : w.mean;
    for (int64_t t = 0; t < T; ++t) {
        const float y = (float)(((double)x[t] - w.mean) * w.scale + add);
        out[t] = !keep || keep[t] ? y : 0.0f;
    }
}

// Rows a thread takes at once: about 32768 tokens, 15 us of work, or it is not worth waking a thread for.
int64_t rows_per_piece(const Rows& rows, int64_t total) {
    const int64_t mean = rows.B > 0 ? total / rows.B : 0;
    const int64_t piece = 32768 / (mean > 0 ? mean : 1);
    return piece > 0 ? piece : 1;
}

int64_t total_tokens(const Rows& rows) { return rows.cu ? (rows.B > 0 ? rows.cu[rows.B] : 0) : rows.B * rows.T; }

}  // namespace

void gae_fwd_f32(const float* rewards, int64_t rewards_stride, const float* values, int64_t values_stride,
                 const uint8_t* mask, int64_t mask_stride, const float* last_values, const int64_t* cu_seqlens,
                 int64_t B, int64_t T, double gamma, double lam, float* advantages, float* returns, int64_t threads) {
    struct Job {
        const float *rewards, *values, *last_values;
        const uint8_t* mask;
        int64_t rewards_stride, values_stride, mask_stride;
        Rows rows;
        Decay decay;
        float *advantages, *returns;
    } job = {rewards, values, last_values, mask, rewards_stride, values_stride, mask_stride, {cu_seqlens, B, T}, {},
             advantages, returns};
    job.decay.fill(gamma, lam);
    parallel_for(
        B, rows_per_piece(job.rows, total_tokens(job.rows)), threads,
        [](void* context, int64_t begin, int64_t end) {
            const Job& j = *(const Job*)context;
            for (int64_t b = begin; b < end; ++b) {
                const int64_t out = j.rows.start(b, j.rows.T);
                gae_row(j.rewards + j.rows.start(b, j.rewards_stride), j.values + j.rows.start(b, j.values_stride),
                        j.mask ? j.mask + j.rows.start(b, j.mask_stride) : nullptr, j.rows.length(b),
                        j.last_values ? (double)j.last_values[b] : 0.0, j.decay, j.advantages + out, j.returns + out);
            }
        },
        &job);
}

void whiten_stats_f32(const float* x, int64_t x_stride, const uint8_t* mask, int64_t mask_stride, int64_t B, int64_t T,
                      double* row_stats, double* stats, int64_t threads) {
    struct Job {
        const float* x;
        const uint8_t* mask;
        int64_t x_stride, mask_stride;
        Rows rows;
        Moments* row_stats;
    } job = {x, mask, x_stride, mask_stride, {nullptr, B, T}, (Moments*)row_stats};
    parallel_for(
        B, rows_per_piece(job.rows, B * T), threads,
        [](void* context, int64_t begin, int64_t end) {
            const Job& j = *(const Job*)context;
            for (int64_t b = begin; b < end; ++b)
                j.row_stats[b] = row_moments(j.x + b * j.x_stride, j.mask ? j.mask + b * j.mask_stride : nullptr,
                                             j.rows.T);
        },
        &job);
    *(Moments*)stats = merge_rows(job.row_stats, B);
}

void whiten_fwd_f32(const float* x, int64_t x_stride, const uint8_t* mask, int64_t mask_stride, int64_t B, int64_t T,
                    const double* stats, int64_t center, float* out, int64_t threads) {
    struct Job {
        const float* x;
        const uint8_t* mask;
        int64_t x_stride, mask_stride;
        Rows rows;
        Whitening whitening;
        float* out;
    } job = {x, mask, x_stride, mask_stride, {nullptr, B, T}, whitening_of(*(const Moments*)stats, center != 0), out};
    parallel_for(
        B, rows_per_piece(job.rows, B * T), threads,
        [](void* context, int64_t begin, int64_t end) {
            const Job& j = *(const Job*)context;
            for (int64_t b = begin; b < end; ++b)
                whiten_row(j.x + b * j.x_stride, j.mask ? j.mask + b * j.mask_stride : nullptr, j.rows.T, j.whitening,
                           j.out + b * j.rows.T);
        },
        &job);
}

void rlhf_advantages_fwd_f32(const float* scores, const float* log_probs, int64_t log_probs_stride, const float* ref,
                             int64_t ref_stride, const float* values, int64_t values_stride, const uint8_t* mask,
                             int64_t mask_stride, const int64_t* cu_seqlens, int64_t B, int64_t T, double kl_coef,
                             double gamma, double lam, int64_t kl_estimator, double reward_clip, int64_t whiten,
                             double* row_stats, float* advantages, float* returns, float* rewards, float* kl,
                             int64_t threads) {
    struct Job {
        const float *scores, *log_probs, *ref, *values;
        const uint8_t* mask;
        int64_t log_probs_stride, ref_stride, values_stride, mask_stride;
        Rows rows;
        Decay decay;
        float kl_coef, clip;
        int64_t kl_estimator;
        Moments* row_stats;  // null: no whitening
        Whitening whitening;
        float *advantages, *returns, *rewards, *kl;
    } job = {scores, log_probs, ref, values, mask, log_probs_stride, ref_stride, values_stride, mask_stride,
             {cu_seqlens, B, T}, {}, (float)kl_coef, (float)reward_clip, kl_estimator,
             whiten ? (Moments*)row_stats : nullptr, {}, advantages, returns, rewards, kl};
    job.decay.fill(gamma, lam);
    const int64_t grain = rows_per_piece(job.rows, total_tokens(job.rows));
    parallel_for(
        B, grain, threads,
        [](void* context, int64_t begin, int64_t end) {
            const Job& j = *(const Job*)context;
            const auto shape = j.kl_estimator == KL_K1   ? reward_row<KL_K1>
                               : j.kl_estimator == KL_K2 ? reward_row<KL_K2>
                                                         : reward_row<KL_K3>;
            for (int64_t b = begin; b < end; ++b) {
                const int64_t out = j.rows.start(b, j.rows.T), length = j.rows.length(b);
                const uint8_t* keep = j.mask ? j.mask + j.rows.start(b, j.mask_stride) : nullptr;
                float score = j.scores[b];
                score = score > j.clip ? j.clip : score;
                score = score < -j.clip ? -j.clip : score;
                shape(j.log_probs + j.rows.start(b, j.log_probs_stride), j.ref + j.rows.start(b, j.ref_stride), keep,
                      length, score, j.kl_coef, j.rewards + out, j.kl + out);
                gae_row(j.rewards + out, j.values + j.rows.start(b, j.values_stride), keep, length, 0.0, j.decay,
                        j.advantages + out, j.returns + out);
                if (j.row_stats) j.row_stats[b] = row_moments(j.advantages + out, keep, length);
            }
        },
        &job);
    if (!whiten) return;
    job.whitening = whitening_of(merge_rows(job.row_stats, B), true);
    parallel_for(
        B, grain, threads,
        [](void* context, int64_t begin, int64_t end) {
            const Job& j = *(const Job*)context;
            for (int64_t b = begin; b < end; ++b) {
                float* row = j.advantages + j.rows.start(b, j.rows.T);
                whiten_row(row, j.mask ? j.mask + j.rows.start(b, j.mask_stride) : nullptr, j.rows.length(b),
                           j.whitening, row);
            }
        },
        &job);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(gae_fwd_f32);
RK_REGISTER(whiten_stats_f32);
RK_REGISTER(whiten_fwd_f32);
RK_REGISTER(rlhf_advantages_fwd_f32);
