// What a policy loss must know of the mask, and for some objectives of each sequence, before it walks over the tokens.
#pragma once
#include <type_traits>

#include "four.h"
#include "launch.h"
#include "policy.h"

namespace rk {
namespace RK_ISA {

__device__ __forceinline__ SequenceSums operator+(SequenceSums a, SequenceSums b) {
    return {a.log_ratio + b.log_ratio, a.advantage + b.advantage, a.length + b.length};
}

namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int COUNTING_BLOCKS = 256;       // as in rlhf_kernels/cuda/ppo.py
constexpr int64_t LONG_ROW = 4096;         // tokens: a block counts a longer row, and a warp a shorter one
constexpr int64_t LONG_SEQUENCE = 1024;    // likewise, where numbers are read too

enum Aggregation { TOKEN_MEAN, TOKEN_SUM, SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM_NORM };

struct Share {  // how a loss is averaged
    int64_t aggregation;
    const float* normalizer;

    __host__ __device__ __forceinline__ bool counts() const {
        return aggregation == SEQ_MEAN_TOKEN_MEAN || (aggregation != TOKEN_SUM && !normalizer);
    }
    __host__ __device__ __forceinline__ bool by_rows() const { return aggregation > TOKEN_SUM; }
    __host__ __device__ __forceinline__ bool own_length() const { return aggregation == SEQ_MEAN_TOKEN_MEAN; }
};

struct Counts {
    int64_t tokens, sequences;
};

struct Counting {
    const uint8_t* mask;
    const float *log_probs, *old_log_probs, *advantages;  // of objectives of sequences
    PolicyNumbers<float> numbers;
    bool summed;
    int64_t B, T;
    bool counts, rows;  // whether anything is counted, and then of each row
    bool vector;        // four tokens may be moved at once
    Counts* of_blocks;
    int64_t* lengths;      // kept tokens of each row
    SequencePart* parts;   // of each row
    int* done;             // set to 0
    int64_t groups;
};

struct NoObjective : TokenObjective {};

template <class Objective>
constexpr bool reads_advantages = std::is_same<Objective, GmpoObjective>::value;

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

// What a row comes to over the tokens that fall to member `me` of a team, which depends on T alone.
template <class Objective>
__device__ __forceinline__ SequenceSums sum_row(const Counting& c, int64_t row, int me, int team) {
    const int64_t first = row * c.T;
    SequenceSums sums = {0.0, 0.0, 0};
#pragma unroll 2
    for (int64_t t = (int64_t)me * ITEMS; t < c.T; t += (int64_t)team * ITEMS) {
        float log_prob[ITEMS], old[ITEMS], advantage[ITEMS] = {};
        const unsigned mask = load_mask(c.mask + first, t, c.T, c.vector);
        load(c.log_probs + first, t, c.T, c.vector, log_prob);
        load(c.old_log_probs + first, t, c.T, c.vector, old);
        if (reads_advantages<Objective>) load(c.advantages + first, t, c.T, c.vector, advantage);
        const unsigned kept = kept_of(mask);
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const bool keep = kept >> k & 1;
            const float a = keep ? advantage[k] : 0.0f;
            sums.log_ratio += (double)Objective::log_ratio_of(keep ? log_prob[k] - old[k] : 0.0f, a, c.numbers);
            sums.advantage += (double)a;
        }
        sums.length += __popc(kept);
    }
    return sums;
}

// The kept tokens of a row, and the sums of an objective that has some, over what falls to member `me` of a team.
template <class Objective>
__device__ __forceinline__ auto visit_row(const Counting& c, int64_t row, int me, int team) {
    if constexpr (Objective::SEQUENCE)
        return sum_row<Objective>(c, row, me, team);
    else
        return count_kept(c.mask + row * c.T, c.T, me, team);
}

// Stores what a whole row came to, and counts it.
template <class Objective, class Found>
__device__ __forceinline__ void put_row(const Counting& c, int64_t row, const Found& found, Counts* mine) {
    int64_t length;
    if constexpr (Objective::SEQUENCE) {
        length = found.length;
        c.parts[row] = Objective::sequence_part(found, c.summed);
    } else {
        length = found;
    }
    c.lengths[row] = length;
    mine->tokens += length, mine->sequences += length > 0;
}

template <class Objective>
__global__ void __launch_bounds__(THREADS) count_kernel(const Counting c) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (blockIdx.x == 0)
        for (int64_t i = threadIdx.x; i <= c.groups; i += THREADS) c.done[i] = 0;
    if (!c.counts) return;
    Counts mine = {0, 0};
    if (!c.rows) {
        const int64_t N = c.B * c.T, share = ((N + gridDim.x - 1) / gridDim.x + 15) / 16 * 16;
        const int64_t begin = blockIdx.x * share, count = N - begin < share ? N - begin : share;
        if (count > 0) mine.tokens = count_kept(c.mask + begin, count, threadIdx.x, THREADS);
    } else if (c.T > (Objective::SEQUENCE ? LONG_SEQUENCE : LONG_ROW)) {
        for (int64_t b = blockIdx.x; b < c.B; b += gridDim.x) {
            const auto all = over_block<THREADS>(visit_row<Objective>(c, b, threadIdx.x, THREADS), Add());
            if (threadIdx.x == 0) put_row<Objective>(c, b, all, &mine);
        }
    } else {
        for (int64_t b = (int64_t)blockIdx.x * WARPS + warp; b < c.B; b += (int64_t)gridDim.x * WARPS) {
            const auto all = over_warp(visit_row<Objective>(c, b, lane, WARP), Add());
            if (lane == 0) put_row<Objective>(c, b, all, &mine);
        }
    }
    mine.tokens = over_block<THREADS>(mine.tokens, Add());
    mine.sequences = over_block<THREADS>(mine.sequences, Add());
    if (threadIdx.x == 0) c.of_blocks[blockIdx.x] = mine;
}

