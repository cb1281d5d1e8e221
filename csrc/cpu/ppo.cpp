// The PPO loss, its gradients and its metrics, in one pass over the tokens.
//
// The tokens lie flat and are cut into pieces of a fixed size; what a piece adds up to is stored, and the pieces are
// merged in order, so that the result has the same bits on any number of threads. A piece is walked in blocks: within a
// block each lane sums floats, at its end they are added to doubles. Policy, values and entropy walk a block one after
// the other, which leaves each of them enough registers, and each fetches what the next one needs.
#include "advantages.h"
#include "ppo.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int W = RK_LANES;
constexpr int LINE = 16;     // floats in a cache line
constexpr int BLOCK = 1024;  // tokens
constexpr int PILOT = 16;    // kept tokens whose median the squares of a piece are taken around

enum Aggregation { TOKEN_MEAN, TOKEN_SUM, SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM_NORM };

// What is summed over the kept tokens. A GAP is the distance from a pilot, a number close to the mean; a SQUARE that of
// the distance, which does not cancel as a sum of plain squares would.
enum Sum {
    POLICY_LOSS, KL, CLIPPED, BOUNDED, RATIO_GAP, RATIO_SQUARE,
    VALUE_LOSS, HELD, VALUE, ERROR_GAP, ERROR_SQUARE, TARGET_GAP, TARGET_SQUARE, ENTROPY_LOSS, ENTROPY, SUMS
};

typedef double Doubles __attribute__((vector_size(8 * RK_LANES)));

template <class L>
inline void add(Doubles& sum, const L& lanes) {
    sum += __builtin_convertvector(lanes, Doubles);
}

inline void tally(Ints& counts, Ints where) {
    counts = W == 16 ? (where ? counts + 1 : counts) : counts - where;  // AVX-512 has its truths in mask registers
}

struct Stream {  // three numbers a token, and the gradient that is made of them
    const float *a, *b, *c;
    float* grad;

    Stream at(int64_t t) const { return {a + t, b + t, c + t, grad + t}; }
};

struct Totals {  // of a piece
    double sum[SUMS];
    double ratio_max;
    Moments ratios, errors, targets;
};

struct Job {
    Stream policy;   // log_probs, old_log_probs, advantages
    Stream value;    // values, old_values, returns; null without values
    Stream entropy;  // entropy three times; null without
    const uint8_t* mask;
    int64_t B, T, piece;
    RatioRange<float> ratio_range;
    float value_range, value_scale, entropy_scale;
    Totals* totals;
    double weight;           // of a token
    const int64_t* lengths;  // kept tokens of each row, which divide its weight once more; null: they do not
};

// The parts of the loss. visit() takes a vector of tokens, sums in registers, returns gradients; flush() ends a block.
struct PolicyPart {
    RatioRange<Lanes> range;
    Lanes pilot;
    Doubles* sums;
    Lanes* ratio_max;
    Lanes loss = {}, kl = {}, gap = {}, square = {}, peak = {};
    Ints clipped = {}, bounded = {};

    inline Lanes visit(Lanes log_prob, Lanes old, Lanes advantage, Ints keep, Lanes weight) {
        const Lanes log_ratio = keep ? log_prob - old : Lanes{};
        const PolicyTerm<Lanes> term = clip_term(exp_f32(log_ratio), keep ? advantage : Lanes{}, range);
        const Lanes ratio = keep ? term.ratio : Lanes{};
        const Lanes off = keep ? term.ratio - pilot : Lanes{};
        loss += weight * term.loss;
        kl += log_ratio * log_ratio;
        gap += off;
        square += off * off;
        peak = ratio > peak ? ratio : peak;
        tally(clipped, term.low | term.high);
        tally(bounded, term.bounded);
        return weight * term.slope;
    }

    void flush() const {
        add(sums[POLICY_LOSS], loss);
        add(sums[KL], kl);
        add(sums[CLIPPED], clipped);
        add(sums[BOUNDED], bounded);
        add(sums[RATIO_GAP], gap);
        add(sums[RATIO_SQUARE], square);
        *ratio_max = peak > *ratio_max ? peak : *ratio_max;
    }
};

struct ValuePart {
    Lanes range, scale, error_pilot, target_pilot;
    Doubles* sums;
    Lanes loss = {}, value = {}, error_gap = {}, error_square = {}, target_gap = {}, target_square = {};
    Ints held = {};

    inline Lanes visit(Lanes now, Lanes old, Lanes target, Ints keep, Lanes weight) {
        const Lanes v = keep ? now : Lanes{};
        const Lanes r = keep ? target : Lanes{};
        const ValueTerm<Lanes> term = value_term(v, keep ? old : Lanes{}, r, range);
        const Lanes error_off = keep ? term.error - error_pilot : Lanes{};
        const Lanes target_off = keep ? r - target_pilot : Lanes{};
        loss += weight * term.square;
        value += v;
        error_gap += error_off;
        error_square += error_off * error_off;
        target_gap += target_off;
        target_square += target_off * target_off;
        tally(held, term.held);
        return scale * weight * term.slope;
    }

