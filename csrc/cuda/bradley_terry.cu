// All-pairs Bradley-Terry and Plackett-Luce losses of ragged prompts, with their gradients, in one launch; its last block
// also makes the loss and the metrics of the whole batch.
//
// A prompt of up to 16 responses takes half a warp, one of up to 32 a warp, a larger one a block; the sizes are read on
// the device. A response is a lane (in a large prompt a thread, or a lane's row); what it sums is summed in a fixed
// order, and which way a prompt goes depends on its size and on whether there are margins for each pair, so that its
// bits do not depend on its neighbours.
#include "four.h"
#include "plackett_luce.h"
#include "prompts.h"
#include "sorted_pairs.h"

namespace rk {
namespace RK_ISA {
namespace {

struct Visit {  // what the pair (i, j) adds to i; the opposites of grad and lead are what it adds to j
    float grad, cost;
    int lead;  // 1 if i is the better one, -1 if j is
    bool counted, ahead, level;
};

template <bool Ties>
__device__ __forceinline__ Visit visit(const Response& i, const Response& j, float ahead_by, float behind_by) {
    const bool both = i.rank >= 0 && j.rank >= 0;
    const bool wins = both && i.rank < j.rank, loses = both && j.rank < i.rank;
    const float gap = i.score - j.score;
    const PairTerm<float> pair = pair_term(wins ? gap - ahead_by : -gap - behind_by);
    Visit out = {wins ? -pair.slope : pair.slope, pair.loss, wins - loses, wins || loses,
                 wins ? gap > 0.0f : gap < 0.0f, gap == 0.0f};
    if (!out.counted) out.grad = out.cost = 0.0f;
    if (Ties && both && i.rank == j.rank) {
        const PairTerm<float> tie = tie_term(gap);
        out.grad = tie.slope;
        out.cost = tie.loss;
        out.counted = true;
    }
    return out;
}

__device__ __forceinline__ int twice_correct(const Visit& v) { return v.lead != 0 ? 2 * v.ahead + v.level : 0; }

// Margins of i over j and of j over i, places in the prompt that begins at `start`.
template <bool Margins>
__device__ __forceinline__ void margins_of(const Prompts& all, int64_t p, int64_t start, int64_t i, int64_t j,
                                           float& ahead_by, float& behind_by) {
    ahead_by = behind_by = 0.0f;
    if (!Margins) return;
    const int64_t M = all.margin_columns;
    ahead_by = all.margins[M == 0 ? p : (start + i) * M + j];
    behind_by = M == 0 ? ahead_by : all.margins[(start + j) * M + i];
}

// One prompt for W lanes. In step d lane i visits the pair with i + d, modulo K, so that each pair is visited once; a
// shuffle hands over what the pair adds to the other lane.
template <bool Ties, bool Margins>
struct SmallPairs {
    const Prompts& all;

