// Exact KL of pairs of rows with its gradients, and the estimators of sampled tokens.
//
// Both directions are one: side a is averaged over, side b is the other. A row is taken in blocks of both sides that
// stay in the first-level cache; a block costs one visit for its maxima and one for two powers of 2 an entry. What is
// not fp32 is widened into a buffer first, so that the two sides may differ in dtype.
#include "kl.h"
#include "rows.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr float INF = __builtin_inff();
constexpr int64_t PIECE = 1 << 16;    // entries that a thread takes at once
constexpr int64_t CACHED = 16 << 20;  // bytes; a larger fresh gradient is streamed past the cache

int64_t rows_per_piece(int64_t V) { return V >= PIECE ? 1 : PIECE / V; }

struct Input {
    const void* data;
    int64_t dtype;
    Planes rows;

    int64_t bytes() const { return dtype == F32 ? 4 : 2; }
    const char* at(int64_t row, int64_t column) const { return (const char*)data + (rows.at(row) + column) * bytes(); }
    // Entries of a row, padded with -inf to a multiple of 4 W.
    Block block(int64_t row, int64_t column, int64_t count, float* buffer) const {
        const void* x = at(row, column);
        if (dtype == F32) return stage<PLAIN>((const float*)x, count, Scale{}, buffer);
        if (dtype == BF16) return stage<PLAIN>((const Bf16*)x, count, Scale{}, buffer);
        return stage<PLAIN>((const Half*)x, count, Scale{}, buffer);
    }
};

// `from` may be read W entries past its end.
template <class S>
inline void narrow(const float* from, int64_t count, bool streaming, S* to) {
    int64_t i = 0;
    if (streaming) {  // up to the first aligned vector
        const int64_t off = (int64_t)((uintptr_t)to / sizeof(S)) % W;
        i = off == 0 ? 0 : W - off;
        i = i < count ? i : count;
        store_some(to, load(from), i);
    }
    for (; i + W <= count; i += W) write(to + i, load(from + i), streaming);
    if (i < count) store_some(to + i, load(from + i), count - i);
}

struct Output {
    void* data;  // null: not wanted; rows are dense
    int64_t dtype, columns;
    bool streaming;

    void write(int64_t row, int64_t column, const float* from, int64_t count) const {
        const int64_t at = row * columns + column;
        if (dtype == F32) return narrow(from, count, streaming, (float*)data + at);
        if (dtype == BF16) return narrow(from, count, streaming, (Bf16*)data + at);
        narrow(from, count, streaming, (Half*)data + at);
    }
    void zero(int64_t row) const {
        if (dtype == F32) return fill_row((float*)data + row * columns, columns, 0.0f);
        if (dtype == BF16) return fill_row((Bf16*)data + row * columns, columns, 0.0f);
        fill_row((Half*)data + row * columns, columns, 0.0f);
    }
};

struct Range {
    float low, high;
};

inline Range block_range(Block b) {
    Lanes low[2], high[2];
    for (int k = 0; k < 2; ++k) low[k] = high[k] = load(b.x + k * W);
    for (int64_t i = 2 * W; i < b.count; i += 2 * W)
        for (int k = 0; k < 2; ++k) {
            const Lanes x = load(b.x + i + k * W);
            low[k] = low[k] < x ? low[k] : x;
            high[k] = high[k] > x ? high[k] : x;
        }
    return {-max_lanes(-(low[0] < low[1] ? low[0] : low[1])), max_lanes(high[0] > high[1] ? high[0] : high[1])};
}

// Whether b has no probability somewhere where a has some.
inline bool infinite(Block a, Block b) {
    Ints found = {};
    for (int64_t i = 0; i < a.count; i += W)
        found |= (load(b.x + i) == splat<Lanes>(-INF)) & (load(a.x + i) != splat<Lanes>(-INF));
    return any_lane(found);
}

inline float start_of(float max) { return max == -INF ? 0.0f : max; }

typedef double Doubles __attribute__((vector_size(8 * W)));

inline void add_to(Doubles& sum, Lanes lanes) { sum += __builtin_convertvector(lanes, Doubles); }

inline double total(const Doubles& lanes) {
    double out = 0.0;
    for (int i = 0; i < W; ++i) out += lanes[i];
    return out;
}

constexpr int64_t CHAIN = 64 * W;  // entries whose sums are kept in fp32, 32 to a lane, before they go over to double

