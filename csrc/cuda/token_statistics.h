// Log-probs, entropy and the extras of rows of logits; a part of logprobs.cu, whose parts of rows and launches these are.
#pragma once

namespace rk {
namespace RK_ISA {
namespace {

struct Whole {
    RowStats stats;
    RowExtras extras;
};

struct WholePart {
    Whole whole;
    double label_logit;  // z of the label, if it is in this part
};

struct Statistics {
    Forward forward;
    WholePart* partial;  // [N, parts], null for one part
    float *log_squares, *mean;
    uint8_t* top;
};

struct Earlier {
    __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const { return a < b ? a : b; }
};

constexpr int64_t NOWHERE = INT64_MAX;  // of no entry at a maximum

__device__ __forceinline__ Whole no_whole() { return {no_stats(), {0.0, 0.0, 0.0, NOWHERE}}; }

__device__ __forceinline__ Whole merge(const Whole& a, const Whole& b) {
    const RowStats stats = merge_stats(a.stats, b.stats);
    const RowExtras left = raise_max(a.extras, a.stats.max, stats.max), right = raise_max(b.extras, b.stats.max, stats.max);
    const double second = a.stats.max == b.stats.max && stats.max != -INF ? 1.0 : 0.0;
    const int64_t first = a.stats.max == stats.max ? left.first : NOWHERE;
    const int64_t other = b.stats.max == stats.max ? right.first : NOWHERE;
    return {stats, {left.squares + right.squares + second, left.total + right.total, left.count + right.count,
                    Earlier()(first, other)}};
}

// Those of all lanes of a warp, which every lane gets.
__device__ __forceinline__ Whole over_lanes(const Whole& own) {
    const RowStats stats = over_lanes(own.stats);
    const bool at_max = own.stats.max == stats.max && stats.max != -INF;
    const double squares = over_warp(raise_max(own.extras, own.stats.max, stats.max).squares, Add());
    return {stats, {squares + beyond_first(at_max), over_warp(own.extras.total, Add()), over_warp(own.extras.count, Add()),
                    over_warp(at_max ? own.extras.first : NOWHERE, Earlier())}};
}

__device__ __forceinline__ void put_whole(const Statistics& s, int64_t row, int64_t label, const WholePart& part) {
    const RowMore more = finish_extras(part.whole.stats, part.whole.extras);
    put_result(s.forward, row, finish_stats(part.whole.stats, part.label_logit));
    s.log_squares[row] = more.log_squares;
    s.mean[row] = more.mean;
    s.top[row] = label == part.whole.extras.first;
}

// As `settled` of a forward.
__device__ __forceinline__ bool settled(const Statistics& s, int64_t row, int64_t label, bool write) {
    if (!settled(s.forward, row, label, write)) return false;
    if (write) {
        s.log_squares[row] = s.mean[row] = s.forward.labels.ignored(label) ? 0.0f : __builtin_nanf("");
        s.top[row] = 0;
    }
    return true;
}

// What a warp's threads hold, each EACH entries in the order of read_part<E>.
template <int E>
__device__ __forceinline__ Whole of_warp(const float (&z)[EACH], int64_t part_start) {
    float max = -INF;
#pragma unroll
    for (int i = 0; i < EACH; ++i) max = fmaxf(max, z[i]);
    max = over_warp(max, Larger());
    const float start = start_of(max);
    float sum = 0.0f, weighted = 0.0f, squares = 0.0f, total = 0.0f;
    int top = 0, count = 0;
    int64_t first = NOWHERE;
#pragma unroll
    for (int i = EACH - 1; i >= 0; --i) {
        const float d = z[i] - start;
        const float e = d == 0.0f ? 0.0f : power_of_two(d * LOG2_E);
        const bool allowed = z[i] != -INF;
        const bool at_max = allowed && d == 0.0f;
        top += at_max;
        count += allowed;
        sum += e;
        squares += e * e;
        weighted += e * fmaxf(d, EXP_FLOOR);  // not 0 * -inf
        total += allowed ? z[i] : 0.0f;
        if (at_max) first = part_start + (i / E * (int)blockDim.x + (int)threadIdx.x) * E + i % E;
    }
    const double seconds = (double)others_at_max(top);
    return {{max, over_warp((double)sum + seconds, Add()), over_warp((double)weighted, Add())},
            {over_warp((double)squares + seconds, Add()), over_warp((double)total, Add()),
             over_warp((double)count, Add()), over_warp(first, Earlier())}};
}

template <Transform F, class S>
__global__ void __launch_bounds__(THREADS) token_statistics_kernel(Statistics s) {
    constexpr int E = 16 / (int)sizeof(S);
    __shared__ Whole of_warps[THREADS / WARP];
    const Forward& f = s.forward;
    const int64_t row = blockIdx.x / f.parts;
    const unsigned part = blockIdx.x % f.parts;
    const int64_t label = f.labels.of(row);
    if (settled(s, row, label, f.parts == 1 && threadIdx.x == 0)) return;

    const S* x = (const S*)f.logits + f.rows.at(row);
    const Scale scale = f.scales.of(row);
    float z[EACH];
    read_part<E>(x, f.labels.V, (int64_t)part * WHOLE_PART, z);
#pragma unroll
    for (int i = 0; i < EACH; ++i) z[i] = transform(F, z[i], scale);
    const Whole own = of_warp<E>(z, (int64_t)part * WHOLE_PART);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = own;
    __syncthreads();
    if (threadIdx.x >= WARP) return;
    const Whole whole = over_lanes(threadIdx.x < blockDim.x / WARP ? of_warps[threadIdx.x] : no_whole());
    if (threadIdx.x != 0) return;
    const float at_label = label / WHOLE_PART == part ? transform(F, as_float(x[label]), scale) : 0.0f;
    if (f.parts == 1)
        put_whole(s, row, label, {whole, (double)at_label});
    else
        s.partial[row * f.parts + part] = {whole, (double)at_label};
}

__global__ void __launch_bounds__(MERGE_THREADS) merge_statistics_kernel(Statistics s, int64_t N) {
    const int64_t row = (int64_t)blockIdx.x * (MERGE_THREADS / WARP) + threadIdx.x / WARP;
    const unsigned lane = threadIdx.x % WARP, parts = s.forward.parts;
    if (row >= N) return;
    const WholePart* partial = s.partial + row * parts;
    const int64_t label = s.forward.labels.of(row);
    if (settled(s, row, label, lane == 0)) return;
    Whole whole = no_whole();
    for (unsigned part = lane; part < parts; part += WARP) whole = merge(whole, partial[part].whole);
    whole = over_lanes(whole);
    if (lane == 0) put_whole(s, row, label, {whole, partial[label / WHOLE_PART].label_logit});
}

template <class S>
auto token_statistics_of(Transform f) {
    return f == PLAIN    ? token_statistics_kernel<PLAIN, S>
           : f == SCALED ? token_statistics_kernel<SCALED, S>
                         : token_statistics_kernel<CAPPED, S>;
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
