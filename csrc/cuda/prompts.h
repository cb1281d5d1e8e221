// What the ranking losses share: a prompt's responses, the totals over them, and which threads take which prompt.
#pragma once
#include "bradley_terry.h"
#include "launch.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int THREADS = 128, WARPS = THREADS / WARP;
constexpr int HALF = WARP / 2;
constexpr int64_t BLOCKS = 1056;  // that share the large prompts, if there are so many: eight for each of 132 SMs
enum Stat { PAIRS, STRICT_PAIRS, CORRECT, MARGIN_SUM, RESPONSES, REWARD_SUM, REWARD_MIN, REWARD_MAX, STATS };

struct Span {  // a prompt's responses; nobody has read the offsets before, and where they are wrong the results are NaN
    int64_t start, size;
    bool right;

    __device__ __forceinline__ int64_t used() const { return right ? size : 0; }
};

__device__ __forceinline__ Span span_of(const int64_t* cu, int64_t p, int64_t responses) {
    const int64_t from = cu[p], to = cu[p + 1];
    const int64_t start = from < 0 ? 0 : from > responses ? responses : from, end = to > responses ? responses : to;
    return {start, end > start ? end - start : 0, start == from && end == to && start <= end};
}

// What all prompts come to; the last block to end makes it of the blocks' records.
struct Summary {
    void* records;  // [blocks]
    int* done;      // blocks that ended
    const float* normalizer;
    double number;  // what divides the sum of the losses if there is no normalizer; 0: the prompts that are counted
    float *value, *metrics;  // value null: not asked for
};

struct Prompts {
    const void* scores;
    int64_t dtype;
    const int64_t *ranks, *cu;  // cu null: `columns` responses each
    int64_t columns, count;
    const float* margins;
    int64_t margin_columns;  // 0: one margin a prompt
    float *loss, *grad, *stats;  // loss and stats null: not asked for
    float *peaks, *inverses;  // Plackett-Luce only: a workspace of one number a response
    int64_t responses;        // of all prompts, among which offsets must stay
    Summary summary;

    __device__ __forceinline__ Span span(int64_t p) const {
        return cu ? span_of(cu, p, responses) : Span{p * columns, columns, true};
    }
    __device__ __forceinline__ int64_t size(int64_t p) const { return p < count ? span(p).used() : 0; }
};

struct Response {
    float score;  // 0 if absent
    int64_t rank;
};

__device__ __forceinline__ Response response(const Prompts& all, int64_t at, bool inside) {
    Response x = {0.0f, -1};
    if (!inside) return x;
    x.rank = all.ranks[at];
    const float score = entry(all.scores, all.dtype, at);
    x.score = x.rank >= 0 ? score : 0.0f;
    return x;
}

struct Totals {
    double loss, margin, rewards;
    int64_t counted, strict, twice_correct, present;
    float high, low;  // the largest score, and the largest of the negated scores
    int64_t unused;   // whole words without padding

    __device__ __forceinline__ static Totals none() {
        return {0.0, 0.0, 0.0, 0, 0, 0, 0, -__builtin_inff(), -__builtin_inff(), 0};
    }
    __device__ __forceinline__ void add(const Response& x) {
        if (x.rank < 0) return;
        present += 1;
        rewards += (double)x.score;
        high = Highest()(high, x.score);
        low = Highest()(low, -x.score);
    }
    __device__ __forceinline__ float divisor() const { return counted > 0 ? (float)counted : 1.0f; }

    __device__ __forceinline__ void write(const Prompts& all, int64_t p) const;
};

struct Join {
    __device__ __forceinline__ Totals operator()(const Totals& a, const Totals& b) const {
        return {a.loss + b.loss,       a.margin + b.margin,
                a.rewards + b.rewards, a.counted + b.counted,
                a.strict + b.strict,   a.twice_correct + b.twice_correct,
                a.present + b.present, Highest()(a.high, b.high),
                Highest()(a.low, b.low), 0};
    }
};