struct Ahead {  // the entries that come next, for which memory is asked
    const char* at;
    int64_t bytes;

    void fetch(int64_t i) const { __builtin_prefetch(at + i * bytes); }
};

// Adds a block that does not exceed the maxima; of one that brings a new one (New), one entry there is left out of rest.
template <bool New>
inline void add_terms(Block a, Block b, float scale, Ahead ahead_a, Ahead ahead_b, bool new_a, bool new_b,
                      KlStats& stats) {
    const float start_a = start_of(stats.max_a), start_b = start_of(stats.max_b);
    Doubles wide_a = {}, wide_b = {}, wide_gap = {};
    Ints top_a = {}, top_b = {};  // minus the numbers of entries at the maxima
    for (int64_t begin = 0; begin < a.count; begin += CHAIN) {
        const int64_t end = a.count - begin < CHAIN ? a.count : begin + CHAIN;
        Lanes sum_a[2] = {}, sum_b[2] = {}, gap[2] = {};
        for (int64_t i = begin; i < end; i += 2 * W)
            for (int k = 0; k < 2; ++k) {
                const int64_t at = i + k * W;
                ahead_a.fetch(at);
                ahead_b.fetch(at);
                const Lanes d_a = load(a.x + at) - start_a, d_b = load(b.x + at) - start_b;
                const KlTerms<Lanes> terms = kl_terms(d_a, d_b, scale);
                const Ints max_a = New ? d_a == Lanes{} : Ints{}, max_b = New ? d_b == Lanes{} : Ints{};
                top_a += max_a;
                top_b += max_b;
                sum_a[k] += max_a ? Lanes{} : terms.e_a;
                sum_b[k] += max_b ? Lanes{} : terms.e_b;
                gap[k] += terms.gap;
            }
        add_to(wide_a, sum_a[0] + sum_a[1]);
        add_to(wide_b, sum_b[0] + sum_b[1]);
        add_to(wide_gap, gap[0] + gap[1]);
    }
    stats.rest_a += total(wide_a);
    stats.rest_b += total(wide_b);
    if (New) {
        stats.rest_a -= sum_lanes(__builtin_convertvector(top_a, Lanes)) + (new_a ? 1.0 : 0.0);
        stats.rest_b -= sum_lanes(__builtin_convertvector(top_b, Lanes)) + (new_b ? 1.0 : 0.0);
    }
    if (stats.gap != __builtin_inf()) stats.gap += total(wide_gap);
}

// Adds a block to the statistics; a NaN anywhere makes them NaN.
inline void add_kl_block(Block a, Block b, float scale, Ahead ahead_a, Ahead ahead_b, KlStats& stats) {
    const Range range_b = block_range(b);
    if (range_b.low == -INF && infinite(a, b)) stats.gap = __builtin_inf();
    const float max_a = block_max(a);
    const bool new_a = max_a > stats.max_a, new_b = range_b.high > stats.max_b;
    if (new_a || new_b) {
        stats = raise_kl_max(stats, max_a, range_b.high, scale);
        add_terms<true>(a, b, scale, ahead_a, ahead_b, new_a, new_b, stats);
    } else {
        add_terms<false>(a, b, scale, ahead_a, ahead_b, false, false, stats);
    }
}

struct Forward {
    Input a, b;
    int64_t V;
    double temperature;
    float scale;  // log2(e) / temperature
    float *kl, *max_a, *log_sum_a, *max_b, *log_sum_b;
};

void forward_rows(void* context, int64_t begin, int64_t end) {
    const Forward& f = *(const Forward*)context;
    float buffer_a[BLOCK], buffer_b[BLOCK];
    for (int64_t n = begin; n < end; ++n) {
        KlStats stats = no_kl_stats();
        for (int64_t i = 0; i < f.V; i += BLOCK) {
            const int64_t size = f.V - i < BLOCK ? f.V - i : BLOCK;
            const Ahead ahead_a = {f.a.at(n, i + size), f.a.bytes()}, ahead_b = {f.b.at(n, i + size), f.b.bytes()};
            add_kl_block(f.a.block(n, i, size, buffer_a), f.b.block(n, i, size, buffer_b), f.scale, ahead_a, ahead_b,
                         stats);
        }
        const KlSide a = kl_side(stats.max_a, stats.rest_a), b = kl_side(stats.max_b, stats.rest_b);
        f.kl[n] = finish_kl(stats, f.scale);
        f.max_a[n] = a.max;
        f.log_sum_a[n] = a.log_sum;
        f.max_b[n] = b.max;
        f.log_sum_b[n] = b.log_sum;
    }
}

