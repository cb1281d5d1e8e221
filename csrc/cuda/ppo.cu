// The PPO loss, its gradients and its metrics: one launch counts the kept tokens, one does the rest.
//
// The tokens lie flat and are cut into pieces of a fixed size, one for each block. What a piece adds up to is a record;
// the last block of a group to end merges the group's records, and the last of all groups merges those, always in
// order, so that the result has the same bits whichever blocks end first.
#include "ppo.h"

#include <initializer_list>

#include "ppo_totals.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int ROUNDS = 2;                        // four tokens of a thread each
constexpr int PIECE = THREADS * ITEMS * ROUNDS;  // tokens; as in rlhf_kernels/cuda/ppo.py
constexpr int GROUP = 32;                        // pieces; likewise
constexpr int COUNTING_BLOCKS = 256;             // likewise
constexpr int64_t LONG_ROW = 4096;               // tokens: a block counts a longer row, and a warp a shorter one

enum Aggregation { TOKEN_MEAN, TOKEN_SUM, SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM_NORM };

struct Counts {
    int64_t tokens, sequences;
};

struct Job {
    const float *log_probs, *old_log_probs, *advantages, *values, *old_values, *returns, *entropy, *normalizer;
    const uint8_t* mask;
    int64_t B, T, N, aggregation;
    RatioRange<float> ratio_range;
    float value_range, value_scale, entropy_scale;
    bool vector;        // four tokens may be moved at once
    int64_t counting;   // blocks that count
    Counts* counts;     // of each of them
    int64_t* lengths;   // kept tokens of each row, if they are asked for
    double* records;    // of the pieces, and behind them of the groups
    int* done;          // blocks that ended, of each group; behind them groups that ended
    float *losses, *grad_log_probs, *grad_values, *grad_entropy, *stats;

    __host__ __device__ __forceinline__ int64_t pieces() const { return N > 0 ? (N + PIECE - 1) / PIECE : 1; }
    __host__ __device__ __forceinline__ int64_t groups() const { return (pieces() + GROUP - 1) / GROUP; }
    __host__ __device__ __forceinline__ bool by_rows() const { return aggregation > TOKEN_SUM; }
    __host__ __device__ __forceinline__ bool counts_first() const {
        return aggregation == SEQ_MEAN_TOKEN_MEAN || (aggregation != TOKEN_SUM && !normalizer);
    }
};

__device__ __forceinline__ int kept_bytes(unsigned four) {
    return __popc((((four & 0x7f7f7f7fu) + 0x7f7f7f7fu) | four) & 0x80808080u);
}

// Kept tokens among those that fall to member `me` of a team.
__device__ __forceinline__ int count_kept(const uint8_t* mask, int64_t count, int me, int team) {
    const int64_t before = (16 - (int64_t)((uintptr_t)mask % 16)) % 16, head = before < count ? before : count;
    const int64_t lines = (count - head) / 16;
    const uint4* from = (const uint4*)(mask + head);
    int kept = 0;
    for (int64_t i = me; i < head; i += team) kept += mask[i] != 0;
#pragma unroll 4
    for (int64_t i = me; i < lines; i += team) {
        const uint4 line = from[i];
        kept += kept_bytes(line.x) + kept_bytes(line.y) + kept_bytes(line.z) + kept_bytes(line.w);
    }
    for (int64_t i = head + 16 * lines + me; i < count; i += team) kept += mask[i] != 0;
    return kept;
}

__global__ void __launch_bounds__(THREADS) count_kernel(const Job j) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (blockIdx.x == 0)
        for (int64_t i = threadIdx.x; i <= j.groups(); i += THREADS) j.done[i] = 0;
    if (!j.counts_first()) return;
    Counts mine = {0, 0};
    if (!j.by_rows()) {
        const int64_t share = ((j.N + gridDim.x - 1) / gridDim.x + 15) / 16 * 16, begin = blockIdx.x * share;
        const int64_t count = j.N - begin < share ? j.N - begin : share;
        if (count > 0) mine.tokens = count_kept(j.mask + begin, count, threadIdx.x, THREADS);
    } else if (j.T > LONG_ROW) {
        for (int64_t b = blockIdx.x; b < j.B; b += gridDim.x) {
            const int kept = over_block<THREADS>(count_kept(j.mask + b * j.T, j.T, threadIdx.x, THREADS), Add());
            if (threadIdx.x != 0) continue;
            j.lengths[b] = kept;
            mine.tokens += kept, mine.sequences += kept > 0;
        }
    } else {
        for (int64_t b = (int64_t)blockIdx.x * WARPS + warp; b < j.B; b += (int64_t)gridDim.x * WARPS) {
            const int kept = over_warp(count_kept(j.mask + b * j.T, j.T, lane, WARP), Add());
            if (lane != 0) continue;
            j.lengths[b] = kept;
            mine.tokens += kept, mine.sequences += kept > 0;
        }
    }
    mine.tokens = over_block<THREADS>(mine.tokens, Add());
    mine.sequences = over_block<THREADS>(mine.sequences, Add());
    if (threadIdx.x == 0) j.counts[blockIdx.x] = mine;
}

