// The walk over the tokens that every policy loss, the value loss and the entropy bonus share: losses, gradients, metrics.
//
// The tokens lie flat and are cut into pieces of a fixed size, one for each block. What a piece adds up to is a record;
// the last block of a group to end merges the group's records, and the last of all groups merges those, always in
// order, so that the result has the same bits whichever blocks end first.
#pragma once
#include <initializer_list>

#include "policy_counts.h"
#include "policy_totals.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int ROUNDS = 2;                        // four tokens of a thread each
constexpr int PIECE = THREADS * ITEMS * ROUNDS;  // tokens; as in rlhf_kernels/cuda/ppo.py
constexpr int GROUP = 32;                        // pieces; likewise

enum Input { LOG_PROB, OLD_LOG_PROB, ADVANTAGE, VALUE_NOW, OLD_VALUE, RETURN, ENTROPY_NOW, REF, FACTOR, COEFFICIENT, INPUTS };

struct Whole {  // the loss of its parts, and two of these once more, as tensors of their own; null: not asked for
    float *loss, *policy_loss, *value_loss;
    double kl_coef, value_coef, entropy_coef;
};

struct Job {
    const float* from[INPUTS];  // null where absent
    const uint8_t* mask;
    int64_t B, T, N, width;  // width: T, but at least 1
    PolicyNumbers<float> numbers;
    RefKlNumbers<float> kl;
    int kl_estimator, kl_gradient;
    float kl_coef, value_range, value_scale, entropy_scale;
    bool vector;  // four tokens may be moved at once
    Share share, entropy_share;
    int64_t counting;     // blocks that counted
    Counts* counts;       // of each of them
    int64_t* lengths;     // kept tokens of each row, if they were asked for
    SequencePart* parts;  // of each row, if the objective is one of sequences
    double* records;  // of the pieces, and behind them of the groups
    int* done;        // blocks that ended, of each group; behind them groups that ended
    float *policy_loss, *kl_loss, *value_loss, *entropy_loss;
    Whole whole;
    float *grad_log_probs, *grad_values, *grad_entropy, *stats;

    __host__ __device__ __forceinline__ int64_t pieces() const { return N > 0 ? (N + PIECE - 1) / PIECE : 1; }
    __host__ __device__ __forceinline__ int64_t groups() const { return (pieces() + GROUP - 1) / GROUP; }
};

// What a walk is made for. With metrics, the KL, weights and entropy are there if their arrays are, and each loss is
// averaged in its own way; without, what there is is known beforehand, and all is averaged in one way.
template <class Objective_, bool Metrics, bool Values, bool Entropy, bool Own>
struct Walk {
    using Objective = Objective_;
    static constexpr bool POLICY = !std::is_same<Objective, NoObjective>::value;
    static constexpr bool METRICS = Metrics, VALUES = Values, ENTROPY = Entropy, OWN = Own;

    __device__ static constexpr bool may_have(int input) {
        return input <= ADVANTAGE     ? POLICY
               : input <= RETURN      ? VALUES
               : input == ENTROPY_NOW ? ENTROPY
               : input == COEFFICIENT ? Objective::COEFFICIENT
                                      : METRICS && POLICY;
    }
    __device__ static constexpr bool must_have(int input) { return input < (METRICS ? ENTROPY_NOW : INPUTS); }
};

// Weights of the four tokens from i on, where each is divided by the length of its row.
__device__ __forceinline__ void divide_by_lengths(const Job& j, double weight, int64_t i, float* weights) {
    int64_t row = i / j.width, column = i - row * j.width;
    float w = (float)weight;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        if (column == j.width) ++row, column = 0;
        if (i + k < j.N && (k == 0 || column == 0))
            w = (float)(weight / (double)(j.lengths[row] > 0 ? j.lengths[row] : 1));
        ++column;
        weights[k] = w;
    }
}

__device__ __forceinline__ void fill_weights(const Job& j, double weight, bool own, int64_t i, float* weights) {
    if (own) {
        divide_by_lengths(j, weight, i, weights);
    } else {
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) weights[k] = (float)weight;
    }
}

// The sequences' parts of the four tokens from i on.
__device__ __forceinline__ void fill_parts(const Job& j, int64_t i, SequencePart* parts) {
    int64_t row = i / j.width, column = i - row * j.width;
    SequencePart part = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        if (column == j.width) ++row, column = 0;
        if (i + k < j.N && (k == 0 || column == 0)) part = j.parts[row];
        ++column;
        parts[k] = part;
    }
}

