// Exact KL of pairs of rows of logits, the KL of samples (k1, k2 and k3: one thread a token), and their gradients.
//
// Both directions of the exact KL are one: side a is averaged over, side b is the other; they may differ in dtype. A
// block takes up to PART entries of both rows in turns of TURN of each thread (running.h), the next turn's on their way.
// Longer rows are cut into parts, and a second, small launch merges their statistics. Backward: a block takes PART
// entries, one read and one write of each side.
#include "kl.h"

#include "rows.h"
#include "running.h"

namespace rk {
namespace RK_ISA {

namespace {

constexpr int THREADS = 256;
constexpr int TURN = 16;                  // entries of each side that a thread takes at once
constexpr int PART = THREADS * TURN * 4;  // as in rlhf_kernels/cuda/kl.py
constexpr int MERGE_THREADS = 128;        // a warp merges a row's parts

// Entries that are read at a time: 16 bytes of the wider side.
template <class A, class B>
constexpr int TOGETHER = sizeof(A) == 4 || sizeof(B) == 4 ? 4 : 8;

struct Rows {
    const void *a, *b;
    Planes of_a, of_b;
    int64_t V;
};

struct Forward {
    Rows rows;
    double temperature;
    float scale;  // log2(e) / temperature
    unsigned parts;
    KlStats* partial;  // [N, parts], null for one part
    float *kl, *max_a, *log_sum_a, *max_b, *log_sum_b;
};

__device__ __forceinline__ void put_result(const Forward& f, int64_t row, KlStats stats) {
    const KlSide a = kl_side(stats.max_a, stats.rest_a), b = kl_side(stats.max_b, stats.rest_b);
    f.kl[row] = finish_kl(stats, f.scale);
    f.max_a[row] = a.max;
    f.log_sum_a[row] = a.log_sum;
    f.max_b[row] = b.max;
    f.log_sum_b[row] = b.log_sum;
}

struct AddGaps {  // an infinite one wins, also over NaN
    __device__ __forceinline__ double operator()(double a, double b) const {
        return a == (double)INF || b == (double)INF ? (double)INF : a + b;
    }
};

__device__ __forceinline__ KlStats merge_kl(KlStats a, KlStats b, float scale) {
    const float max_a = fmaxf(a.max_a, b.max_a), max_b = fmaxf(a.max_b, b.max_b);
    const double second_a = a.max_a == b.max_a && max_a != -INF, second_b = a.max_b == b.max_b && max_b != -INF;
    a = raise_kl_max(a, max_a, max_b, scale);
    b = raise_kl_max(b, max_a, max_b, scale);
    return {max_a, max_b, a.rest_a + b.rest_a + second_a, a.rest_b + b.rest_b + second_b, AddGaps()(a.gap, b.gap)};
}

// The statistics of all lanes of a warp, which every lane gets.
__device__ __forceinline__ KlStats over_lanes(KlStats own, float scale) {
    const float max_a = over_warp(own.max_a, Larger()), max_b = over_warp(own.max_b, Larger());
    const double seconds_a = beyond_first(own.max_a == max_a && max_a != -INF);
    const double seconds_b = beyond_first(own.max_b == max_b && max_b != -INF);
    own = raise_kl_max(own, max_a, max_b, scale);
    return {max_a, max_b, over_warp(own.rest_a, Add()) + seconds_a, over_warp(own.rest_b, Add()) + seconds_b,
            over_warp(own.gap, AddGaps())};
}

// A thread's share of the entries [first, end), end being that of the part or of the row.
template <class A, class B>
__device__ __forceinline__ RunningPair fold_part(const A* a, const B* b, int64_t V, int64_t first, int64_t end,
                                                 float factor) {
    constexpr int E = TOGETHER<A, B>, UNITS = TURN / E, STEP = THREADS * TURN;
    const int step = (int)blockDim.x * TURN;
    RunningPair running;
    if (is_aligned(a, E * (int)sizeof(A)) && is_aligned(b, E * (int)sizeof(B)) && step == STEP) {
        const A* from_a = a + first + threadIdx.x * E;
        const B* from_b = b + first + threadIdx.x * E;
        int turns = (int)((end - first) / STEP);
        first += (int64_t)turns * STEP;
        Unit<A, E> units_a[UNITS];
        Unit<B, E> units_b[UNITS];
        if (turns > 0) load_units<THREADS>(from_a, units_a), load_units<THREADS>(from_b, units_b);
#pragma unroll 1
        for (; turns > 0; --turns) {
            float x_a[TURN], x_b[TURN];
            entries_of(units_a, x_a);
            entries_of(units_b, x_b);
            from_a += STEP, from_b += STEP;
            if (turns > 1) load_units<THREADS>(from_a, units_a), load_units<THREADS>(from_b, units_b);
            running.fold(x_a, x_b, factor);
        }
    }
#pragma unroll 1
    for (; first < end; first += step) {
        float x_a[TURN], x_b[TURN];
        read_part<E>(a, V, first, x_a);
        read_part<E>(b, V, first, x_b);
        running.fold(x_a, x_b, factor);
    }
    return running;
}

template <class A, class B>
__global__ void __launch_bounds__(THREADS) kl_fwd_kernel(Forward f) {
    __shared__ PerThread<THREADS> sums_a, sums_b, gaps;
    __shared__ float maxima_a[THREADS / WARP], maxima_b[THREADS / WARP];
    const int64_t row = blockIdx.x / f.parts, V = f.rows.V;
    const unsigned part = blockIdx.x % f.parts;
    const int64_t first = (int64_t)part * PART, end = first + PART < V ? first + PART : V;
    const A* a = (const A*)f.rows.a + f.rows.of_a.at(row);
    const B* b = (const B*)f.rows.b + f.rows.of_b.at(row);
    RunningPair own = fold_part(a, b, V, first, end, f.scale);
    own.share_max(f.scale);
    const float max_a = own.max_a, max_b = own.max_b;
    sums_a.put(own.rest_a);
    sums_b.put(own.rest_b);
    gaps.put(own.gap);
    if (threadIdx.x % WARP == 0) {
        maxima_a[threadIdx.x / WARP] = max_a;
        maxima_b[threadIdx.x / WARP] = max_b;
    }
    __syncthreads();
    if (threadIdx.x >= WARP) return;

    KlStats stats = no_kl_stats();
    if (threadIdx.x * PER_THREAD_STEPS < blockDim.x) {
        stats.max_a = maxima_a[threadIdx.x / 4];
        stats.max_b = maxima_b[threadIdx.x / 4];
#pragma unroll
        for (int step = 0; step < PER_THREAD_STEPS; ++step) {
            stats.rest_a += (double)sums_a.get(step);
            stats.rest_b += (double)sums_b.get(step);
            stats.gap = AddGaps()(stats.gap, (double)gaps.get(step));
        }
    }
    stats.rest_a = over_four(stats.rest_a);
    stats.rest_b = over_four(stats.rest_b);
    stats.gap = AddGaps()(stats.gap, shuffle_xor(stats.gap, 1));
    stats.gap = AddGaps()(stats.gap, shuffle_xor(stats.gap, 2));
    stats = over_lanes(threadIdx.x % 4 == 0 ? stats : no_kl_stats(), f.scale);
    if (threadIdx.x != 0) return;
    if (f.parts == 1)
        put_result(f, row, stats);
    else
        f.partial[row * f.parts + part] = stats;
}

__global__ void __launch_bounds__(MERGE_THREADS) kl_merge_kernel(Forward f, int64_t N) {
    const int64_t row = (int64_t)blockIdx.x * (MERGE_THREADS / WARP) + threadIdx.x / WARP;
    const unsigned lane = threadIdx.x % WARP;
    if (row >= N) return;
    KlStats stats = no_kl_stats();
    for (unsigned part = lane; part < f.parts; part += WARP)
        stats = merge_kl(stats, f.partial[row * f.parts + part], f.scale);
    stats = over_lanes(stats, f.scale);
    if (lane == 0) put_result(f, row, stats);
}

struct Backward {
    Rows rows;
    const float *grad, *kl, *max_a, *log_sum_a, *max_b, *log_sum_b;
    double temperature;
    unsigned pieces;
    void *grad_a, *grad_b;  // [N, V] dense; null: not wanted
};

// What the entries of a row have in common, and their gradients.
struct RowGradient {
    KlLine a, b;
    float kl, upstream;
    bool none;  // the row gets no gradient