// Weight of a token before its row's own length. All threads must call.
__device__ __forceinline__ double weight_of(const Job& j) {
    if (j.aggregation == TOKEN_SUM) return 1.0;
    double count = 1.0;
    if (j.normalizer) {
        count = (double)*j.normalizer;
    } else {
        int64_t mine = 0;
        if (threadIdx.x < j.counting)
            mine = j.by_rows() ? j.counts[threadIdx.x].sequences : j.counts[threadIdx.x].tokens;
        mine = over_block<THREADS>(mine, Add());
        count = mine > 0 ? (double)mine : 1.0;
    }
    return 1.0 / count / (j.aggregation == SEQ_MEAN_TOKEN_SUM_NORM && j.T > 0 ? (double)j.T : 1.0);
}

// Weights of the four tokens from i on; Own: divided by the length of each one's row.
template <bool Own>
__device__ __forceinline__ void fill_weights(const Job& j, double weight, int64_t i, float* weights) {
    float w = (float)weight;
    int64_t row = Own ? i / j.T : 0, column = Own ? i - row * j.T : 0;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        if (Own && column == j.T) ++row, column = 0;
        if (Own && i + k < j.N && (k == 0 || column == 0))
            w = (float)(weight / (double)(j.lengths[row] > 0 ? j.lengths[row] : 1));
        ++column;
        weights[k] = w;
    }
}

// stats in the order of STATS in reference/ppo.py; a mean over nothing is 0 / 0.
__device__ __forceinline__ void put_results(const Job& j, const double* sum) {
    const double tokens = sum[TOKENS], ratio_mean = tokens > 0.0 ? sum[RATIO_GAP] : 0.0 / tokens;
    const bool values = j.values;
    const double results[] = {
        tokens,
        0.5 * sum[KL] / tokens,
        sum[CLIPPED] / tokens,
        sum[BOUNDED] / tokens,
        ratio_mean,
        sum[RATIO_SQUARE] / tokens,
        ratio_mean == ratio_mean ? sum[RATIO_MAX] : ratio_mean,  // a maximum drops a NaN
        j.entropy ? sum[ENTROPY] / tokens : 0.0,
        values ? sum[HELD] / tokens : 0.0,
        values ? 1.0 - sum[ERROR_SQUARE] / sum[TARGET_SQUARE] : 0.0,
        values ? sum[VALUE] / tokens : 0.0,
        values ? sum[TARGET_GAP] * tokens / tokens : 0.0,
    };
#pragma unroll
    for (int i = 0; i < (int)(sizeof(results) / sizeof(results[0])); ++i) j.stats[i] = (float)results[i];
    j.losses[0] = (float)sum[POLICY_LOSS];
    j.losses[1] = (float)(0.5 * sum[VALUE_LOSS]);
    j.losses[2] = (float)sum[ENTROPY_LOSS];
}

