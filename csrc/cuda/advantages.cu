// GAE, KL-shaped rewards and whitening over the rows (responses) of a batch.
//
// A row is cut, from its start on, into tiles. A lane owns 4 tokens, a warp 128, a tile has 8 warps. What tokens hand
// to the token before them is one number, gamma V + gamma lam A of the first of them, and what came after them enters
// it by a product and a sum: a GaePart. Parts are scanned over a warp, over the warps of a tile, and then joined over
// the tiles of the row from its end. So a row has the same bits whether one block walks it or each tile has a block,
// and wherever its padding ends.
#include "advantage_tokens.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int WHITEN_TOKENS = 4 * TILE;  // of a block; as in rlhf_kernels/cuda/advantages.py

// A block walks a row from its end. With fewer than THREADS threads a row has at most Threads * ITEMS tokens.
template <bool Shape, int Threads>
__global__ void __launch_bounds__(Threads, (!Shape ? 1024 : Threads == THREADS ? 512 : 768) / Threads)
    rows_kernel(const Job j) {
    constexpr int64_t STEP = Threads * ITEMS;
    __shared__ Warps<Threads> warps[2];
    const Row r = row_of<Shape>(j, blockIdx.x);
    const FullWarp full = full_warp(j.decay);
    int64_t t = (r.length > 0 ? (r.length - 1) / STEP * STEP : -STEP) + threadIdx.x * ITEMS;
    double behind = r.behind;
    bool last = true;
    Sums sums;
    Tokens<Shape> next = {};
    if (t >= 0) next = tokens_at<Shape>(r, t);
    for (int turn = 0; t >= 0; t -= STEP, turn ^= 1) {
        Tokens<Shape> x = next;
        if (Threads == THREADS && t >= STEP) next = tokens_at<Shape>(r, t - STEP);
        const Lane lane = lane_of<Shape>(j, x, full);
        const Tile tile = tile_of(warps[turn], lane);
        put_tokens<Shape, Threads>(j, r, t, x, lane, tile, behind, last, sums);
        behind = gae_join(tile.whole, behind);
        last = last && tile.with == 0;
        if (Threads < THREADS) break;
    }
    if (!Shape || !j.moments) return;
    put_moments<Threads>(sums, j.moments + blockIdx.x);
    finish_moments<Threads>(j.moments, j.control + DONE);
}

// The row whose units include this one; every warp finds it for itself.
__device__ __forceinline__ int64_t row_of_unit(const Job& j, int64_t unit) {
    if (!j.cu) return unit / j.first_unit(1);
    int64_t low = 0, high = j.B;
    while (high - low > 1) {
        const int64_t step = (high - low + WARP - 1) / WARP, row = low + step * (threadIdx.x % WARP + 1);
        const int below = __popc(__ballot_sync(WHOLE_WARP, row < high && j.first_unit(row) <= unit));
        low += step * below;
        high = low + step < high ? low + step : high;
    }
    return low;
}

// A block takes a tile, publishes its part, and waits for those of the row's later tiles. Tiles are handed out from the
// last to the first, and a block publishes before it waits: whatever is waited for has begun, and will come.
template <bool Shape>
__global__ void __launch_bounds__(THREADS) tiles_kernel(const Job j) {
    __shared__ Warps<THREADS> warps;
    __shared__ GaePart staged[THREADS];
    __shared__ int states[THREADS], ticket;
    if (threadIdx.x == 0) ticket = atomicAdd(j.control + TICKET, 1);
    __syncthreads();
    const int64_t unit = j.units - 1 - ticket, b = row_of_unit(j, unit);
    const Row r = row_of<Shape>(j, b);
    const int64_t first = j.first_unit(b), tile_begin = unit < first ? r.length : (unit - first) * TILE;
    const int64_t t = tile_begin + threadIdx.x * ITEMS;  // before its row's first only with wrong offsets
    Tokens<Shape> x = tokens_at<Shape>(r, t);
    const Lane lane = lane_of<Shape>(j, x, full_warp(j.decay));
    const Tile tile = tile_of(warps, lane);
    volatile int* published = j.control + PUBLISHED;
    if (threadIdx.x == 0) {
        j.parts[unit] = tile.whole;
        __threadfence();
        published[unit] = tile.with ? SOME_KEPT : NONE_KEPT;
    }
    double behind = r.behind;
    bool last = true;
    const volatile double* parts = (const volatile double*)j.parts;  // past this block's cache
    int64_t end = first + (r.length + TILE - 1) / TILE;
    end = end < j.units ? end : j.units;  // with wrong offsets too, nobody waits for a unit that there is not
    while (end > unit + 1) {
        const int64_t begin = end - THREADS > unit + 1 ? end - THREADS : unit + 1, other = begin + threadIdx.x;
        if (other < end) {
            int state = NOT_YET;
            while (state == NOT_YET) state = published[other];
            __threadfence();
            staged[threadIdx.x] = {parts[2 * other], parts[2 * other + 1]};
            states[threadIdx.x] = state;
        }
        __syncthreads();
        for (int i = (int)(end - begin) - 1; i >= 0; --i) {
            behind = gae_join(staged[i], behind);
            last = last && states[i] == NONE_KEPT;
        }
        __syncthreads();
        end = begin;
    }
    Sums sums;
    put_tokens<Shape, THREADS>(j, r, t, x, lane, tile, behind, last, sums);
    if (!Shape || !j.moments) return;
    put_moments<THREADS>(sums, j.moments + blockIdx.x);
    finish_moments<THREADS>(j.moments, j.control + DONE);
}