    void flush() const {
        add(sums[VALUE_LOSS], loss);
        add(sums[HELD], held);
        add(sums[VALUE], value);
        add(sums[ERROR_GAP], error_gap);
        add(sums[ERROR_SQUARE], error_square);
        add(sums[TARGET_GAP], target_gap);
        add(sums[TARGET_SQUARE], target_square);
    }
};

struct EntropyPart {
    Lanes scale;
    Doubles* sums;
    Lanes loss = {}, entropy = {};

    inline Lanes visit(Lanes now, Lanes, Lanes, Ints keep, Lanes weight) {
        const Lanes kept = keep ? now : Lanes{};
        loss += weight * kept;
        entropy += kept;
        return scale * weight;
    }

    void flush() const {
        add(sums[ENTROPY_LOSS], loss);
        add(sums[ENTROPY], entropy);
    }
};

int64_t count_kept(const uint8_t* mask, int64_t T) {
    typedef uint8_t Bytes __attribute__((vector_size(4 * RK_LANES)));
    constexpr int64_t N = sizeof(Bytes);
    int64_t count = 0, t = 0;
    while (t + N <= T) {
        const int64_t stop = t + 255 * N < T ? t + 255 * N : T;  // a byte counts to 255
        Bytes counts = {};
        for (; t + N <= stop; t += N) {
            Bytes bytes;
            __builtin_memcpy(&bytes, mask + t, N);
            counts -= (Bytes)(bytes != Bytes{});
        }
        for (int i = 0; i < (int)N; ++i) count += counts[i];
    }
    for (; t < T; ++t) count += mask[t] != 0;
    return count;
}

inline bool any_kept(const uint8_t* mask) {
    uint32_t words[W / 4], any = 0;
    __builtin_memcpy(words, mask, sizeof(words));
    for (int i = 0; i < W / 4; ++i) any |= words[i];
    return any != 0;
}

inline Ints load_keep(const int32_t* from) {
    Ints lanes;
    __builtin_memcpy(&lanes, from, sizeof(lanes));
    return lanes;
}

template <class Part>
void walk(Part part, Stream now, Stream next, const uint8_t* mask, const int32_t* keep, const float* weight,
          int64_t count) {
    int64_t t = 0;
    for (; t + W <= count; t += W) {
        Lanes grad = {};
        if (t % LINE == 0) __builtin_prefetch(next.grad + t, 1, 2);
        if (any_kept(mask + t)) {
            if (t % LINE == 0) {
                __builtin_prefetch(next.a + t, 0, 2);
                __builtin_prefetch(next.b + t, 0, 2);
                __builtin_prefetch(next.c + t, 0, 2);
            }
            const Ints kept = load_keep(keep + t);
            grad = part.visit(load(now.a + t), load(now.b + t), load(now.c + t), kept, load(weight + t));
            grad = kept ? grad : Lanes{};
        }
        store(now.grad + t, grad);
    }
    if (t < count) {  // the last tokens of all, filled up with absent ones
        const size_t bytes = (size_t)(count - t) * sizeof(float);
        const float* from[] = {now.a + t, now.b + t, now.c + t, weight + t};
        float x[4][W] = {}, grads[W];
        int32_t rest[W] = {};
        for (int k = 0; k < 4; ++k) __builtin_memcpy(x[k], from[k], bytes);
        __builtin_memcpy(rest, keep + t, bytes);
        const Ints kept = load_keep(rest);
        const Lanes grad = part.visit(load(x[0]), load(x[1]), load(x[2]), kept, load(x[3]));
        store(grads, kept ? grad : Lanes{});
        __builtin_memcpy(now.grad + t, grads, bytes);
    }
    part.flush();
}

// Median of x - y (y null: of x) over the tokens at `places`: robust, and exactly the number where all are equal.
float pilot_of(const float* x, const float* y, const int64_t* places, int count) {
    float sorted[PILOT] = {};
    for (int i = 0; i < count; ++i) {
        const float one = y ? x[places[i]] - y[places[i]] : x[places[i]];
        int k = i;
        for (; k > 0 && sorted[k - 1] > one; --k) sorted[k] = sorted[k - 1];
        sorted[k] = one;
    }
    return sorted[count / 2];
}

float finite_or_0(float x) { return absolute(x) <= 3.40282347e38f ? x : 0.0f; }