// Launches it; returns on how many blocks, each of which leaves its counts.
template <class Objective>
int64_t count(const Counting& c, void* stream) {
    const bool long_rows = c.T > (Objective::SEQUENCE ? LONG_SEQUENCE : LONG_ROW);
    const int64_t useful = c.rows ? (long_rows ? c.B : pieces_of(c.B, WARPS)) : pieces_of(c.B * c.T, THREADS * 16);
    const int64_t blocks = !c.counts || useful < 1 ? 1 : useful < COUNTING_BLOCKS ? useful : COUNTING_BLOCKS;
    launch(count_kernel<Objective>, blocks, THREADS, stream, c);
    return blocks;
}

// Weight of a token before its row's own length.
__device__ __forceinline__ double weight_of(const Share& share, const Counts& all, int64_t width) {
    if (share.aggregation == TOKEN_SUM) return 1.0;
    const int64_t found = share.by_rows() ? all.sequences : all.tokens;
    const double count = share.normalizer ? (double)*share.normalizer : found > 0 ? (double)found : 1.0;
    return 1.0 / count / (share.aggregation == SEQ_MEAN_TOKEN_SUM_NORM ? (double)width : 1.0);
}

struct Weights {
    double loss, entropy;
};

// Both of them, from the counts of `blocks` blocks; the first warp makes them for all. All threads must call.
__device__ __forceinline__ Weights weights_of(const Share& loss, const Share& entropy, int64_t width,
                                              const Counts* of_blocks, int64_t blocks) {
    __shared__ Weights weights;
    if (threadIdx.x < WARP) {
        Counts all = {0, 0};
        if (loss.counts() || entropy.counts())
            for (int64_t i = threadIdx.x; i < blocks; i += WARP)
                all.tokens += of_blocks[i].tokens, all.sequences += of_blocks[i].sequences;
        all.tokens = over_warp(all.tokens, Add()), all.sequences = over_warp(all.sequences, Add());
        if (threadIdx.x == 0) weights = {weight_of(loss, all, width), weight_of(entropy, all, width)};
    }
    __syncthreads();
    return weights;
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