    template <int W>
    __device__ __forceinline__ void run(int64_t p) const {
        const int lane = threadIdx.x % W, first = threadIdx.x % WARP / W * W;
        const Span span = p >= 0 ? all.span(p) : Span{0, 0, true};
        const int64_t start = span.start;
        const int K = (int)span.used();
        const Response own = response(all, start + lane, lane < K);
        int most = K;
        if (W < WARP) {
            const int other = __shfl_xor_sync(WHOLE_WARP, K, W);
            most = other > K ? other : K;
        }
        float grad = 0.0f, loss = 0.0f;
        int lead = 0;
        unsigned counts = 0;
        for (int d = 1; 2 * d <= most; ++d) {
            const bool inside = lane < K && d < K;
            const int to = inside ? (lane + d < K ? lane + d : lane + d - K) : lane;
            const int from = inside ? (lane >= d ? lane - d : lane - d + K) : lane;
            const Response other = {__shfl_sync(WHOLE_WARP, own.score, first + to),
                                    __shfl_sync(WHOLE_WARP, own.rank, first + to)};
            Visit v = {0.0f, 0.0f, 0, false, false, false};
            if (inside && (2 * d < K || (2 * d == K && lane < d))) {
                float ahead_by, behind_by;
                margins_of<Margins>(all, p, start, lane, to, ahead_by, behind_by);
                v = visit<Ties>(own, other, ahead_by, behind_by);
            }
            loss += v.cost;
            counts += FewTotals::packed(v.counted, v.lead != 0, twice_correct(v));
            const float handed = __shfl_sync(WHOLE_WARP, v.grad, first + from);
            const int handed_lead = __shfl_sync(WHOLE_WARP, v.lead, first + from);
            grad += v.grad - (inside ? handed : 0.0f);
            lead += v.lead - (inside ? handed_lead : 0);
        }
        FewTotals few = {(double)own.score * (double)lead, 0.0, loss, 0.0f, 0.0f, counts};
        const Totals t = over_lanes<W>(few, own);
        if (lane < K) all.grad[start + lane] = grad / t.divisor();
        if (lane == 0 && p >= 0) t.write(all, p);
    }
};

// One prompt of any size for a block: a thread a row, all columns for each row, so that a pair is visited from both of
// its sides.
template <bool Ties, bool Margins>
__device__ void pairs_by_rows(const Prompts& all, int64_t p, int64_t start, int64_t K) {
    __shared__ Response others[THREADS];
    Totals t = Totals::none();
    for (int64_t i = threadIdx.x; i - threadIdx.x < K; i += THREADS) {
        const Response own = response(all, start + i, i < K);
        t.add(own);
        double grad = 0.0;
        int64_t lead = 0;
        for (int64_t left = 0; left < K; left += THREADS) {
            __syncthreads();
            others[threadIdx.x] = response(all, start + left + threadIdx.x, left + threadIdx.x < K);
            __syncthreads();
            float grad_here = 0.0f, loss_here = 0.0f;
            int lead_here = 0, counted = 0, strict = 0, correct = 0;
            for (int k = 0; k < THREADS && left + k < K && i < K; ++k) {
                float ahead_by, behind_by;
                margins_of<Margins>(all, p, start, i, left + k, ahead_by, behind_by);
                Visit v = visit<Ties>(own, others[k], ahead_by, behind_by);
                const bool counts_here = v.lead > 0 || (v.lead == 0 && i < left + k);
                grad_here += i == left + k ? 0.0f : v.grad;
                lead_here += v.lead;
                loss_here += counts_here ? v.cost : 0.0f;
                counted += counts_here && v.counted;
                strict += v.lead > 0;
                correct += counts_here ? twice_correct(v) : 0;
            }
            grad += (double)grad_here;
            lead += lead_here;
            t.loss += (double)loss_here;
            t.counted += counted;
            t.strict += strict;
            t.twice_correct += correct;
        }
        t.margin += (double)own.score * (double)lead;
        if (i < K) all.grad[start + i] = (float)grad;
    }
    t = over_block<THREADS>(t, Join());
    for (int64_t i = threadIdx.x; i < K; i += THREADS) all.grad[start + i] /= t.divisor();
    if (threadIdx.x == 0) t.write(all, p);
}

// Margins: there may be margins. Those of each pair keep to the order of the responses, so a prompt is not sorted then.
template <bool Ties, bool Margins>
struct LargePairs {
    const Prompts& all;