struct Record {  // of some prompts
    double loss, prompts, wrong, pairs, strict, correct, margin, responses, rewards;
    float high, low;

    __device__ __forceinline__ static Record none() {
        return {0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -__builtin_inff(), -__builtin_inff()};
    }
};

struct JoinRecords {
    __device__ __forceinline__ Record operator()(const Record& a, const Record& b) const {
        return {a.loss + b.loss,           a.prompts + b.prompts, a.wrong + b.wrong,     a.pairs + b.pairs,
                a.strict + b.strict,       a.correct + b.correct, a.margin + b.margin,   a.responses + b.responses,
                a.rewards + b.rewards,     Highest()(a.high, b.high), Highest()(a.low, b.low)};
    }
};

// The record of the prompts that a half of a warp has met; its first lane alone reads and writes it.
__device__ __forceinline__ Record* records_of_block() {
    __shared__ Record records[THREADS / HALF];
    return records;
}

__device__ __forceinline__ void Totals::write(const Prompts& all, int64_t p) const {
    const float nan = __builtin_nanf("");
    const bool right = all.span(p).right;
    const float mean = right ? (float)(loss / (counted > 0 ? (double)counted : 1.0)) : nan;
    if (all.loss) all.loss[p] = mean;
    if (all.stats) {
        float4* row = (float4*)(all.stats + p * STATS);
        row[0] = make_float4((float)counted, (float)strict, 0.5f * (float)twice_correct, (float)margin);
        row[1] = make_float4((float)present, (float)rewards, -low, high);
        if (!right) row[0] = row[1] = make_float4(nan, nan, nan, nan);
    }
    if (!all.summary.value) return;
    Record& mine = records_of_block()[threadIdx.x / HALF];
    mine = JoinRecords()(mine, {(double)mean, counted > 0 ? 1.0 : 0.0, right ? 0.0 : 1.0, (double)counted,
                                (double)strict, 0.5 * (double)twice_correct, margin, (double)present, rewards, high,
                                low});
}

// The loss, and metrics in the order of METRICS in reference/bradley_terry.py. Wrong offsets make all of it NaN, and with
// the divisor every gradient.
__device__ __forceinline__ void put_summary(const Summary& s, const Record& all) {
    const double nan = __builtin_nan(""), least = all.prompts > 0.0 ? all.prompts : 1.0;
    const double divisor = s.normalizer ? (double)*s.normalizer : s.number > 0.0 ? s.number : least;
    const double found[] = {all.correct / all.strict,         all.margin / all.strict,
                            all.responses > 0.0 ? (double)-all.low : nan, all.rewards / all.responses,
                            all.responses > 0.0 ? (double)all.high : nan, all.pairs, divisor};
#pragma unroll
    for (int i = 0; i < 7; ++i) s.metrics[i] = (float)(all.wrong > 0.0 ? nan : found[i]);
    *s.value = (float)(all.loss / divisor);
}

// All threads must call, before the block's prompts and after them.
__device__ __forceinline__ void begin_summary(const Summary& s) {
    if (s.value && threadIdx.x % HALF == 0) records_of_block()[threadIdx.x / HALF] = Record::none();
}

__device__ __forceinline__ void finish_summary(const Summary& s) {
    __shared__ int before;
    if (!s.value) return;
    __syncthreads();
    Record* records = (Record*)s.records;
    const Record own = over_block<THREADS>(
        threadIdx.x % HALF == 0 ? records_of_block()[threadIdx.x / HALF] : Record::none(), JoinRecords());
    if (threadIdx.x == 0) {
        records[blockIdx.x] = own;
        __threadfence();
        before = atomicAdd(s.done, 1);
    }
    __syncthreads();
    if ((unsigned)before != gridDim.x - 1) return;
    __threadfence();
    Record all = Record::none();
    for (unsigned i = threadIdx.x; i < gridDim.x; i += THREADS) {
        const volatile double* from = (const volatile double*)(records + i);  // past this block's cache
        const volatile float* bounds = (const volatile float*)(from + 9);
        all = JoinRecords()(all, {from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7], from[8],
                                  bounds[0], bounds[1]});
    }
    all = over_block<THREADS>(all, JoinRecords());
    if (threadIdx.x == 0) put_summary(s, all);
}

