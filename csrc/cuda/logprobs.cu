// Log-probs and entropy of rows of logits, and their gradient.
//
// Forward: a block takes up to PART entries of a row in turns of TURN of each thread; the next turn's are on their way
// while those in registers are folded into the thread's statistics (running.h). Longer rows are cut into parts, and a
// second, small launch merges their statistics. Backward: a block takes PIECE entries of a row, one read and one write.
#include "logprobs.h"

#include "rows.h"
#include "running.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int THREADS = 256;
constexpr int TURN = 16;                   // entries of a thread that are folded at once
constexpr int PART = THREADS * TURN * 8;   // as in rlhf_kernels/cuda/logprobs.py
constexpr int EACH = 32;                   // entries of a thread, where it takes them all at once
constexpr int WHOLE_PART = THREADS * EACH;  // of token_statistics.h; likewise
constexpr int PIECE = 2 * THREADS * EACH;
constexpr int MERGE_THREADS = 128;         // a warp merges a row's parts

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

// A thread's share of the entries [first, end), end being that of the part or of the row.
template <Transform F, bool Entropy, class S>
__device__ __forceinline__ Running fold_part(const S* x, int64_t V, int64_t first, int64_t end, Scale scale,
                                             float factor) {
    constexpr int E = 16 / (int)sizeof(S), UNITS = TURN / E, STEP = THREADS * TURN;
    const int step = (int)blockDim.x * TURN;
    Running running;
    const auto fold = [&](float(&z)[TURN]) {
        if (F == CAPPED)
#pragma unroll
            for (int i = 0; i < TURN; ++i) z[i] = transform(F, z[i], scale);
        running.fold<Entropy>(z, factor);
    };
    if (is_aligned(x, 16) && step == STEP) {
        const S* from = x + first + threadIdx.x * E;
        int turns = (int)((end - first) / STEP);
        first += (int64_t)turns * STEP;
        Unit<S, E> units[UNITS];
        if (turns > 0) load_units<THREADS>(from, units);
#pragma unroll 1
        for (; turns > 0; --turns) {
            float z[TURN];
            entries_of(units, z);
            from += STEP;
            if (turns > 1) load_units<THREADS>(from, units);
            fold(z);
        }
    }
#pragma unroll 1
    for (; first < end; first += step) {
        float z[TURN];
        read_part<E>(x, V, first, z);
        fold(z);
    }
    return running;
}

template <Transform F, bool Entropy, class S>
__global__ void __launch_bounds__(THREADS, F == CAPPED ? 3 : 4) statistics_kernel(Forward f) {
    __shared__ PerThread<THREADS> sums, weights;
    __shared__ float maxima[THREADS / WARP];
    const int64_t row = blockIdx.x / f.parts, V = f.labels.V;
    const unsigned part = blockIdx.x % f.parts;
    const int64_t label = f.labels.of(row);
    if (settled(f, row, label, f.parts == 1 && threadIdx.x == 0)) return;

    const S* x = (const S*)f.logits + f.rows.at(row);
    const Scale scale = f.scales.of(row);
    float at_label = 0.0f;
    if (f.labels.labels && threadIdx.x == 0 && label / PART == part) at_label = as_float(x[label]);
    const int64_t first = (int64_t)part * PART, end = first + PART < V ? first + PART : V;
    const float factor = F == CAPPED ? LOG2_E : scale.scale * LOG2_E;
    Running own = fold_part<F, Entropy>(x, V, first, end, scale, factor);
    own.share_max(factor);
    sums.put(own.rest);
    if (Entropy) weights.put(F == CAPPED ? own.weighted : own.weighted * scale.scale);
    if (threadIdx.x % WARP == 0) maxima[threadIdx.x / WARP] = F == CAPPED ? own.max : transform(F, own.max, scale);
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

template <bool Entropy, class S>
auto statistics_of(Transform f) {
    return f == CAPPED ? statistics_kernel<CAPPED, Entropy, S> : statistics_kernel<SCALED, Entropy, S>;
}

template <class S>
auto statistics_of(Transform f, bool entropy) {
    return entropy ? statistics_of<true, S>(f) : statistics_of<false, S>(f);
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk

#include "logprobs_gradient.h"
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
    launch(kernel, N * parts, threads_for(V, TURN, THREADS), stream, f);
    if (parts > 1) launch(merge_kernel, pieces_of(N, MERGE_THREADS / WARP), MERGE_THREADS, stream, f, N);
}

// The same with the extras: log sum p^2, the mean entry that is not -inf, and whether the label is the first at the
// maximum. `partial`: 64 bytes for each part.
void token_statistics_fwd(const void* logits, int64_t dtype, int64_t T, int64_t batch_stride, int64_t stride,
                          const int64_t* labels, int64_t N, int64_t V, const float* temperatures, double temperature,
                          double softcap, int64_t ignore_index, void* partial, float* logprobs, float* entropy,
                          float* row_max, float* log_sum, float* log_squares, float* mean, uint8_t* top, void* stream) {
    const int64_t parts = pieces_of(V, WHOLE_PART);
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
