// Log-probs and entropy of rows of logits, and their gradient.
//
// Forward: a block takes up to PART entries of a row, so that a thread holds its own in registers between the maximum
// and the exps. Longer rows are cut into parts, and a second, small launch merges their statistics. Backward: a block
// takes PIECE entries of a row, one read and one write.
#include "logprobs.h"

#include "rows.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int THREADS = 256;
constexpr int EACH = 32;                 // entries of a thread
constexpr int PART = THREADS * EACH;     // as in rlhf_kernels/cuda/logprobs.py
constexpr int PIECE = THREADS * EACH;
constexpr int MERGE_THREADS = 128;       // a warp merges a row's parts
constexpr float LOG2_E = 1.44269504f;

struct Scale {  // z = x * scale, or softcap * tanh(x / softcap) * scale if softcap > 0
    float scale, softcap, inverse_softcap;
};

Scale make_scale(double temperature, double softcap) {
    return {(float)(1.0 / temperature), (float)softcap, softcap > 0.0 ? (float)(1.0 / softcap) : 0.0f};
}

enum Transform { PLAIN, SCALED, CAPPED };

// z is rounded before anything is subtracted from it: a fused x * scale - max would leave the product's rounding error,
// which is large where the logits are.
__device__ __forceinline__ float transform(Transform f, float x, Scale s) {
    if (f == CAPPED) return __fmul_rn(cap(x, s.inverse_softcap, s.softcap, 1.0f).z, s.scale);
    return f == SCALED ? __fmul_rn(x, s.scale) : x;
}

struct Labels {
    const int64_t* labels;  // null: entropy alone
    int64_t V, ignore_index;

    __device__ __forceinline__ int64_t of(int64_t row) const { return labels ? labels[row] : 0; }
    __device__ __forceinline__ bool ignored(int64_t label) const { return labels && label == ignore_index; }
    __device__ __forceinline__ bool outside(int64_t label) const { return labels && (label < 0 || label >= V); }
};

struct Part {
    RowStats stats;
    double label_logit;  // z of the label, if it is in this part
};

struct Scales {  // of rows, which share `common` if `temperatures` is null
    const float* temperatures;
    Scale common;

    __device__ __forceinline__ Scale of(int64_t row) const {
        if (!temperatures) return common;
        return {1.0f / temperatures[row], common.softcap, common.inverse_softcap};
    }
};

Transform transform_of(Scales s) {
    return s.common.softcap > 0.0f ? CAPPED : !s.temperatures && s.common.scale == 1.0f ? PLAIN : SCALED;
}

struct Forward {
    const void* logits;
    Planes rows;
    Labels labels;
    Scales scales;
    unsigned parts;
    Part* partial;  // [N, parts], null for one part
    float *logprobs, *entropy, *max, *log_sum;  // entropy null: not asked for
};

__device__ __forceinline__ void put_result(const Forward& f, int64_t row, RowResult result) {
    if (f.labels.labels) f.logprobs[row] = result.logprob;
    if (f.entropy) f.entropy[row] = result.entropy;
    f.max[row] = result.max;
    f.log_sum[row] = result.log_sum;
}

// Whether a row's results stand without a look at its logits; one thread then writes them if it is asked to.
__device__ __forceinline__ bool settled(const Forward& f, int64_t row, int64_t label, bool write) {
    const bool ignored = f.labels.ignored(label);
    if (!ignored && !f.labels.outside(label)) return false;
    const float value = ignored ? 0.0f : __builtin_nanf("");
    if (write) put_result(f, row, {value, value, value, value});
    return true;
}

// The statistics of all lanes of a warp, which every lane gets.
__device__ __forceinline__ RowStats over_lanes(RowStats own) {
    const float max = over_warp(own.max, Larger());
    const RowStats raised = raise_max(own, max);
    const double seconds = beyond_first(own.max == max && max != -INF);
    return {max, over_warp(raised.rest, Add()) + seconds, over_warp(raised.weighted, Add())};
}