    struct Slopes {
        float a, b;
    };
    // Of entries that are not both likely.
    __device__ __forceinline__ Slopes of(float x_a, float x_b) const {
        const float l_a = a(x_a), l_b = b(x_b), p_a = power_of_two(l_a * LOG2_E), p_b = power_of_two(l_b * LOG2_E);
        return {upstream * kl_slope_a(p_a, l_a, l_b, kl), upstream * (p_b - p_a)};
    }
    // Both above a half, which one entry of a row may be.
    __device__ __forceinline__ bool likely(float x_a, float x_b) const {
        return a(x_a) > KL_LOG_HALF && b(x_b) > KL_LOG_HALF;
    }
    __device__ __forceinline__ float likely_b(float x_a, float x_b) const {
        return upstream * kl_likely_slope_b(a(x_a), b(x_b));
    }
};

// The gradients of as many entries of both sides.
template <int Count>
__device__ __forceinline__ void slopes_of(const RowGradient& r, const float (&a)[Count], const float (&b)[Count],
                                          float (&d_a)[Count], float (&d_b)[Count]) {
    float most = -INF;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        const RowGradient::Slopes d = r.of(a[i], b[i]);
        d_a[i] = d.a;
        d_b[i] = d.b;
        most = fmaxf(most, a[i]);
    }
    if (!(r.a(most) > KL_LOG_HALF)) return;
#pragma unroll
    for (int i = 0; i < Count; ++i)
        if (r.likely(a[i], b[i])) d_b[i] = r.likely_b(a[i], b[i]);
}

__device__ __forceinline__ RowGradient row_gradient(const Backward& j, int64_t row) {
    RowGradient r;
    r.kl = j.kl[row];
    r.a = kl_line({j.max_a[row], j.log_sum_a[row]}, j.temperature);
    r.b = kl_line({j.max_b[row], j.log_sum_b[row]}, j.temperature);
    r.upstream = j.grad[row] * r.a.scale;
    r.none = r.kl == INF || (j.max_a[row] == -INF && r.kl == r.kl);
    return r;
}

template <class A, class B>
__global__ void __launch_bounds__(THREADS) kl_bwd_kernel(Backward j) {
    constexpr int E = TOGETHER<A, B>;
    const int threads = (int)blockDim.x, step = threads * E;
    const int64_t row = blockIdx.x / j.pieces, V = j.rows.V;
    const int64_t piece = blockIdx.x % j.pieces;
    const A* a = (const A*)j.rows.a + j.rows.of_a.at(row);
    const B* b = (const B*)j.rows.b + j.rows.of_b.at(row);
    A* grad_a = (A*)j.grad_a + row * V;
    B* grad_b = (B*)j.grad_b + row * V;
    const int head = entries_to_boundary<E>(a);
    const bool aligned = head == entries_to_boundary<E>(b) && (!j.grad_a || head == entries_to_boundary<E>(grad_a)) &&
                         (!j.grad_b || head == entries_to_boundary<E>(grad_b));
    const int64_t first = head + piece * PART + threadIdx.x * E, rest = V - first;
    const int left = !aligned || rest < E ? 0 : rest < PART ? (int)rest : PART;
    Unit<A, E> next_a;
    Unit<B, E> next_b;
    if (left > 0) {  // on their way while one thread works out what the row has in common
        next_a.load(a + first);
        next_b.load(b + first);
    }
    __shared__ RowGradient shared;
    if (threadIdx.x == 0) shared = row_gradient(j, row);
    __syncthreads();
    const RowGradient r = shared;
    if (r.none) {
        const int64_t begin = piece * PART, end = begin + PART < V ? begin + PART : V;
        for (int64_t i = begin + threadIdx.x; i < end; i += threads) {
            if (j.grad_a) grad_a[i] = from_float<A>(0.0f);
            if (j.grad_b) grad_b[i] = from_float<B>(0.0f);
        }
        return;
    }
#pragma unroll 1
    for (int at = 0; at + E <= left; at += step) {
        Unit<A, E> unit_a = next_a;
        Unit<B, E> unit_b = next_b;
        if (at + step + E <= left) {
            next_a.load(a + first + at + step);
            next_b.load(b + first + at + step);
        }
        float x_a[E], x_b[E], d_a[E], d_b[E];
#pragma unroll
        for (int i = 0; i < E; ++i) x_a[i] = unit_a[i], x_b[i] = unit_b[i];
        slopes_of(r, x_a, x_b, d_a, d_b);
        unit_a.set(d_a);
        unit_b.set(d_b);
        if (j.grad_a) unit_a.store(grad_a + first + at);
        if (j.grad_b) unit_b.store(grad_b + first + at);
    }
    const Singles singles = aligned ? around_units<E>(V, head, piece) : whole_piece(V, piece, PART);
#pragma unroll 1
    for (int64_t i = singles.first; i < singles.end; i += threads) {
        float d_a[1], d_b[1];
        slopes_of<1>(r, {as_float(a[i])}, {as_float(b[i])}, d_a, d_b);
        if (j.grad_a) grad_a[i] = from_float<A>(d_a[0]);
        if (j.grad_b) grad_b[i] = from_float<B>(d_b[0]);
    }
}

template <class A>
auto kl_fwd_of(int64_t dtype_b) {
    return dtype_b == F32    ? kl_fwd_kernel<A, float>
           : dtype_b == BF16 ? kl_fwd_kernel<A, __nv_bfloat16>
                             : kl_fwd_kernel<A, __half>;
}

template <class A>
auto kl_bwd_of(int64_t dtype_b) {
    return dtype_b == F32    ? kl_bwd_kernel<A, float>
           : dtype_b == BF16 ? kl_bwd_kernel<A, __nv_bfloat16>
                             : kl_bwd_kernel<A, __half>;
}

__device__ __forceinline__ float estimate(int64_t estimator, float d) {
    return estimator == KL_K1   ? kl_estimate<KL_K1>(d)
           : estimator == KL_K2 ? kl_estimate<KL_K2>(d)
                                : kl_estimate<KL_K3>(d);
}

__device__ __forceinline__ float gradient(int64_t estimator, float upstream, float d) {
    return estimator == KL_K1   ? kl_estimate_grad<KL_K1>(upstream, d)
           : estimator == KL_K2 ? kl_estimate_grad<KL_K2>(upstream, d)
                                : kl_estimate_grad<KL_K3>(upstream, d);
}

struct Pair {
    const void *p, *q;
    int64_t dtype_p, stride_p, dtype_q, stride_q, columns, count, estimator;