// stats in the order of STATS in reference/policy.py, whose first are those of reference/ppo.py; a mean over nothing is
// 0 / 0.
template <bool Metrics>
__device__ __forceinline__ void put_results(const Job& j, const double* sum) {
    const double tokens = sum[TOKENS], ratio_mean = tokens > 0.0 ? sum[RATIO_GAP] : 0.0 / tokens;
    const bool policy = j.from[LOG_PROB], values = j.from[VALUE_NOW];
    const double results[] = {
        tokens,
        policy ? 0.5 * sum[KL] / tokens : 0.0,
        policy ? sum[CLIPPED] / tokens : 0.0,
        policy ? sum[BOUNDED] / tokens : 0.0,
        policy ? ratio_mean : 0.0,
        policy ? sum[RATIO_SQUARE] / tokens : 0.0,
        policy ? (ratio_mean == ratio_mean ? sum[RATIO_MAX] : ratio_mean) : 0.0,  // a maximum drops a NaN
        j.from[ENTROPY_NOW] ? sum[ENTROPY] / tokens : 0.0,
        values ? sum[HELD] / tokens : 0.0,
        values ? 1.0 - sum[ERROR_SQUARE] / sum[TARGET_SQUARE] : 0.0,
        values ? sum[VALUE] / tokens : 0.0,
        values ? sum[TARGET_GAP] * tokens / tokens : 0.0,
    };
    constexpr int plain = sizeof(results) / sizeof(results[0]);
#pragma unroll
    for (int i = 0; i < plain; ++i) j.stats[i] = (float)results[i];
    *j.policy_loss = (float)sum[POLICY_LOSS];
    *j.value_loss = (float)(0.5 * sum[VALUE_LOSS]);
    *j.entropy_loss = (float)sum[ENTROPY_LOSS];
    const double kl = Metrics && policy && j.from[REF] ? sum[KL_LOSS] : 0.0;
    if (j.whole.loss) {
        const double parts[] = {j.whole.kl_coef, kl, j.whole.value_coef, 0.5 * sum[VALUE_LOSS], j.whole.entropy_coef,
                                sum[ENTROPY_LOSS]};
        double loss = sum[POLICY_LOSS];
#pragma unroll
        for (int i = 0; i < 6; i += 2)
            if (parts[i] != 0.0) loss += parts[i] * parts[i + 1];
        *j.whole.loss = (float)loss;
    }
    if (j.whole.policy_loss) *j.whole.policy_loss = (float)sum[POLICY_LOSS];
    if (j.whole.value_loss) *j.whole.value_loss = (float)(0.5 * sum[VALUE_LOSS]);
    if (!j.kl_loss) return;  // ppo_loss
    double more[7] = {};
    if (Metrics && policy) {
        more[0] = -sum[K1] / tokens, more[1] = sum[K3] / tokens;
        more[2] = sum[LOW] / tokens, more[3] = (sum[CLIPPED] - sum[LOW]) / tokens;
        if (j.from[REF]) more[4] = sum[REF_KL] / tokens;
        if (j.from[FACTOR]) {
            more[5] = sum[WEIGHT] * sum[WEIGHT] / (tokens * sum[WEIGHT_SQUARE]);
            more[6] = sum[FILTERED] / tokens;
        }
    }
#pragma unroll
    for (int i = 0; i < 7; ++i) j.stats[plain + i] = (float)more[i];
    *j.kl_loss = (float)kl;
}

struct Tally {  // what a thread adds up
    float sums[SUMS] = {}, extras[EXTRAS] = {}, ratio_max = 0.0f;
    Spread spread = {};

    __device__ __forceinline__ void more(int sum, float x) { extras[sum % EXTRAS] += x; }
};

struct Held {  // a token as it was loaded, and its place among the thread's
    float x[INPUTS];
    float weight, entropy_weight;
    SequencePart part;
    bool keep;

    __device__ __forceinline__ float operator[](int input) const { return keep ? x[input] : 0.0f; }
};

