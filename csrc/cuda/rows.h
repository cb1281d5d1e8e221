// Rows of logits as logprobs and kl read and write them: words of up to 16 bytes where the addresses allow it.
//
// Which thread takes which entries for a row's statistics depends on the row's length alone, never on its address: a
// row has the same bits wherever it lies. Gradients have no such bond; their words begin where the memory is aligned.
#pragma once
#include <math.h>

#include "launch.h"

namespace rk {
namespace RK_ISA {

constexpr float INF = __builtin_inff();

template <int Bytes>
struct WordOf;
template <>
struct WordOf<8> {
    using type = uint2;
};
template <>
struct WordOf<16> {
    using type = uint4;
};

// E entries of a row as they lie in memory.
template <class S, int E>
struct Unit {
    using Word = typename WordOf<E*(int)sizeof(S)>::type;
    Word word;

    __device__ __forceinline__ float operator[](int i) const {
        S entries[E];
        memcpy(entries, &word, sizeof(entries));
        return as_float(entries[i]);
    }
    __device__ __forceinline__ void set(const float (&x)[E]) {
        S entries[E];
#pragma unroll
        for (int i = 0; i < E; ++i) entries[i] = from_float<S>(x[i]);
        memcpy(&word, entries, sizeof(entries));
    }
    __device__ __forceinline__ void load(const S* from) { word = *(const Word*)from; }
    __device__ __forceinline__ void store(S* to) const { *(Word*)to = word; }
};

__device__ __forceinline__ bool is_aligned(const void* address, int bytes) {
    return (uintptr_t)address % (unsigned)bytes == 0;
}

// The 16 bytes at an address that is a multiple of 2, out of the two aligned words that hold them.
__device__ __forceinline__ uint4 straddling(const void* from) {
    const uintptr_t address = (uintptr_t)from;
    const uint4* words = (const uint4*)(address - address % 16);
    const uint4 low = words[0], high = words[1];
    unsigned w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    if (address & 8)
        for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
    if (address & 4)
        for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
    if (address & 2)
        for (int i = 0; i < 4; ++i) w[i] = w[i] >> 16 | w[i + 1] << 16;
    return uint4{w[0], w[1], w[2], w[3]};
}

__device__ __forceinline__ void load_straddling(uint4& word, const void* from) { word = straddling(from); }
__device__ __forceinline__ void load_straddling(uint2&, const void*) {}

// E entries from `first` on; beyond the row's end they are -inf. Nothing outside the row is read.
template <int E, class S>
__device__ __forceinline__ Unit<S, E> load_unit(const S* row, int64_t V, int64_t first) {
    constexpr int bytes = E * (int)sizeof(S);
    Unit<S, E> unit;
    const S* from = row + first;
    if (first + E <= V && is_aligned(from, bytes)) {
        unit.load(from);
    } else if (bytes == 16 && first >= E && first + 2 * E <= V) {
        load_straddling(unit.word, from);
    } else {
        float x[E];
#pragma unroll
        for (int i = 0; i < E; ++i) x[i] = first + i < V ? as_float(from[i]) : -INF;
        unit.set(x);
    }
    return unit;
}

// A block's entries of a row, Count to a thread: units of E entries from `first` on, the k-th of thread t at
// k * blockDim + t. `first` is a multiple of E.
template <int E, int Count, class S>
__device__ __forceinline__ void read_part(const S* row, int64_t V, int64_t first, float (&x)[Count]) {
    const int threads = (int)blockDim.x, t = (int)threadIdx.x;
    Unit<S, E> units[Count / E];
    if (first + threads * Count <= V && is_aligned(row, E * (int)sizeof(S))) {
#pragma unroll
        for (int k = 0; k < Count / E; ++k) units[k].load(row + first + (k * threads + t) * E);
    } else {
#pragma unroll
        for (int k = 0; k < Count / E; ++k) units[k] = load_unit<E>(row, V, first + (k * threads + t) * E);
    }
#pragma unroll
    for (int k = 0; k < Count / E; ++k)
#pragma unroll
        for (int i = 0; i < E; ++i) x[k * E + i] = units[k][i];
}

// Units of E entries from `from` on, E * Threads apart; all of them are aligned and within the row.
template <int Threads, int Units, int E, class S>
__device__ __forceinline__ void load_units(const S* from, Unit<S, E> (&units)[Units]) {
#pragma unroll
    for (int k = 0; k < Units; ++k) units[k].load(from + k * Threads * E);
}

template <int Units, int E, int Count, class S>
__device__ __forceinline__ void entries_of(const Unit<S, E> (&units)[Units], float (&x)[Count]) {
    static_assert(Units * E == Count, "all of them");
#pragma unroll
    for (int k = 0; k < Units; ++k)
#pragma unroll
        for (int i = 0; i < E; ++i) x[k * E + i] = units[k][i];
}

// Threads that share the statistics of `count` entries, `each` to a thread at most.
inline int threads_for(int64_t count, int each, int most) {
    const int64_t warps = pieces_of(count, (int64_t)each * WARP);
    return warps * WARP < most ? (int)(warps < 1 ? 1 : warps) * WARP : most;
}

// A float of each thread of a block, laid out so that lane 4 w + j of a warp reads those of warp w's threads
// j, j + 4, ..., j + 28, one a step, and no two lanes of a step meet in a bank of shared memory.
template <int Threads>
struct PerThread {
    static_assert(Threads <= WARP * WARP / 4, "four lanes read a warp");
    float of[Threads / WARP * (WARP + 4)];