    __device__ __forceinline__ float log_ratio_at(int64_t i) const {
        const int64_t row = i / columns, column = i % columns;
        return log_ratio(entry(p, dtype_p, row * stride_p + column), entry(q, dtype_q, row * stride_q + column));
    }
};

__global__ void __launch_bounds__(THREADS) approx_kl_fwd_kernel(Pair j, float* kl) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < j.count) kl[i] = estimate(j.estimator, j.log_ratio_at(i));
}

__global__ void __launch_bounds__(THREADS)
    approx_kl_bwd_kernel(Pair j, const float* grad, int64_t grad_stride, void* grad_p, void* grad_q) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= j.count) return;
    const float upstream = grad[i / j.columns * grad_stride + i % j.columns];
    const float g = gradient(j.estimator, upstream, j.log_ratio_at(i));
    if (grad_p) put_entry(grad_p, j.dtype_p, i, g);
    if (grad_q) put_entry(grad_q, j.dtype_q, i, -g);
}

}  // namespace

// a: the side that is averaged over. `partial`: 32 bytes for each of the N * ceil(V / PART) parts; not used if a row is
// one part.
void kl_fwd(const void* a, int64_t dtype_a, int64_t T, int64_t batch_a, int64_t stride_a, const void* b,
            int64_t dtype_b, int64_t batch_b, int64_t stride_b, int64_t N, int64_t V, double temperature,
            void* partial, float* kl, float* max_a, float* log_sum_a, float* max_b, float* log_sum_b, void* stream) {
    const int64_t parts = pieces_of(V, PART);
    const Forward f = {{a, b, {T, batch_a, stride_a}, {T, batch_b, stride_b}, V}, temperature,
                       (float)(1.4426950408889634 / temperature), (unsigned)parts, (KlStats*)partial, kl, max_a,
                       log_sum_a, max_b, log_sum_b};
    const auto kernel = dtype_a == F32    ? kl_fwd_of<float>(dtype_b)
                        : dtype_a == BF16 ? kl_fwd_of<__nv_bfloat16>(dtype_b)
                                          : kl_fwd_of<__half>(dtype_b);
    launch(kernel, N * parts, threads_for(V, TURN, THREADS), stream, f);
    if (parts > 1) launch(kl_merge_kernel, pieces_of(N, MERGE_THREADS / WARP), MERGE_THREADS, stream, f, N);
}