template <bool Values, bool Entropy, bool Own>
__global__ void __launch_bounds__(THREADS, 2) ppo_fwd_kernel(const Job j) {
    constexpr int COUNT = ROUNDS * ITEMS, INPUTS = 7;
    const int64_t begin = (int64_t)blockIdx.x * PIECE + threadIdx.x * ITEMS;
    const float* from[INPUTS] = {j.log_probs, j.old_log_probs, j.advantages, j.values,
                                 j.old_values, j.returns,      j.entropy};
    float x[ROUNDS][INPUTS][ITEMS], sums[SUMS] = {}, ratio_max = 0.0f;
    unsigned mask[ROUNDS], kept[ROUNDS];
#pragma unroll
    for (int n = 0; n < ROUNDS; ++n) {  // all of it is on its way before the first is used
        const int64_t i = begin + n * THREADS * ITEMS;
        const bool four = j.vector && i + ITEMS <= j.N;
        mask[n] = load_mask(j.mask, i, j.N, j.vector);
#pragma unroll
        for (int a = 0; a < INPUTS; ++a)
            if (four && (a < 3 || (a < 6 ? Values : Entropy))) load_four(from[a] + i, x[n][a]);
        if (four) continue;
#pragma unroll
        for (int a = 0; a < INPUTS; ++a)
            if (a < 3 || (a < 6 ? Values : Entropy)) load_some(from[a], i, j.N, x[n][a]);
    }
    const double weight = weight_of(j);
    float ratio[COUNT], error[COUNT], target[COUNT];
    Spread spread = {};
#pragma unroll
    for (int n = 0; n < ROUNDS; ++n) {
        const int64_t i = begin + n * THREADS * ITEMS;
        float weights[ITEMS], grads[3][ITEMS];
        kept[n] = kept_of(mask[n]);
        fill_weights<Own>(j, weight, i, weights);
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const bool keep = kept[n] >> k & 1;
            const int at = n * ITEMS + k;
            const float w = weights[k], log_ratio = keep ? x[n][0][k] - x[n][1][k] : 0.0f;
            const PolicyTerm<float> policy = clip_term(exp_f32(log_ratio), keep ? x[n][2][k] : 0.0f, j.ratio_range);
            ratio[at] = policy.ratio;
            grads[0][k] = keep ? w * policy.slope : 0.0f;
            sums[POLICY_LOSS] += w * policy.loss;
            sums[KL] += log_ratio * log_ratio;
            sums[CLIPPED] += policy.low | policy.high ? 1.0f : 0.0f;
            sums[BOUNDED] += policy.bounded ? 1.0f : 0.0f;
            sums[TOKENS] += keep ? 1.0f : 0.0f;
            spread.x[0] += keep ? policy.ratio : 0.0f;
            ratio_max = keep && policy.ratio > ratio_max ? policy.ratio : ratio_max;
            if (Values) {
                const float value = keep ? x[n][3][k] : 0.0f, old = keep ? x[n][4][k] : 0.0f;
                target[at] = keep ? x[n][5][k] : 0.0f;
                const ValueTerm<float> term = value_term(value, old, target[at], j.value_range);
                error[at] = term.error;
                grads[1][k] = keep ? j.value_scale * w * term.slope : 0.0f;
                sums[VALUE_LOSS] += w * term.square;
                sums[HELD] += term.held ? 1.0f : 0.0f;
                sums[VALUE] += value;
                spread.x[1] += term.error;
                spread.x[2] += target[at];
            }
            if (Entropy) {
                const float entropy = keep ? x[n][6][k] : 0.0f;
                grads[2][k] = keep ? j.entropy_scale * w : 0.0f;
                sums[ENTROPY_LOSS] += w * entropy;
                sums[ENTROPY] += entropy;
            }
        }
        if (j.vector && i + ITEMS <= j.N) {
            store_four(j.grad_log_probs + i, grads[0]);
            if (Values) store_four(j.grad_values + i, grads[1]);
            if (Entropy) store_four(j.grad_entropy + i, grads[2]);
        } else {
            store_some(j.grad_log_probs, i, j.N, grads[0]);
            if (Values) store_some(j.grad_values, i, j.N, grads[1]);
            if (Entropy) store_some(j.grad_entropy, i, j.N, grads[2]);
        }
    }
    spread.tokens = sums[TOKENS];
    const Spread means = means_of(spread);
#pragma unroll
    for (int at = 0; at < COUNT; ++at) {
        const bool keep = kept[at / ITEMS] >> at % ITEMS & 1;
        const float off[SPREADS] = {ratio[at] - means.x[0], Values ? error[at] - means.x[1] : 0.0f,
                                    Values ? target[at] - means.x[2] : 0.0f};
        for (int k = 0; k < SPREADS; ++k) {
            sums[GAPS + k] += keep ? off[k] : 0.0f;
            sums[SQUARES + k] += keep ? off[k] * off[k] : 0.0f;
        }
    }
    put_record(sums, ratio_max, means, j.records + (int64_t)blockIdx.x * RECORD);
    const int64_t group = blockIdx.x / GROUP, first = group * GROUP, pieces = gridDim.x, groups = j.groups();
    const int members = (int)(pieces - first < GROUP ? pieces - first : GROUP);
    if (!last_of(j.done + group, members)) return;
    double* of_groups = j.records + pieces * RECORD;
    merge(j.records + first * RECORD, members, of_groups + group * RECORD);
    if (!last_of(j.done + groups, (int)groups)) return;
    __shared__ double all[RECORD];
    merge(of_groups, groups, all);
    __syncthreads();
    if (threadIdx.x == 0) put_results(j, all);
}

struct Product {
    const float* from;
    float* to;
    int64_t count;
};

struct Products {
    const float *loss, *policy_loss, *value_loss;  // upstream gradients, or null
    float vf_coef;
    Product log_probs, values, entropy;
    bool vector;
};

__device__ __forceinline__ void multiply(const Product& p, float scale, int64_t i, bool vector) {
    float x[ITEMS];
    load(p.from, i, p.count, vector, x);
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) x[k] *= scale;
    store(p.to, i, p.count, vector, x);
}