struct Backward {
    const float* grad;
    Input a, b;
    int64_t V;
    double temperature;
    const float *kl, *max_a, *log_sum_a, *max_b, *log_sum_b;
    Output out_a, out_b;
};

constexpr int64_t STRIP = 1024;  // entries of four buffers that the first-level cache holds

template <bool NeedA, bool NeedB>
void backward_rows(void* context, int64_t begin, int64_t end) {
    const Backward& j = *(const Backward*)context;
    float buffer_a[STRIP], buffer_b[STRIP], grad_a[STRIP + W], grad_b[STRIP + W];
    for (int64_t n = begin; n < end; ++n) {
        const float kl = j.kl[n];
        if (kl == INF || (j.max_a[n] == -INF && kl == kl)) {
            if (NeedA) j.out_a.zero(n);
            if (NeedB) j.out_b.zero(n);
            continue;
        }
        const KlLine side_a = kl_line({j.max_a[n], j.log_sum_a[n]}, j.temperature);
        const KlLine side_b = kl_line({j.max_b[n], j.log_sum_b[n]}, j.temperature);
        const float upstream = j.grad[n] * side_a.scale;
        const bool peaked = side_a.log_sum < -KL_LOG_HALF && side_b.log_sum < -KL_LOG_HALF;
        for (int64_t i = 0; i < j.V; i += STRIP) {
            const int64_t size = j.V - i < STRIP ? j.V - i : STRIP;
            const Block a = j.a.block(n, i, size, buffer_a), b = j.b.block(n, i, size, buffer_b);
            for (int64_t c = 0; c < a.count; c += W) {
                const Lanes l_a = side_a(load(a.x + c)), l_b = side_b(load(b.x + c)), p_a = exp_nonpositive_f32(l_a);
                if (NeedA) store(grad_a + c, upstream * kl_slope_a(p_a, l_a, l_b, kl));
                if (!NeedB) continue;
                store(grad_b + c, upstream * (exp_nonpositive_f32(l_b) - p_a));
                if (!peaked) continue;
                const Ints likely = (l_a > splat<Lanes>(KL_LOG_HALF)) & (l_b > splat<Lanes>(KL_LOG_HALF));
                if (!any_lane(likely)) continue;
                store(grad_b + c, likely ? upstream * kl_likely_slope_b(l_a, l_b) : load(grad_b + c));
            }
            if (NeedA) j.out_a.write(n, i, grad_a, size);
            if (NeedB) j.out_b.write(n, i, grad_b, size);
        }
    }
}

struct Pair {  // log-probs of the policy and the reference, [rows, columns]
    const float* grad;
    int64_t grad_stride;
    Input p, q;
    int64_t columns, pieces;  // pieces of a row
    float* kl;
    Output grad_p, grad_q;
};

// body(row, column, count, d) for each block of a piece; d[count] is log p - log q.
template <class F>
inline void each_block(const Pair& j, int64_t begin, int64_t end, F body) {
    float buffer_p[BLOCK], buffer_q[BLOCK], d[BLOCK + W];
    for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t row = piece / j.pieces, column = piece % j.pieces * BLOCK;
        const int64_t count = j.columns - column < BLOCK ? j.columns - column : BLOCK;
        const Block p = j.p.block(row, column, count, buffer_p), q = j.q.block(row, column, count, buffer_q);
        for (int64_t i = 0; i < p.count; i += W) store(d + i, log_ratio(load(p.x + i), load(q.x + i)));
        body(row, column, count, d);
    }
}

template <int Estimator>
void estimate(void* context, int64_t begin, int64_t end) {
    const Pair& j = *(const Pair*)context;
    each_block(j, begin, end, [&](int64_t row, int64_t column, int64_t count, float* d) {
        for (int64_t i = 0; i < count; i += W) store(d + i, kl_estimate<Estimator>(load(d + i)));
        narrow(d, count, false, j.kl + row * j.columns + column);
    });
}