// A token's policy loss, with the KL where there is a reference: adds both up, returns d / d log_prob and the ratio.
template <class W>
__device__ __forceinline__ float visit_policy(const Job& j, const Held& t, Tally& tally, float* ratio) {
    const float raw = t.keep ? t.x[LOG_PROB] - t.x[OLD_LOG_PROB] : 0.0f;
    PolicyTerm<float> term;
    float weight = t.weight, slope_of_kl = 0.0f;
    if constexpr (!W::METRICS) {
        term = clip_term(exp_f32(raw), t[ADVANTAGE], RatioRange<float>{j.numbers.a, j.numbers.b, j.numbers.c});
    } else {
        PolicyToken<float> token = policy_token(t[LOG_PROB], t[OLD_LOG_PROB], t[ADVANTAGE], j.numbers);
        if (W::Objective::SEQUENCE) token.of_sequence = t.keep ? t.part.of_sequence : 0.0f, token.length = t.part.length;
        if (W::Objective::COEFFICIENT) token.coefficient = t[COEFFICIENT];
        term = W::Objective::of(token, j.numbers);
        tally.more(K1, raw);
        tally.more(K3, kl_k3(-raw));
        tally.more(LOW, term.low ? 1.0f : 0.0f);
        if (j.from[FACTOR]) {
            const float factor = t[FACTOR];
            weight *= factor;
            tally.more(WEIGHT, factor);
            tally.more(WEIGHT_SQUARE, factor * factor);
            tally.more(FILTERED, t.keep && factor == 0.0f ? 1.0f : 0.0f);
        }
        if (j.from[REF]) {
            const float e = t.keep ? t.x[LOG_PROB] - t.x[REF] : 0.0f;
            const RefKlTerm<float> kl = ref_kl_term(e, token.ratio, token.stuck, j.kl, j.kl_estimator, j.kl_gradient);
            tally.more(KL_LOSS, t.weight * kl.value);
            tally.more(REF_KL, kl.value);
            slope_of_kl = j.kl_coef * t.weight * kl.slope;
        }
    }
    tally.sums[POLICY_LOSS] += weight * term.loss;
    tally.sums[KL] += raw * raw;
    tally.sums[CLIPPED] += term.low | term.high ? 1.0f : 0.0f;
    tally.sums[BOUNDED] += term.bounded ? 1.0f : 0.0f;
    tally.spread.x[0] += t.keep ? term.ratio : 0.0f;
    tally.ratio_max = t.keep && term.ratio > tally.ratio_max ? term.ratio : tally.ratio_max;
    *ratio = term.ratio;
    const float slope = weight * term.slope;
    return t.keep ? (W::METRICS ? slope + slope_of_kl : slope) : 0.0f;
}

__device__ __forceinline__ float visit_value(const Job& j, const Held& t, Tally& tally, float* error, float* target) {
    *target = t[RETURN];
    const ValueTerm<float> term = value_term(t[VALUE_NOW], t[OLD_VALUE], *target, j.value_range);
    *error = term.error;
    tally.sums[VALUE_LOSS] += t.weight * term.square;
    tally.sums[HELD] += term.held ? 1.0f : 0.0f;
    tally.sums[VALUE] += t[VALUE_NOW];
    tally.spread.x[1] += term.error;
    tally.spread.x[2] += *target;
    return t.keep ? j.value_scale * t.weight * term.slope : 0.0f;
}

__device__ __forceinline__ float visit_entropy(const Job& j, const Held& t, Tally& tally) {
    tally.sums[ENTROPY_LOSS] += t.entropy_weight * t[ENTROPY_NOW];
    tally.sums[ENTROPY] += t[ENTROPY_NOW];
    return t.keep ? j.entropy_scale * t.entropy_weight : 0.0f;
}

// The last block of a group, and of all groups, merges the records up to the results. All threads must call.
template <bool Metrics>
__device__ __forceinline__ void finish(const Job& j) {
    constexpr int record = RECORD_OF<Metrics>;
    const int64_t group = blockIdx.x / GROUP, first = group * GROUP, pieces = gridDim.x, groups = j.groups();
    const int members = (int)(pieces - first < GROUP ? pieces - first : GROUP);
    if (!last_of(j.done + group, members)) return;
    double* of_groups = j.records + pieces * record;
    merge<record>(j.records + first * record, members, of_groups + group * record);
    if (!last_of(j.done + groups, (int)groups)) return;
    __shared__ double all[record];
    merge<record>(of_groups, groups, all);
    __syncthreads();
    if (threadIdx.x == 0) put_results<Metrics>(j, all);
}