__global__ void __launch_bounds__(THREADS) ppo_bwd_kernel(const Products j) {
    const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * ITEMS;
    const float whole = j.loss ? *j.loss : 0.0f, policy = j.policy_loss ? *j.policy_loss : 0.0f;
    const float value = j.value_loss ? *j.value_loss : 0.0f;
    multiply(j.log_probs, whole + policy, i, j.vector);
    multiply(j.values, j.vf_coef != 0.0f ? whole + value / j.vf_coef : value, i, j.vector);
    multiply(j.entropy, whole, i, j.vector);
}

bool all_aligned(std::initializer_list<const void*> addresses) {
    for (const void* address : addresses)
        if (!aligned(address, 16)) return false;
    return true;
}

}  // namespace

// `counts` [COUNTING_BLOCKS, 2] and `lengths` [B] are scratch; `records` [pieces + groups, RECORD] and `done`
// [groups + 1] too, a group being GROUP pieces, and there being at least one of each.
void ppo_fwd_f32(const float* log_probs, const float* old_log_probs, const float* advantages, const uint8_t* mask,
                 const float* values, const float* old_values, const float* returns, const float* entropy,
                 const float* normalizer, int64_t B, int64_t T, double cliprange, double cliprange_high,
                 double dual_clip, double cliprange_value, int64_t aggregation, double value_scale,
                 double entropy_scale, int64_t* counts, int64_t* lengths, double* records, int* done, float* losses,
                 float* grad_log_probs, float* grad_values, float* grad_entropy, float* stats, void* stream) {
    Job j = {};
    j.log_probs = log_probs, j.old_log_probs = old_log_probs, j.advantages = advantages, j.mask = mask;
    j.values = values, j.old_values = old_values ? old_values : values, j.returns = returns;
    j.entropy = entropy, j.normalizer = normalizer;
    j.B = B, j.T = T, j.N = B * T, j.aggregation = aggregation;
    j.ratio_range = {(float)(1.0 - cliprange), (float)(1.0 + cliprange_high), (float)dual_clip};
    j.value_range = (float)cliprange_value;
    j.value_scale = (float)value_scale, j.entropy_scale = (float)entropy_scale;
    j.vector = all_aligned({log_probs, old_log_probs, advantages, values, j.old_values, returns, entropy,
                            grad_log_probs, values ? grad_values : nullptr, entropy ? grad_entropy : nullptr}) &&
               aligned(mask, ITEMS);
    j.counts = (Counts*)counts, j.lengths = lengths, j.records = records, j.done = done;
    j.losses = losses, j.stats = stats;
    j.grad_log_probs = grad_log_probs, j.grad_values = grad_values, j.grad_entropy = grad_entropy;
    const int64_t useful = j.by_rows() ? (T > LONG_ROW ? B : pieces_of(B, WARPS)) : pieces_of(j.N, THREADS * 16);
    j.counting = !j.counts_first() || useful < 1 ? 1 : useful < COUNTING_BLOCKS ? useful : COUNTING_BLOCKS;
    launch(count_kernel, j.counting, THREADS, stream, j);
    void (*kernel)(const Job) = nullptr;
    if (aggregation == SEQ_MEAN_TOKEN_MEAN)
        kernel = values ? (entropy ? ppo_fwd_kernel<true, true, true> : ppo_fwd_kernel<true, false, true>)
                        : (entropy ? ppo_fwd_kernel<false, true, true> : ppo_fwd_kernel<false, false, true>);
    else
        kernel = values ? (entropy ? ppo_fwd_kernel<true, true, false> : ppo_fwd_kernel<true, false, false>)
                        : (entropy ? ppo_fwd_kernel<false, true, false> : ppo_fwd_kernel<false, false, false>);
    launch(kernel, j.pieces(), THREADS, stream, j);
}

void ppo_bwd_f32(const float* grad_loss, const float* grad_policy_loss, const float* grad_value_loss, double vf_coef,
                 const float* grad_log_probs, const float* grad_values, const float* grad_entropy, int64_t log_probs,
                 int64_t values, int64_t entropy, float* out_log_probs, float* out_values, float* out_entropy,
                 void* stream) {
    Products j = {grad_loss, grad_policy_loss, grad_value_loss, (float)vf_coef,
                  {grad_log_probs, out_log_probs, log_probs}, {grad_values, out_values, values},
                  {grad_entropy, out_entropy, entropy}, true};
    int64_t most = 0;
    for (const Product& p : {j.log_probs, j.values, j.entropy}) {
        j.vector = j.vector && (p.count == 0 || all_aligned({p.from, p.to}));
        most = p.count > most ? p.count : most;
    }
    launch(ppo_bwd_kernel, pieces_of(most, THREADS * ITEMS), THREADS, stream, j);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(ppo_fwd_f32);
RK_REGISTER(ppo_bwd_f32);