template <int Estimator>
void estimate_slopes(void* context, int64_t begin, int64_t end) {
    const Pair& j = *(const Pair*)context;
    each_block(j, begin, end, [&](int64_t row, int64_t column, int64_t count, float* d) {
        float upstream[BLOCK];
        const Block g = stage<PLAIN>(j.grad + row * j.grad_stride + column, count, Scale{}, upstream);
        for (int64_t i = 0; i < count; i += W) store(d + i, kl_estimate_grad<Estimator>(load(g.x + i), load(d + i)));
        if (j.grad_p.data) j.grad_p.write(row, column, d, count);
        if (!j.grad_q.data) return;
        for (int64_t i = 0; i < count; i += W) store(d + i, -load(d + i));
        j.grad_q.write(row, column, d, count);
    });
}

int64_t pieces_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

}  // namespace

// a: the side that is averaged over.
void kl_fwd(const void* a, int64_t dtype_a, int64_t T, int64_t batch_a, int64_t stride_a, const void* b,
            int64_t dtype_b, int64_t batch_b, int64_t stride_b, int64_t N, int64_t V, double temperature, float* kl,
            float* max_a, float* log_sum_a, float* max_b, float* log_sum_b, int64_t threads) {
    Forward f = {{a, dtype_a, {T, batch_a, stride_a}}, {b, dtype_b, {T, batch_b, stride_b}}, V, temperature,
                 (float)(1.4426950408889634 / temperature), kl, max_a, log_sum_a, max_b, log_sum_b};
    parallel_for(N, rows_per_piece(V), threads, forward_rows, &f);
}

// A gradient that is not wanted is null.
void kl_bwd(const float* grad, const void* a, int64_t dtype_a, int64_t T, int64_t batch_a, int64_t stride_a,
            const void* b, int64_t dtype_b, int64_t batch_b, int64_t stride_b, const float* kl, const float* max_a,
            const float* log_sum_a, const float* max_b, const float* log_sum_b, int64_t N, int64_t V,
            double temperature, void* grad_a, void* grad_b, int64_t threads) {
    const bool streaming = N * V * (int64_t)sizeof(float) > CACHED;
    Backward j = {grad, {a, dtype_a, {T, batch_a, stride_a}}, {b, dtype_b, {T, batch_b, stride_b}}, V, temperature,
                  kl, max_a, log_sum_a, max_b, log_sum_b,
                  {grad_a, dtype_a, V, streaming}, {grad_b, dtype_b, V, streaming}};
    const auto body = grad_b == nullptr   ? backward_rows<true, false>
                      : grad_a == nullptr ? backward_rows<false, true>
                                          : backward_rows<true, true>;
    parallel_for(N, rows_per_piece(V), threads, body, &j);
}

void approx_kl_fwd(const void* p, int64_t dtype_p, int64_t stride_p, const void* q, int64_t dtype_q, int64_t stride_q,
                   int64_t rows, int64_t columns, int64_t estimator, float* kl, int64_t threads) {
    Pair j = {nullptr, 0, {p, dtype_p, {rows, 0, stride_p}}, {q, dtype_q, {rows, 0, stride_q}}, columns,
              pieces_of(columns), kl, {}, {}};
    const auto body = estimator == KL_K1 ? estimate<KL_K1> : estimator == KL_K2 ? estimate<KL_K2> : estimate<KL_K3>;
    parallel_for(rows * j.pieces, rows_per_piece(columns < BLOCK ? columns + 1 : BLOCK), threads, body, &j);
}

void approx_kl_bwd(const float* grad, int64_t grad_stride, const void* p, int64_t dtype_p, int64_t stride_p,
                   const void* q, int64_t dtype_q, int64_t stride_q, int64_t rows, int64_t columns, int64_t estimator,
                   void* grad_p, void* grad_q, int64_t threads) {
    Pair j = {grad, grad_stride, {p, dtype_p, {rows, 0, stride_p}}, {q, dtype_q, {rows, 0, stride_q}}, columns,
              pieces_of(columns), nullptr, {grad_p, dtype_p, columns, false},
              {grad_q, dtype_q, columns, false}};
    const auto body = estimator == KL_K1   ? estimate_slopes<KL_K1>
                      : estimator == KL_K2 ? estimate_slopes<KL_K2>
                                           : estimate_slopes<KL_K3>;
    parallel_for(rows * j.pieces, rows_per_piece(columns < BLOCK ? columns + 1 : BLOCK), threads, body, &j);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(kl_fwd);
RK_REGISTER(kl_bwd);
RK_REGISTER(approx_kl_fwd);
RK_REGISTER(approx_kl_bwd);