// Moments from the sums around a pilot; *gap becomes the plain sum.
Moments moments(float pilot, double* gap, double square, double count) {
    if (count == 0.0) return {0.0, 0.0, 0.0};
    const double mean = pilot + *gap / count;
    const double m2 = square - *gap * *gap / count;
    *gap += count * pilot;
    return {count, mean, m2 < 0.0 ? 0.0 : m2};
}

void fill_weights(const Job& j, int64_t begin, int64_t count, float* weight) {
    for (int64_t t = 0; t < count;) {
        const int64_t row = (begin + t) / j.T;
        const int64_t stop = (row + 1) * j.T - begin < count ? (row + 1) * j.T - begin : count;
        const float w = (float)(j.weight / (double)(j.lengths[row] > 0 ? j.lengths[row] : 1));
        for (; t < stop; ++t) weight[t] = w;
    }
}

void walk_piece(const Job& j, int64_t begin, int64_t end, Totals* out) {
    Doubles sums[SUMS] = {};
    Lanes ratio_max = {};
    int64_t places[PILOT];
    int found = 0;
    for (int64_t t = begin; t < end && found < PILOT; ++t)
        if (j.mask[t]) places[found++] = t;
    const float ratio = finite_or_0(exp_f32(pilot_of(j.policy.a, j.policy.b, places, found)));
    const float error = j.value.a ? finite_or_0(pilot_of(j.value.a, j.value.c, places, found)) : 0.0f;
    const float target = j.value.a ? finite_or_0(pilot_of(j.value.c, nullptr, places, found)) : 0.0f;
    const Lanes zero = {};
    const RatioRange<Lanes> range = {zero + j.ratio_range.low, zero + j.ratio_range.high, zero + j.ratio_range.dual};
    const PolicyPart policy = {range, zero + ratio, sums, &ratio_max};
    const ValuePart value = {zero + j.value_range, zero + j.value_scale, zero + error, zero + target, sums};
    const EntropyPart entropy = {zero + j.entropy_scale, sums};
    alignas(64) int32_t keep[BLOCK];
    alignas(64) float weight[BLOCK];
    int64_t kept = 0;
    for (int i = 0; i < BLOCK; ++i) weight[i] = (float)j.weight;
    for (int64_t t = begin; t < end; t += BLOCK) {
        const int64_t count = end - t < BLOCK ? end - t : BLOCK;
        const uint8_t* mask = j.mask + t;
        for (int64_t i = 0; i < count; ++i) keep[i] = mask[i] ? -1 : 0;
        kept += count_kept(mask, count);
        if (j.lengths) fill_weights(j, t, count, weight);
        const Stream after = j.policy.at(t + BLOCK < end ? t + BLOCK : t);
        const Stream third = j.entropy.a ? j.entropy.at(t) : after;
        const Stream second = j.value.a ? j.value.at(t) : third;
        walk(policy, j.policy.at(t), second, mask, keep, weight, count);
        if (j.value.a) walk(value, second, third, mask, keep, weight, count);
        if (j.entropy.a) walk(entropy, third, after, mask, keep, weight, count);
    }
    *out = {};
    double* sum = out->sum;
    for (int k = 0; k < SUMS; ++k)
        for (int i = 0; i < W; ++i) sum[k] += sums[k][i];
    out->ratio_max = max_lanes(ratio_max);
    out->ratios = moments(ratio, sum + RATIO_GAP, sum[RATIO_SQUARE], (double)kept);
    out->errors = moments(error, sum + ERROR_GAP, sum[ERROR_SQUARE], (double)kept);
    out->targets = moments(target, sum + TARGET_GAP, sum[TARGET_SQUARE], (double)kept);
}

// stats in the order of STATS in reference/ppo.py; a mean over nothing is 0 / 0.
void write_results(const Job& j, int64_t pieces, double tokens, float* losses, float* stats) {
    Totals all = {};
    for (int64_t i = 0; i < pieces; ++i) {
        const Totals& one = j.totals[i];
        for (int k = 0; k < SUMS; ++k) all.sum[k] += one.sum[k];
        all.ratio_max = one.ratio_max > all.ratio_max ? one.ratio_max : all.ratio_max;
        all.ratios = moments_merge(all.ratios, one.ratios);
        all.errors = moments_merge(all.errors, one.errors);
        all.targets = moments_merge(all.targets, one.targets);
    }
    const double ratio_mean = all.sum[RATIO_GAP] / tokens;
    const double results[] = {
        tokens,
        0.5 * all.sum[KL] / tokens,
        all.sum[CLIPPED] / tokens,
        all.sum[BOUNDED] / tokens,
        ratio_mean,
        all.ratios.m2 / tokens,
        ratio_mean == ratio_mean ? all.ratio_max : ratio_mean,  // a maximum drops a NaN
        j.entropy.a ? all.sum[ENTROPY] / tokens : 0.0,
        j.value.a ? all.sum[HELD] / tokens : 0.0,
        j.value.a ? 1.0 - all.errors.m2 / all.targets.m2 : 0.0,
        j.value.a ? all.sum[VALUE] / tokens : 0.0,
        j.value.a ? all.sum[TARGET_GAP] / tokens : 0.0,
    };
    for (size_t i = 0; i < sizeof(results) / sizeof(results[0]); ++i) stats[i] = (float)results[i];
    losses[0] = (float)all.sum[POLICY_LOSS];
    losses[1] = (float)(0.5 * all.sum[VALUE_LOSS]);
    losses[2] = (float)all.sum[ENTROPY_LOSS];
}

