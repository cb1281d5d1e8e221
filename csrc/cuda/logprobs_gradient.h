// The gradient of log-probs and entropy; a part of logprobs.cu, whose labels, scales and launches these are.
#pragma once

namespace rk {
namespace RK_ISA {
namespace {

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
    float base, through_entropy;  // of RowSlope, negated
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
    const RowSlope slope = row_slope(r.upstream, r.entropy);
    r.base = -slope.base, r.through_entropy = -slope.entropy_grad;
    return r;
}

template <Transform F>
__device__ __forceinline__ float slope_of(float x, const RowGradient& r, Scale s) {
    const float z = transform(F, x, s);
    const float log_p = z + r.shift - r.log_sum;
    const float finite = fmaxf(log_p, EXP_FLOOR);  // p = 0 there, and 0 * inf is NaN
    const float d = power_of_two(log_p * LOG2_E) * (r.base + r.through_entropy * finite);
    if (F == CAPPED) return d * cap_slope(z, s.inverse_softcap / s.scale, s.scale);
    return F == SCALED ? d * s.scale : d;
}

// The label's entry x, not -inf.
template <Transform F>
__device__ __forceinline__ float label_slope_of(float x, const RowGradient& r, Scale s) {
    const float slope = F == CAPPED ? cap(x, s.inverse_softcap, s.softcap, s.scale).slope : s.scale;
    return label_gradient(r.logprob, r.entropy, r.upstream) * slope;
}

// All entries of a row's piece where the row has no gradient, or a NaN.
template <class S>
__device__ __forceinline__ void fill_piece(S* out, int64_t V, int64_t piece, float fill) {
    const Singles all = whole_piece(V, piece, PIECE);
    for (int64_t i = all.first; i < all.end; i += blockDim.x) out[i] = from_float<S>(fill);
}

template <Transform F, class S>
__global__ void __launch_bounds__(THREADS) gradient_kernel(Backward b) {
    constexpr int E = 16 / (int)sizeof(S), UNITS = 2;
    const int threads = (int)blockDim.x, apart = threads * E, step = UNITS * apart;
    const int turn = step - apart + E;  // entries from a thread's first to its last of a turn
    const int64_t row = blockIdx.x / b.pieces, V = b.labels.V;
    const int64_t piece = blockIdx.x % b.pieces;
    const S* x = (const S*)b.logits + b.rows.at(row);
    S* out = (S*)b.out + b.out_rows.at(row);
    const int64_t label = b.labels.of(row);
    if (b.labels.ignored(label) || b.labels.outside(label)) {
        fill_piece(out, V, piece, b.labels.ignored(label) ? 0.0f : __builtin_nanf(""));
        return;
    }
    const int head = entries_to_boundary<E>(out);
    const bool together = entries_to_boundary<E>(x) == head;
    const int64_t first = head + piece * PIECE + threadIdx.x * E, rest = V - first;
    int left = !together || rest < 0 ? 0 : rest < PIECE ? (int)rest : PIECE;  // entries from this thread's first on
    const S* from = x + first;
    S* to = out + first;
    Unit<S, E> next[UNITS];
    const bool whole = left >= turn;
    const auto load_turn = [&] {
#pragma unroll
        for (int k = 0; k < UNITS; ++k) next[k].load(from + k * apart);
    };
    if (whole) load_turn();
    const RowGradient r = row_gradient(b, row, label);
    const Scale scale = b.scales.of(row);
    int label_at = r.label >= first && r.label - first < PIECE ? (int)(r.label - first) : -1 - PIECE;  // from `from` on
    float at_label = -INF;  // the label's logit, if this thread has it
    const auto visit = [&](const Unit<S, E>& unit, int k) {
        float d[E];
#pragma unroll
        for (int i = 0; i < E; ++i) d[i] = slope_of<F>(unit[i], r, scale);
        Unit<S, E> gradient;
        gradient.set(d);
        gradient.store(to + k * apart);
        const int at = label_at - k * apart;
        if ((unsigned)at >= (unsigned)E) return;
#pragma unroll
        for (int i = 0; i < E; ++i) at_label = at == i ? unit[i] : at_label;
    };
    const auto move = [&](int by) { from += by, to += by, left -= by, label_at -= by; };
#pragma unroll 1
    while (left >= turn) {
        Unit<S, E> units[UNITS];
#pragma unroll
        for (int k = 0; k < UNITS; ++k) units[k] = next[k];
        if (left >= turn + step) {
            from += step;
            load_turn();
            from -= step;
        }
#pragma unroll
        for (int k = 0; k < UNITS; ++k) visit(units[k], k);
        move(step);
    }
#pragma unroll 1
    for (; left >= E; move(apart)) {
        Unit<S, E> unit;
        unit.load(from);
        visit(unit, 0);
    }
    const Singles singles = together ? around_units<E>(V, head, piece) : whole_piece(V, piece, PIECE);
#pragma unroll 1
    for (int64_t i = singles.first; i < singles.end; i += threads) {
        const float entry = as_float(x[i]);
        out[i] = from_float<S>(slope_of<F>(entry, r, scale));
        at_label = i == r.label ? entry : at_label;
    }
    if (at_label != -INF) out[r.label] = from_float<S>(label_slope_of<F>(at_label, r, scale));
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