struct Flat {  // [rows, columns], one entry after the other
    const float* x;
    int64_t x_stride;
    const uint8_t* mask;
    int64_t mask_stride, columns, count;
    bool vector;  // four entries may be read at once

    // Entries i to i + 3, and their mask.
    __device__ __forceinline__ unsigned load4(int64_t i, float* to) const {
        if (columns == count || (vector && i < count)) {
            const int64_t row = columns == count ? 0 : i / columns, column = i - row * columns;
            load(x + row * x_stride, column, columns, vector, to);
            return load_mask(mask ? mask + row * mask_stride : nullptr, column, columns, vector);
        }
        unsigned bytes = 0;
        for (int k = 0; k < ITEMS; ++k) {
            const int64_t row = (i + k) / columns, column = i + k - row * columns;
            const bool keep = i + k < count && (!mask || mask[row * mask_stride + column]);
            to[k] = keep ? x[row * x_stride + column] : 0.0f;
            bytes |= keep ? 1u << (8 * k) : 0u;
        }
        return bytes;
    }
};

Flat flat(const float* x, int64_t x_stride, const uint8_t* mask, int64_t mask_stride, int64_t rows, int64_t columns) {
    Flat f = {x, x_stride, mask, mask_stride, columns, rows * columns, false};
    if (rows == 1 || (x_stride == columns && (!mask || mask_stride == columns))) f.columns = f.count;
    f.vector = aligned(x, 16) && aligned(mask, ITEMS);
    if (f.columns != f.count) f.vector = f.vector && x_stride % 4 == 0 && mask_stride % 4 == 0 && columns % 4 == 0;
    return f;
}

__global__ void __launch_bounds__(THREADS) whiten_stats_kernel(Flat f, Moments* blocks) {
    const int64_t begin = (int64_t)blockIdx.x * WHITEN_TOKENS + threadIdx.x * ITEMS;
    float x[WHITEN_TOKENS / TILE][ITEMS];
    unsigned mask[WHITEN_TOKENS / TILE];
#pragma unroll
    for (int k = 0; k < WHITEN_TOKENS / TILE; ++k) mask[k] = f.load4(begin + k * TILE, x[k]);
    Sums sums;
#pragma unroll
    for (int k = 0; k < WHITEN_TOKENS / TILE; ++k) sums.add(x[k], kept_of(mask[k]));
    put_moments<THREADS>(sums, blocks + blockIdx.x);
}

__global__ void __launch_bounds__(THREADS) merge_kernel(const Moments* blocks, int64_t count, Moments* stats) {
    merge_moments<THREADS>(blocks, count, stats);
}

// f.x and `out` may be the same.
__global__ void __launch_bounds__(THREADS) whiten_kernel(Flat f, const Moments* stats, int64_t center, float* out) {
    const int64_t begin = (int64_t)blockIdx.x * WHITEN_TOKENS + threadIdx.x * ITEMS;
    float x[WHITEN_TOKENS / TILE][ITEMS];
    unsigned mask[WHITEN_TOKENS / TILE];
#pragma unroll
    for (int k = 0; k < WHITEN_TOKENS / TILE; ++k) mask[k] = f.load4(begin + k * TILE, x[k]);
    const Whitening w = whitening_of(*stats, center != 0);
#pragma unroll
    for (int k = 0; k < WHITEN_TOKENS / TILE; ++k) {
        const int64_t i = begin + k * TILE;
        const unsigned kept = kept_of(mask[k]);
#pragma unroll
        for (int n = 0; n < ITEMS; ++n) x[k][n] = kept >> n & 1 ? whiten(x[k][n], w) : 0.0f;
        store(out, i, f.count, aligned(out, 16), x[k]);
    }
}