// Weight of a token before the row's own length; fills `lengths`, the kept tokens of each row, and counts all of them.
double weigh(const Job& j, int64_t aggregation, const float* normalizer, int64_t* lengths, double* tokens) {
    int64_t all = 0, sequences = 0;
    for (int64_t b = 0; b < j.B; ++b) {
        lengths[b] = count_kept(j.mask + b * j.T, j.T);
        all += lengths[b];
        sequences += lengths[b] > 0;
    }
    *tokens = (double)all;
    if (aggregation == TOKEN_SUM) return 1.0;
    const int64_t count = aggregation == TOKEN_MEAN ? all : sequences;
    const double weight = 1.0 / (normalizer ? (double)*normalizer : count > 0 ? (double)count : 1.0);
    return aggregation == SEQ_MEAN_TOKEN_SUM_NORM ? weight / (double)(j.T > 0 ? j.T : 1) : weight;
}

}  // namespace

void ppo_fwd_f32(const float* log_probs, const float* old_log_probs, const float* advantages, const uint8_t* mask,
                 const float* values, const float* old_values, const float* returns, const float* entropy,
                 const float* normalizer, int64_t B, int64_t T, double cliprange, double cliprange_high,
                 double dual_clip, double cliprange_value, int64_t aggregation, double value_scale,
                 double entropy_scale, int64_t piece, int64_t* lengths, double* workspace, float* losses,
                 float* grad_log_probs, float* grad_values, float* grad_entropy, float* stats, int64_t threads) {
    Job job = {{log_probs, old_log_probs, advantages, grad_log_probs},
               {values, old_values ? old_values : values, returns, grad_values},
               {entropy, entropy, entropy, grad_entropy}, mask, B, T, piece,
               {(float)(1.0 - cliprange), (float)(1.0 + cliprange_high), (float)dual_clip}, (float)cliprange_value,
               (float)value_scale, (float)entropy_scale, (Totals*)workspace, 0.0, nullptr};
    double tokens;
    job.weight = weigh(job, aggregation, normalizer, lengths, &tokens);
    if (aggregation == SEQ_MEAN_TOKEN_MEAN) job.lengths = lengths;
    const int64_t pieces = (B * T + piece - 1) / piece;
    parallel_for(
        pieces, 1, threads,
        [](void* context, int64_t begin, int64_t end) {
            const Job& j = *(const Job*)context;
            const int64_t N = j.B * j.T;
            for (int64_t i = begin; i < end; ++i)
                walk_piece(j, i * j.piece, (i + 1) * j.piece < N ? (i + 1) * j.piece : N, j.totals + i);
        },
        &job);
    write_results(job, pieces, tokens, losses, stats);
}

void ppo_bwd_f32(const float* grad_loss, const float* grad_policy_loss, const float* grad_value_loss, double vf_coef,
                 const float* grad_log_probs, const float* grad_values, const float* grad_entropy, int64_t log_probs,
                 int64_t values, int64_t entropy, float* out_log_probs, float* out_values, float* out_entropy,
                 int64_t threads) {
    struct Product {
        const float* from;
        float* to;
        float scale;
        int64_t count;
    };
    const double whole = grad_loss ? *grad_loss : 0.0;
    const double policy = grad_policy_loss ? *grad_policy_loss : 0.0;
    const double value = grad_value_loss ? *grad_value_loss : 0.0;
    Product products[] = {{grad_log_probs, out_log_probs, (float)(whole + policy), log_probs},
                          {grad_values, out_values, (float)(vf_coef != 0.0 ? whole + value / vf_coef : value), values},
                          {grad_entropy, out_entropy, (float)whole, entropy}};
    parallel_for(
        log_probs, 32768, threads,
        [](void* context, int64_t begin, int64_t end) {
            for (int i = 0; i < 3; ++i) {
                const Product& p = ((const Product*)context)[i];
                const int64_t stop = end < p.count ? end : p.count;
                for (int64_t t = begin; t < stop; ++t) p.to[t] = p.scale * p.from[t];
            }
        },
        products);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(ppo_fwd_f32);
RK_REGISTER(ppo_bwd_f32);