    __device__ __forceinline__ void run(int64_t p) const {
        const Span span = all.span(p);
        const int64_t start = span.start, K = span.size;
        if (K <= SORTED && !(Margins && all.margin_columns != 0))
            sorted_pairs<Ties, Margins>(all, p, start, (int)K);
        else
            pairs_by_rows<Ties, Margins>(all, p, start, K);
    }
};

template <bool Ties, bool Margins>
__global__ void __launch_bounds__(THREADS, 5) bradley_terry_fwd_kernel(Prompts all) {
    begin_summary(all.summary);
    each_prompt(all, SmallPairs<Ties, Margins>{all}, LargePairs<Ties, Margins>{all});
    finish_summary(all.summary);
}

__global__ void __launch_bounds__(THREADS, 5) plackett_luce_fwd_kernel(Prompts all) {
    begin_summary(all.summary);
    each_prompt(all, SmallChoices{all}, LargeChoices{all});
    finish_summary(all.summary);
}

// A warp for each prompt.
__global__ void __launch_bounds__(THREADS)
    bradley_terry_bwd_kernel(const float* grad_loss, const float* grad, const int64_t* cu, int64_t prompts,
                             int64_t responses, float* out) {
    const int64_t p = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (p >= prompts) return;
    const Span span = span_of(cu, p, responses);
    const float upstream = span.right ? grad_loss[p] : __builtin_nanf("");
    for (int64_t i = span.start + threadIdx.x % WARP; i < span.start + span.size; i += WARP)
        out[i] = upstream * grad[i];
}

// grad * upstream / divisor.
__global__ void __launch_bounds__(THREADS)
    ranking_bwd_kernel(const float* upstream, const float* divisor, const float* grad, int64_t count, float* out) {
    const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * ITEMS;
    float x[ITEMS];
    load(grad, i, count, true, x);
    const float scale = *upstream / *divisor;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) x[k] *= scale;
    store(out, i, count, true, x);
}

void run_pairs(const Prompts& all, bool ties_half, int64_t blocks, void* stream) {
    const auto plain = ties_half ? bradley_terry_fwd_kernel<true, false> : bradley_terry_fwd_kernel<false, false>;
    const auto apart = ties_half ? bradley_terry_fwd_kernel<true, true> : bradley_terry_fwd_kernel<false, true>;
    launch(all.margins ? apart : plain, blocks, THREADS, stream, all);
}

}  // namespace

void bradley_terry_fwd(const void* scores, int64_t dtype, const int64_t* ranks, const int64_t* cu_groups,
                       int64_t prompts, int64_t responses, const float* margins, int64_t margin_columns,
                       int64_t ties_half, float* loss, float* grad, float* stats, void* stream) {
    const Prompts all = {scores, dtype, ranks, cu_groups, 0, prompts, margins, margin_columns, loss, grad, stats,
                         nullptr, nullptr, responses, {}};
    run_pairs(all, ties_half, blocks_for(prompts), stream);
}

void plackett_luce_fwd(const void* scores, int64_t dtype, const int64_t* ranks, const int64_t* cu_groups,
                       int64_t prompts, int64_t responses, float* peaks, float* inverses, float* loss, float* grad,
                       float* stats, void* stream) {
    const Prompts all = {scores, dtype, ranks, cu_groups, 0, prompts, nullptr, 0, loss, grad, stats, peaks, inverses,
                         responses, {}};
    launch(plackett_luce_fwd_kernel, blocks_for(prompts), THREADS, stream, all);
}

void bradley_terry_bwd(const float* grad_loss, const float* grad, const int64_t* cu_groups, int64_t prompts,
                       int64_t responses, float* out, void* stream) {
    const int64_t blocks = pieces_of(prompts, WARPS);
    launch(bradley_terry_bwd_kernel, blocks, THREADS, stream, grad_loss, grad, cu_groups, prompts, responses,
           out);
}

// The loss of all prompts, and metrics, the last of which is what it was divided by. cu_groups null: `columns` responses a prompt. kind 0:
// pairs; 1: pairs, ties as half a pair; 2: choices. `records` of 10 doubles for each block.
void ranking_fwd(const void* scores, int64_t dtype, const int64_t* ranks, const int64_t* cu_groups, int64_t columns,
                 int64_t prompts, int64_t responses, const float* margins, int64_t margin_columns, int64_t kind,
                 const float* normalizer, double number, float* peaks, float* inverses, double* records, int* done,
                 float* value, float* grad, float* metrics, void* stream) {
    const Prompts all = {scores, dtype, ranks, cu_groups, columns, prompts, margins, margin_columns, nullptr, grad,
                         nullptr, peaks, inverses, responses,
                         {records, done, normalizer, number, value, metrics}};
    const int64_t blocks = prompts > 0 ? blocks_for(prompts) : 1;
    (void)cudaMemsetAsync(done, 0, sizeof(int), (cudaStream_t)stream);
    if (kind == 2)
        launch(plackett_luce_fwd_kernel, blocks, THREADS, stream, all);
    else
        run_pairs(all, kind == 1, blocks, stream);
}

void ranking_bwd(const float* grad_value, const float* divisor, const float* grad, int64_t responses, float* out,
                 void* stream) {
    launch(ranking_bwd_kernel, pieces_of(responses, THREADS * ITEMS), THREADS, stream, grad_value, divisor, grad,
           responses, out);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(bradley_terry_fwd);
RK_REGISTER(plackett_luce_fwd);
RK_REGISTER(bradley_terry_bwd);
RK_REGISTER(ranking_fwd);
RK_REGISTER(ranking_bwd);