template <Transform F, bool Entropy, class S>
__global__ void __launch_bounds__(THREADS) statistics_kernel(Forward f) {
    constexpr int E = 16 / (int)sizeof(S), SUMS = 4;
    __shared__ PerThread<THREADS> sums, weights;
    __shared__ float maxima[THREADS / WARP];
    const int64_t row = blockIdx.x / f.parts;
    const unsigned part = blockIdx.x % f.parts;
    const int64_t label = f.labels.of(row);
    if (settled(f, row, label, f.parts == 1 && threadIdx.x == 0)) return;

    const S* x = (const S*)f.logits + f.rows.at(row);
    const Scale scale = f.scales.of(row);
    float z[EACH];
    read_part<E>(x, f.labels.V, (int64_t)part * PART, z);
    float at_label = 0.0f;
    if (f.labels.labels && threadIdx.x == 0 && label / PART == part) at_label = as_float(x[label]);
    float max = -INF;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        z[i] = transform(F, z[i], scale);
        max = fmaxf(max, z[i]);
    }
    max = over_warp(max, Larger());
    const float start = start_of(max);
    float sum[SUMS] = {}, weighted[SUMS] = {};
    int top = 0;  // entries at the maximum
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const float d = z[i] - start;
        const float e = exp2f(d * LOG2_E);
        top += d == 0.0f;
        sum[i % SUMS] += d == 0.0f ? 0.0f : e;
        if (Entropy) weighted[i % SUMS] += e * fmaxf(d, EXP_FLOOR);  // not 0 * -inf
    }
    sums.put((sum[0] + sum[1]) + (sum[2] + sum[3]) + others_at_max(top));
    if (Entropy) weights.put((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
    if (threadIdx.x % WARP == 0) maxima[threadIdx.x / WARP] = max;
    __syncthreads();
    if (threadIdx.x >= WARP) return;

    RowStats stats = no_stats();
    if (threadIdx.x * PER_THREAD_STEPS < blockDim.x) {
        stats.max = maxima[threadIdx.x / 4];
#pragma unroll
        for (int step = 0; step < PER_THREAD_STEPS; ++step) {
            stats.rest += (double)sums.get(step);
            if (Entropy) stats.weighted += (double)weights.get(step);
        }
    }
    stats.rest = over_four(stats.rest);
    if (Entropy) stats.weighted = over_four(stats.weighted);
    stats = over_lanes(threadIdx.x % 4 == 0 ? stats : no_stats());
    if (threadIdx.x != 0) return;
    const double label_logit = (double)transform(F, at_label, scale);
    if (f.parts == 1)
        put_result(f, row, finish_stats(stats, label_logit));
    else
        f.partial[row * f.parts + part] = {stats, label_logit};
}

__global__ void __launch_bounds__(MERGE_THREADS) merge_kernel(Forward f, int64_t N) {
    const int64_t row = (int64_t)blockIdx.x * (MERGE_THREADS / WARP) + threadIdx.x / WARP;
    const unsigned lane = threadIdx.x % WARP;
    if (row >= N) return;
    const Part* parts = f.partial + row * f.parts;
    const int64_t label = f.labels.of(row);
    RowStats stats = lane < f.parts ? parts[lane].stats : no_stats();  // of a settled row: anything, and not used
    if (settled(f, row, label, lane == 0)) return;
    const double label_logit = f.labels.labels ? parts[label / PART].label_logit : 0.0;
    for (unsigned part = lane + WARP; part < f.parts; part += WARP) stats = merge_stats(stats, parts[part].stats);
    stats = over_lanes(stats);
    if (lane == 0) put_result(f, row, finish_stats(stats, label_logit));
}

struct Backward {
    const float *grad_logprobs, *grad_entropy;  // null: no gradient from it
    const void* logits;
    Planes rows;
    Labels labels;
    const float *logprobs, *entropy, *max, *log_sum;
    Scales scales;
    unsigned pieces;
    void* out;
    Planes out_rows;
};

// What the entries of a row have in common.
struct RowGradient {
    int64_t label;  // -1: no entry is the label's, or it has no gradient of its own
    float shift, log_sum, logprob, entropy;
    RowUpstream upstream;
    RowSlope slope;
};

__device__ __forceinline__ RowGradient row_gradient(const Backward& b, int64_t row, int64_t label) {
    RowGradient r;
    r.label = b.labels.labels && b.grad_logprobs ? label : -1;
    const float max = b.max[row];
    r.shift = -start_of(max);
    r.log_sum = b.log_sum[row];
    r.logprob = r.label < 0 ? 0.0f : b.logprobs[row];
    r.upstream = {b.grad_logprobs ? b.grad_logprobs[row] : 0.0f, b.grad_entropy ? b.grad_entropy[row] : 0.0f, 0.0f, 0.0f};
    r.entropy = b.grad_entropy ? b.entropy[row] : 0.0f;
    r.slope = row_slope(r.upstream, r.entropy);
    return r;
}

template <Transform F>
__device__ __forceinline__ float slope_of(float x, const RowGradient& r, Scale s) {
    const float z = transform(F, x, s);
    const float d = entry_gradient<false>(z + r.shift - r.log_sum, r.slope);
    if (F == CAPPED) return d * cap_slope(z, s.inverse_softcap / s.scale, s.scale);
    return F == SCALED ? d * s.scale : d;
}

// The label's entry x, not -inf.
template <Transform F>
__device__ __forceinline__ float label_slope_of(float x, const RowGradient& r, Scale s) {
    const float slope = F == CAPPED ? cap(x, s.inverse_softcap, s.softcap, s.scale).slope : s.scale;
    return label_gradient(r.logprob, r.entropy, r.upstream) * slope;
}

template <Transform F, class S>
__global__ void __launch_bounds__(THREADS) gradient_kernel(Backward b) {
    constexpr int E = 16 / (int)sizeof(S), UNITS = EACH / E;
    const int threads = (int)blockDim.x, step = threads * E;
    const int64_t row = blockIdx.x / b.pieces, V = b.labels.V;
    const int64_t piece = blockIdx.x % b.pieces;
    const S* x = (const S*)b.logits + b.rows.at(row);
    S* out = (S*)b.out + b.out_rows.at(row);
    const int64_t label = b.labels.of(row);
    const bool ignored = b.labels.ignored(label), filled = ignored || b.labels.outside(label);
    const float fill = ignored ? 0.0f : __builtin_nanf("");
    RowGradient r = {};
    Scale scale = b.scales.common;
    r.label = -1;
    if (!filled) {
        r = row_gradient(b, row, label);
        scale = b.scales.of(row);
    }
    float at_label = -INF;  // the label's logit, if this thread has it
    const int head = entries_to_boundary<E>(out);
    const bool together = filled || entries_to_boundary<E>(x) == head;
    const Singles singles = together ? around_units<E>(V, head, piece) : whole_piece(V, piece, PIECE);
    if (together) {
        const int64_t first = head + piece * PIECE + threadIdx.x * E;
        Unit<S, E> units[UNITS];
#pragma unroll
        for (int k = 0; k < UNITS; ++k)
            if (first + k * step + E <= V && !filled) units[k].load(x + first + k * step);
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            const int64_t at = first + k * step;
            if (at + E > V) break;
            float d[E];
#pragma unroll
            for (int i = 0; i < E; ++i) d[i] = filled ? fill : slope_of<F>(units[k][i], r, scale);
            Unit<S, E> gradient;
            gradient.set(d);
            gradient.store(out + at);
            if (r.label < at || r.label >= at + E) continue;
#pragma unroll
            for (int i = 0; i < E; ++i) at_label = at + i == r.label ? units[k][i] : at_label;
        }
    }
#pragma unroll 1
    for (int64_t i = singles.first; i < singles.end; i += threads) {
        const float entry = filled ? fill : as_float(x[i]);
        out[i] = from_float<S>(filled ? fill : slope_of<F>(entry, r, scale));
        at_label = i == r.label ? entry : at_label;
    }
    if (at_label != -INF) out[r.label] = from_float<S>(label_slope_of<F>(at_label, r, scale));
}