    __device__ __forceinline__ void put(float x) {
        of[threadIdx.x / WARP * (WARP + 4) + threadIdx.x % WARP] = x;
    }
    __device__ __forceinline__ float get(int step) const {
        const unsigned lane = threadIdx.x % WARP;
        return of[lane / 4 * (WARP + 4) + lane % 4 + 4 * step];
    }
};
constexpr int PER_THREAD_STEPS = WARP / 4;

// The sum over lanes 4 w to 4 w + 3, which each of them gets. All lanes must call, as for the next two.
__device__ __forceinline__ double over_four(double x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// How many lanes `have`, the first one not counted.
__device__ __forceinline__ double beyond_first(bool have) {
    const int count = __popc(__ballot_sync(WHOLE_WARP, have));
    return count > 1 ? (double)(count - 1) : 0.0;
}

// Of this thread's entries at the warp's maximum, those that are not the first one of the warp.
__device__ __forceinline__ float others_at_max(int count) {
    const int first = __ffs((int)__ballot_sync(WHOLE_WARP, count > 0)) - 1;
    return (float)((int)(threadIdx.x % WARP) == first ? count - 1 : count);
}

// The smaller of both; a NaN wins.
__device__ __forceinline__ float smaller_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float smaller;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(a), "f"(b));
    return smaller;
#else
    return a < b || a != a ? a : b;
#endif
}

struct Larger {  // a NaN loses: sums carry it
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

__device__ __forceinline__ float start_of(float max) { return max == -INF ? 0.0f : max; }

// Entries from the row's start to the first one whose address is that of an aligned unit, from 0 to E - 1.
template <int E, class S>
__device__ __forceinline__ int entries_to_boundary(const S* row) {
    constexpr unsigned bytes = E * sizeof(S);
    return (int)((bytes - (uintptr_t)row % bytes) % bytes / sizeof(S));
}

// Entries that a thread takes one at a time: first, first + blockDim, ... before end.
struct Singles {
    int64_t first, end;
};

// Those around a row's aligned units, which begin at `head`; a row's first piece takes them.
template <int E>
__device__ __forceinline__ Singles around_units(int64_t V, int head, int64_t piece) {
    const int t = (int)threadIdx.x;
    const int64_t tail = V > head ? V - (V - head) % E : V;
    if (piece != 0 || t >= 2 * E) return {0, 0};
    return t < E ? Singles{t, head < V ? head : V} : Singles{tail + t - E, V};
}

// All of a piece, where its addresses are not aligned together.
__device__ __forceinline__ Singles whole_piece(int64_t V, int64_t piece, int64_t size) {
    return {piece * size + threadIdx.x, (piece + 1) * size < V ? (piece + 1) * size : V};
}

}  // namespace RK_ISA
}  // namespace rk