template <bool Shape>
void run(Job j, void* stream) {
    const int64_t most = j.cu ? TILE : j.T;  // tokens of a row
    if (j.units || j.moments)
        (void)cudaMemsetAsync(j.control, 0, (size_t)(PUBLISHED + j.units) * sizeof(int), (cudaStream_t)stream);
    if (j.units)
        launch(tiles_kernel<Shape>, j.units, THREADS, stream, j);
    else if (most <= 32 * ITEMS)
        launch(rows_kernel<Shape, 32>, j.B, 32, stream, j);
    else if (most <= 64 * ITEMS)
        launch(rows_kernel<Shape, 64>, j.B, 64, stream, j);
    else if (most <= 128 * ITEMS)
        launch(rows_kernel<Shape, 128>, j.B, 128, stream, j);
    else
        launch(rows_kernel<Shape, THREADS>, j.B, THREADS, stream, j);
}

}  // namespace

// `units`, `control` and `parts` as in struct Job.
void gae_fwd_f32(const float* rewards, int64_t rewards_stride, const float* values, int64_t values_stride,
                 const uint8_t* mask, int64_t mask_stride, const float* last_values, const void* cu, int64_t cu_wide,
                 int64_t B, int64_t T, int64_t count, double gamma, double lam, int64_t units, double* parts,
                 int* control, float* advantages, float* returns, void* stream) {
    Job j = {};
    j.rewards = rewards, j.rewards_stride = rewards_stride;
    j.values = values, j.values_stride = values_stride;
    j.mask = mask, j.mask_stride = mask_stride;
    j.last_values = last_values;
    j.cu = cu, j.cu_wide = cu_wide, j.B = B, j.T = T, j.count = count;
    j.gamma = gamma, j.decay = gamma * lam;
    j.units = units, j.parts = (GaePart*)parts, j.control = control;
    j.out[ADVANTAGES] = advantages, j.out[RETURNS] = returns;
    run<false>(j, stream);
}

// `moments`, if the advantages are to be whitened: [blocks + 1, 3], a block being a unit or, without units, a row.
void rlhf_advantages_fwd_f32(const float* scores, const float* log_probs, int64_t log_probs_stride, const float* ref,
                             int64_t ref_stride, const float* values, int64_t values_stride, const uint8_t* mask,
                             int64_t mask_stride, const void* cu, int64_t cu_wide, int64_t B, int64_t T,
                             int64_t count, double kl_coef, double gamma, double lam,
                             int64_t kl_estimator, double reward_clip, int64_t units, double* parts, int* control,
                             double* moments, float* advantages, float* returns, float* rewards, float* kl,
                             void* stream) {
    Job j = {};
    j.scores = scores;
    j.log_probs = log_probs, j.log_probs_stride = log_probs_stride;
    j.ref = ref, j.ref_stride = ref_stride;
    j.values = values, j.values_stride = values_stride;
    j.mask = mask, j.mask_stride = mask_stride;
    j.cu = cu, j.cu_wide = cu_wide, j.B = B, j.T = T, j.count = count;
    j.gamma = gamma, j.decay = gamma * lam;
    j.kl_coef = (float)kl_coef, j.clip = (float)reward_clip, j.kl_estimator = kl_estimator;
    j.units = units, j.parts = (GaePart*)parts, j.control = control, j.moments = (Moments*)moments;
    j.out[ADVANTAGES] = advantages, j.out[RETURNS] = returns, j.out[REWARDS] = rewards, j.out[KL] = kl;
    run<true>(j, stream);
    if (!moments) return;
    const Flat f = cu ? flat(advantages, 0, mask, 0, 1, count) : flat(advantages, T, mask, mask_stride, B, T);
    const Moments* all = j.moments + (units ? units : B);
    launch(whiten_kernel, pieces_of(count, WHITEN_TOKENS), THREADS, stream, f, all, 1, advantages);
}

// `blocks`: [ceil(rows * columns / WHITEN_TOKENS), 3].
void whiten_stats_f32(const float* x, int64_t x_stride, const uint8_t* mask, int64_t mask_stride, int64_t rows,
                      int64_t columns, double* blocks, double* stats, void* stream) {
    const Flat f = flat(x, x_stride, mask, mask_stride, rows, columns);
    const int64_t count = pieces_of(f.count, WHITEN_TOKENS);
    launch(whiten_stats_kernel, count, THREADS, stream, f, (Moments*)blocks);
    launch(merge_kernel, 1, THREADS, stream, (const Moments*)blocks, count, (Moments*)stats);
}

void whiten_fwd_f32(const float* x, int64_t x_stride, const uint8_t* mask, int64_t mask_stride, int64_t rows,
                    int64_t columns, const double* stats, int64_t center, float* out, void* stream) {
    const Flat f = flat(x, x_stride, mask, mask_stride, rows, columns);
    launch(whiten_kernel, pieces_of(f.count, WHITEN_TOKENS), THREADS, stream, f, (const Moments*)stats, center, out);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(gae_fwd_f32);
RK_REGISTER(rlhf_advantages_fwd_f32);
RK_REGISTER(whiten_stats_f32);
RK_REGISTER(whiten_fwd_f32);