// The totals of a prompt of at most a warp, in fewer words: its counts fit 10 bits each.
struct FewTotals {
    double margin, rewards;
    float loss, high, low;
    unsigned counts;  // counted, strict, twice correct

    __device__ __forceinline__ static unsigned packed(int counted, int strict, int twice_correct) {
        return (unsigned)counted | (unsigned)strict << 10 | (unsigned)twice_correct << 20;
    }
    __device__ __forceinline__ Totals unpacked(int present) const {
        return {(double)loss, margin, rewards, counts & 1023, counts >> 10 & 1023, counts >> 20, present, high, low, 0};
    }
};

// Sums over the W lanes that share a prompt, in a fixed order; every lane gets them. All lanes of the warp must call.
template <int W>
__device__ __forceinline__ Totals over_lanes(FewTotals x, const Response& own) {
    const unsigned there = __ballot_sync(WHOLE_WARP, own.rank >= 0);
    const int first = threadIdx.x % WARP / W * W;
    x.rewards = (double)own.score;
    x.high = own.rank >= 0 ? own.score : -__builtin_inff();
    x.low = own.rank >= 0 ? -own.score : -__builtin_inff();
#pragma unroll
    for (int distance = 1; distance < W; distance *= 2) {
        const FewTotals y = shuffle_xor(x, distance);
        x = {x.margin + y.margin,        x.rewards + y.rewards,      x.loss + y.loss,
             Highest()(x.high, y.high), Highest()(x.low, y.low), x.counts + y.counts};
    }
    return x.unpacked(__popc(there >> first & (W == WARP ? WHOLE_WARP : (1u << W) - 1)));
}

// Prompts of up to HALF responses are taken two at a time, by half a warp each; those of up to WARP by a whole one;
// larger ones by a block. small.run<W>(p) is called by all lanes, with p = -1 where there is nothing to do.
template <class Small, class Large>
__device__ __forceinline__ void each_prompt(const Prompts& all, const Small& small, const Large& large) {
    const int lane = threadIdx.x % WARP;
    const int64_t first = 2 * ((int64_t)blockIdx.x * WARPS + threadIdx.x / WARP);
    const int64_t mine = first + lane / HALF;  // the lower half of the warp looks at the first prompt
    const int64_t size = all.size(mine);
    const bool half = mine < all.count && size <= HALF;
    const unsigned halves = __ballot_sync(WHOLE_WARP, half);
    const unsigned wholes = __ballot_sync(WHOLE_WARP, size > HALF && size <= WARP);
    if (halves) small.template run<HALF>(half ? mine : -1);
    if (wholes & 1) small.template run<WARP>(first);
    if (wholes >> HALF & 1) small.template run<WARP>(first + 1);
#pragma unroll 1
    for (int64_t p = blockIdx.x; p < all.count; p += (int64_t)WARP * gridDim.x) {
        unsigned large_ones = __ballot_sync(WHOLE_WARP, all.size(p + (int64_t)lane * gridDim.x) > WARP);
        for (; large_ones; large_ones &= large_ones - 1)
            large.run(p + (int64_t)(__ffs((int)large_ones) - 1) * gridDim.x);
    }
}

inline int64_t blocks_for(int64_t prompts) {
    const int64_t warps = pieces_of(prompts, 2 * WARPS), most = prompts < BLOCKS ? prompts : BLOCKS;
    return warps > most ? warps : most;  // as in rlhf_kernels/cuda/bradley_terry.py
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