template <bool Entropy, class S>
auto statistics_of(Transform f) {
    return f == PLAIN    ? statistics_kernel<PLAIN, Entropy, S>
           : f == SCALED ? statistics_kernel<SCALED, Entropy, S>
                         : statistics_kernel<CAPPED, Entropy, S>;
}

template <class S>
auto statistics_of(Transform f, bool entropy) {
    return entropy ? statistics_of<true, S>(f) : statistics_of<false, S>(f);
}

template <class S>
auto gradient_of(Transform f) {
    return f == PLAIN    ? gradient_kernel<PLAIN, S>
           : f == SCALED ? gradient_kernel<SCALED, S>
                         : gradient_kernel<CAPPED, S>;
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk

#include "token_statistics.h"

namespace rk {
namespace RK_ISA {

// `temperatures` null: one temperature for all rows. softcap 0: none. `partial`: 32 bytes for each of the N * ceil(V / PART) parts;
// not used if a row is one part.
void logprobs_fwd(const void* logits, int64_t dtype, int64_t T, int64_t batch_stride, int64_t stride,
                  const int64_t* labels, int64_t N, int64_t V, const float* temperatures, double temperature,
                  double softcap, int64_t ignore_index, void* partial, float* logprobs, float* entropy, float* row_max,
                  float* log_sum, void* stream) {
    const int64_t parts = pieces_of(V, PART);
    const Forward f = {logits, {T, batch_stride, stride}, {labels, V, ignore_index},
                       {temperatures, make_scale(temperature, softcap)}, (unsigned)parts, (Part*)partial, logprobs,
                       entropy, row_max, log_sum};
    const Transform t = transform_of(f.scales);
    const bool with_entropy = entropy != nullptr;
    const auto kernel = dtype == F32    ? statistics_of<float>(t, with_entropy)
                        : dtype == BF16 ? statistics_of<__nv_bfloat16>(t, with_entropy)
                                        : statistics_of<__half>(t, with_entropy);
    launch(kernel, N * parts, threads_for(V, EACH, THREADS), stream, f);
    if (parts > 1) launch(merge_kernel, pieces_of(N, MERGE_THREADS / WARP), MERGE_THREADS, stream, f, N);
}

// The same with the extras: log sum p^2, the mean entry that is not -inf, and whether the label is the first at the
// maximum. `partial`: 64 bytes for each part.
void token_statistics_fwd(const void* logits, int64_t dtype, int64_t T, int64_t batch_stride, int64_t stride,
                          const int64_t* labels, int64_t N, int64_t V, const float* temperatures, double temperature,
                          double softcap, int64_t ignore_index, void* partial, float* logprobs, float* entropy,
                          float* row_max, float* log_sum, float* log_squares, float* mean, uint8_t* top, void* stream) {
    const int64_t parts = pieces_of(V, PART);
    const Forward f = {logits, {T, batch_stride, stride}, {labels, V, ignore_index},
                       {temperatures, make_scale(temperature, softcap)}, (unsigned)parts, nullptr, logprobs, entropy,
                       row_max, log_sum};
    const Statistics s = {f, (WholePart*)partial, log_squares, mean, top};
    const Transform t = transform_of(f.scales);
    const auto kernel = dtype == F32    ? token_statistics_of<float>(t)
                        : dtype == BF16 ? token_statistics_of<__nv_bfloat16>(t)
                                        : token_statistics_of<__half>(t);
    launch(kernel, N * parts, threads_for(V, EACH, THREADS), stream, s);
    if (parts > 1) launch(merge_statistics_kernel, pieces_of(N, MERGE_THREADS / WARP), MERGE_THREADS, stream, s, N);
}

// `out` may be the logits themselves.
void logprobs_bwd(const float* grad_logprobs, const float* grad_entropy, const void* logits, int64_t dtype,
                  int64_t T, int64_t batch_stride, int64_t stride, const int64_t* labels, const float* logprobs,
                  const float* entropy, const float* row_max, const float* log_sum, int64_t N, int64_t V,
                  const float* temperatures, double temperature, double softcap, int64_t ignore_index, void* out,
                  int64_t out_batch_stride, int64_t out_stride, void* stream) {
    const int64_t pieces = pieces_of(V, PIECE);
    const Backward b = {grad_logprobs, grad_entropy, logits, {T, batch_stride, stride}, {labels, V, ignore_index},
                        logprobs, entropy, row_max, log_sum, {temperatures, make_scale(temperature, softcap)},
                        (unsigned)pieces, out, {T, out_batch_stride, out_stride}};
    const Transform t = transform_of(b.scales);
    const auto kernel = dtype == F32    ? gradient_of<float>(t)
                        : dtype == BF16 ? gradient_of<__nv_bfloat16>(t)
                                        : gradient_of<__half>(t);
    launch(kernel, N * pieces, threads_for(V, EACH, THREADS), stream, b);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(logprobs_fwd);
RK_REGISTER(token_statistics_fwd);
RK_REGISTER(logprobs_bwd);