// A gradient that is not wanted is null.
void kl_bwd(const float* grad, const void* a, int64_t dtype_a, int64_t T, int64_t batch_a, int64_t stride_a,
            const void* b, int64_t dtype_b, int64_t batch_b, int64_t stride_b, const float* kl, const float* max_a,
            const float* log_sum_a, const float* max_b, const float* log_sum_b, int64_t N, int64_t V,
            double temperature, void* grad_a, void* grad_b, void* stream) {
    const int64_t pieces = pieces_of(V, PART);
    const Backward j = {{a, b, {T, batch_a, stride_a}, {T, batch_b, stride_b}, V}, grad, kl, max_a, log_sum_a, max_b,
                        log_sum_b, temperature, (unsigned)pieces, grad_a, grad_b};
    const auto kernel = dtype_a == F32    ? kl_bwd_of<float>(dtype_b)
                        : dtype_a == BF16 ? kl_bwd_of<__nv_bfloat16>(dtype_b)
                                          : kl_bwd_of<__half>(dtype_b);
    launch(kernel, N * pieces, threads_for(V, TURN, THREADS), stream, j);
}

void approx_kl_fwd(const void* p, int64_t dtype_p, int64_t stride_p, const void* q, int64_t dtype_q, int64_t stride_q,
                   int64_t rows, int64_t columns, int64_t estimator, float* kl, void* stream) {
    const Pair j = {p, q, dtype_p, stride_p, dtype_q, stride_q, columns, rows * columns, estimator};
    launch(approx_kl_fwd_kernel, pieces_of(j.count, THREADS), THREADS, stream, j, kl);
}

void approx_kl_bwd(const float* grad, int64_t grad_stride, const void* p, int64_t dtype_p, int64_t stride_p,
                   const void* q, int64_t dtype_q, int64_t stride_q, int64_t rows, int64_t columns, int64_t estimator,
                   void* grad_p, void* grad_q, void* stream) {
    const Pair j = {p, q, dtype_p, stride_p, dtype_q, stride_q, columns, rows * columns, estimator};
    launch(approx_kl_bwd_kernel, pieces_of(j.count, THREADS), THREADS, stream, j, grad, grad_stride, grad_p, grad_q);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(kl_fwd);
RK_REGISTER(kl_bwd);
RK_REGISTER(approx_kl_fwd);
RK_REGISTER(approx_kl_bwd);