template <class W>
__global__ void __launch_bounds__(THREADS, 2) walk_kernel(const Job j) {
    constexpr int COUNT = ROUNDS * ITEMS;
    const int64_t begin = (int64_t)blockIdx.x * PIECE + threadIdx.x * ITEMS;
    float x[ROUNDS][INPUTS][ITEMS];
    unsigned mask[ROUNDS], kept[ROUNDS];
#pragma unroll
    for (int n = 0; n < ROUNDS; ++n) {  // all of it is on its way before the first is used
        const int64_t i = begin + n * THREADS * ITEMS;
        const bool four = j.vector && i + ITEMS <= j.N;
        mask[n] = load_mask(j.mask, i, j.N, j.vector);
#pragma unroll
        for (int a = 0; a < INPUTS; ++a)
            if (four && W::may_have(a) && (W::must_have(a) || j.from[a])) load_four(j.from[a] + i, x[n][a]);
        if (four) continue;
#pragma unroll
        for (int a = 0; a < INPUTS; ++a)
            if (W::may_have(a) && (W::must_have(a) || j.from[a])) load_some(j.from[a], i, j.N, x[n][a]);
    }
    const bool entropy = W::ENTROPY && (!W::METRICS || j.from[ENTROPY_NOW]);
    const Weights w = weights_of(j.share, j.entropy_share, j.width, j.counts, j.counting);
    float ratio[COUNT], error[COUNT], target[COUNT];
    Tally tally;
#pragma unroll
    for (int n = 0; n < ROUNDS; ++n) {
        const int64_t i = begin + n * THREADS * ITEMS;
        float weights[ITEMS], entropy_weights[ITEMS], grads[3][ITEMS];
        SequencePart parts[ITEMS];
        kept[n] = kept_of(mask[n]);
        fill_weights(j, w.loss, W::METRICS ? j.share.own_length() : W::OWN, i, weights);
        if (W::METRICS && entropy) fill_weights(j, w.entropy, j.entropy_share.own_length(), i, entropy_weights);
        if (W::Objective::SEQUENCE) fill_parts(j, i, parts);
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const int at = n * ITEMS + k;
            Held t;
#pragma unroll
            for (int a = 0; a < INPUTS; ++a)
                if (W::may_have(a)) t.x[a] = x[n][a][k];
            t.weight = weights[k], t.entropy_weight = W::METRICS ? entropy_weights[k] : weights[k];
            if (W::Objective::SEQUENCE) t.part = parts[k];
            t.keep = kept[n] >> k & 1;
            tally.sums[TOKENS] += t.keep ? 1.0f : 0.0f;
            if constexpr (W::POLICY) grads[0][k] = visit_policy<W>(j, t, tally, &ratio[at]);
            if (W::VALUES) grads[1][k] = visit_value(j, t, tally, &error[at], &target[at]);
            if (entropy) grads[2][k] = visit_entropy(j, t, tally);
        }
        const bool four = j.vector && i + ITEMS <= j.N;
        if (W::POLICY) store(j.grad_log_probs, i, j.N, four, grads[0]);
        if (W::VALUES) store(j.grad_values, i, j.N, four, grads[1]);
        if (entropy) store(j.grad_entropy, i, j.N, four, grads[2]);
    }
    tally.spread.tokens = tally.sums[TOKENS];
    const Spread means = means_of(tally.spread);
#pragma unroll
    for (int at = 0; at < COUNT; ++at) {
        const bool keep = kept[at / ITEMS] >> at % ITEMS & 1;
        const float off[SPREADS] = {W::POLICY ? ratio[at] - means.x[0] : 0.0f,
                                    W::VALUES ? error[at] - means.x[1] : 0.0f,
                                    W::VALUES ? target[at] - means.x[2] : 0.0f};
        for (int k = 0; k < SPREADS; ++k) {
            tally.sums[GAPS + k] += keep ? off[k] : 0.0f;
            tally.sums[SQUARES + k] += keep ? off[k] * off[k] : 0.0f;
        }
    }
    constexpr int record = RECORD_OF<W::METRICS>;
    put_record<W::METRICS>(tally.sums, tally.extras, tally.ratio_max, means, j.records + blockIdx.x * (int64_t)record);
    finish<W::METRICS>(j);
}

// Counts what the job's shares and the objective's sequences need, and walks.
template <class Objective>
void walk(void (*kernel)(const Job), Job j, bool summed, void* stream) {
    Counting c = {};
    c.mask = j.mask, c.B = j.B, c.T = j.T;
    c.log_probs = j.from[LOG_PROB], c.old_log_probs = j.from[OLD_LOG_PROB], c.advantages = j.from[ADVANTAGE];
    c.numbers = j.numbers, c.summed = summed;
    c.rows = Objective::SEQUENCE || (j.share.counts() && j.share.by_rows()) ||
             (j.entropy_share.counts() && j.entropy_share.by_rows());
    c.counts = Objective::SEQUENCE || j.share.counts() || j.entropy_share.counts();
    c.vector = j.vector && j.T % ITEMS == 0;
    c.of_blocks = j.counts, c.lengths = j.lengths, c.parts = j.parts, c.done = j.done, c.groups = j.groups();
    j.counting = count<Objective>(c, stream);
    launch(kernel, j.pieces(), THREADS, stream, j);
}

inline bool all_aligned(std::initializer_list<const void*> addresses) {
    for (const void* address : addresses)
        if (!aligned(address, 16)) return false;
    return true;
}

inline bool all_aligned(const Job& j) {
    bool all = aligned(j.mask, ITEMS) && all_aligned({j.grad_log_probs, j.grad_values, j.grad_entropy});
    for (const float* from : j.from) all = all && aligned(from, 16);
    return all;
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
