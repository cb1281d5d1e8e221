// Moments (csrc/include/advantages.h) of numbers that lie four to a thread: of a block, and of the blocks of a launch.
//
// A thread sums in double the distances from a number of its warp and their squares; blocks are merged in their order.
#pragma once
#include "advantages.h"
#include "four.h"
#include "launch.h"

namespace rk {
namespace RK_ISA {
namespace {

struct Sums {  // of x - shift and its square, lane by lane; shift is the first x that the warp met
    float shift = 0.0f;
    bool met = false;
    int count = 0;
    double sum = 0.0, squares = 0.0;

    __device__ __forceinline__ void add(const float* x, unsigned kept) {
        if (!met) {
            const unsigned with = __ballot_sync(WHOLE_WARP, kept != 0);
            float mine = 0.0f;
#pragma unroll
            for (int i = ITEMS - 1; i >= 0; --i) mine = kept >> i & 1 ? x[i] : mine;
            mine = __shfl_sync(WHOLE_WARP, mine, with ? __ffs((int)with) - 1 : 0);
            met = with != 0;
            shift = met ? mine : 0.0f;
        }
        count += __popc(kept);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const double gap = kept >> i & 1 ? (double)x[i] - (double)shift : 0.0;
            sum += gap;
            squares += gap * gap;
        }
    }
};

struct Three {
    double count, sum, squares;
};
__device__ __forceinline__ Three operator+(Three a, Three b) {
    return {a.count + b.count, a.sum + b.sum, a.squares + b.squares};
}

// The moments of a block's sums go to *to. All threads must call.
template <int Threads>
__device__ __forceinline__ void put_moments(const Sums& sums, Moments* to) {
    __shared__ Moments of_warp[Threads / WARP];
    const Three all = over_warp(Three{(double)sums.count, sums.sum, sums.squares}, Add());
    if (threadIdx.x % WARP == 0)
        of_warp[threadIdx.x / WARP] = moments_of(all.count, (double)sums.shift, all.sum, all.squares);
    __syncthreads();
    if (threadIdx.x != 0) return;
    Moments block = of_warp[0];
    for (int warp = 1; warp < Threads / WARP; ++warp) block = moments_merge(block, of_warp[warp]);
    *to = block;
}

// The moments of all blocks, in their order, go behind them. All threads of one block must call.
template <int Threads>
__device__ __forceinline__ void merge_moments(const Moments* moments, int64_t count, Moments* to) {
    const volatile double* from = (const volatile double*)moments;  // other blocks wrote it: past this block's cache
    Three all = {0.0, 0.0, 0.0};
    for (int64_t i = threadIdx.x; i < count; i += Threads)
        all = all + Three{from[3 * i], from[3 * i] * from[3 * i + 1], 0.0};
    all = over_block<Threads>(all, Add());
    const double mean = all.sum / (all.count > 0.0 ? all.count : 1.0);
    double m2 = 0.0;
    for (int64_t i = threadIdx.x; i < count; i += Threads) {
        const double gap = from[3 * i + 1] - mean;
        m2 += from[3 * i + 2] + from[3 * i] * gap * gap;
    }
    m2 = over_block<Threads>(m2, Add());
    if (threadIdx.x == 0) *to = {all.count, mean, m2};
}

// The block that comes here last merges.
template <int Threads>
__device__ __forceinline__ void finish_moments(Moments* moments, int* done) {
    __shared__ int before;
    if (threadIdx.x == 0) {
        __threadfence();
        before = atomicAdd(done, 1);
    }
    __syncthreads();
    if ((unsigned)before != gridDim.x - 1) return;
    __threadfence();
    merge_moments<Threads>(moments, gridDim.x, moments + gridDim.x);
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
