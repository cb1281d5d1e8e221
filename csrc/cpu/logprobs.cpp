// Log-probs and entropy of rows of logits, and the gradient of both, rows shared among the threads.
#include "rows.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int64_t PIECE = 1 << 16;     // entries that a thread takes at once
constexpr int64_t CACHED = 16 << 20;   // bytes; a larger fresh gradient is streamed past the cache

int64_t rows_per_piece(int64_t V) { return V >= PIECE ? 1 : PIECE / (V > 0 ? V : 1); }

struct Forward {
    const void* logits;
    Planes rows;
    const int64_t* labels;  // null: entropy alone
    int64_t V, ignore_index;
    Scales scales;
    float *logprobs, *entropy, *max, *log_sum;  // entropy null: not asked for
    float *log_squares, *mean;                  // null: no extras
    uint8_t* top;                               // whether the label is the first entry at the maximum
};

void put_extras(const Forward& f, int64_t n, RowMore more, bool top) {
    f.log_squares[n] = more.log_squares;
    f.mean[n] = more.mean;
    f.top[n] = top;
}

template <bool Entropy, bool Extras, class S>
void forward_row(const Forward& f, int64_t n) {
    const S* x = (const S*)f.logits + f.rows.at(n);
    const int64_t label = f.labels ? f.labels[n] : 0;
    const bool ignored = f.labels && label == f.ignore_index;
    const bool outside = f.labels && !ignored && (label < 0 || label >= f.V);
    RowResult result = {0.0f, 0.0f, 0.0f, 0.0f};
    if (outside) {
        const float nan = __builtin_nanf("");
        result = {nan, nan, nan, nan};
        if (Extras) put_extras(f, n, {nan, nan}, false);
    } else if (!ignored) {
        const Scale scale = f.scales.of(n);
        RowStats stats = no_stats();
        if (Extras) {
            RowExtras extras = {0.0, 0.0, 0.0, -1};
            add_entries<Entropy>(x, f.V, 0, scale, stats, extras);
            put_extras(f, n, finish_extras(stats, extras), label == extras.first);
        } else {
            add_entries<Entropy>(x, f.V, scale, stats);
        }
        result = finish_stats(stats, f.labels ? scaled_entry(x + label, scale) : 0.0);
    } else if (Extras) {
        put_extras(f, n, {0.0f, 0.0f}, false);
    }
    if (f.labels) f.logprobs[n] = result.logprob;
    if (Entropy) f.entropy[n] = result.entropy;
    f.max[n] = result.max;
    f.log_sum[n] = result.log_sum;
}

template <class S>
void forward_rows(void* context, int64_t begin, int64_t end) {
    const Forward& f = *(const Forward*)context;
    const auto row = f.log_squares ? forward_row<true, true, S>
                     : f.entropy   ? forward_row<true, false, S>
                                   : forward_row<false, false, S>;
    for (int64_t n = begin; n < end; ++n) row(f, n);
}

void forward(Forward& f, int64_t dtype, int64_t N, int64_t threads) {
    const auto rows = dtype == F32 ? forward_rows<float> : dtype == BF16 ? forward_rows<Bf16> : forward_rows<Half>;
    parallel_for(N, rows_per_piece(f.V), threads, rows, &f);
}

struct Backward {
    Upstreams upstream;
    const void* logits;
    Planes rows;
    const int64_t* labels;
    const float *logprobs, *entropy, *max, *log_sum;
    int64_t V, ignore_index;
    Scales scales;
    void* out;
    Planes out_rows;
    bool streaming;
};

template <class S>
void backward_row(const Backward& b, int64_t n) {
    const S* x = (const S*)b.logits + b.rows.at(n);
    S* out = (S*)b.out + b.out_rows.at(n);
    const int64_t label = b.labels ? b.labels[n] : 0;
    if (b.labels && label == b.ignore_index) return fill_row(out, b.V, 0.0f);
    if (b.labels && (label < 0 || label >= b.V)) return fill_row(out, b.V, __builtin_nanf(""));
    const RowUpstream upstream = b.upstream.row(n);
    const float entropy = b.upstream.entropy ? b.entropy[n] : 0.0f;
    const float at_label = b.labels ? entry(x + label) : 0.0f;  // before the row is written over
    const RowGradient row = row_gradient(b.max[n], b.log_sum[n], row_slope(upstream, entropy));
    const Scale scale = b.scales.of(n);
    gradient_entries(x, b.V, scale, row, b.streaming, out);
    if (!b.upstream.logprobs || at_label == -__builtin_inff()) return;
    const float gradient = label_gradient(b.logprobs[n], entropy, upstream) * label_slope(at_label, scale);
    store_some(out + label, splat<Lanes>(gradient), 1);
}

template <class S>
void backward_rows(void* context, int64_t begin, int64_t end) {
    const Backward& b = *(const Backward*)context;
    for (int64_t n = begin; n < end; ++n) backward_row<S>(b, n);
}

}  // namespace

// `temperatures` null: one temperature for all rows. softcap 0: none.
void logprobs_fwd(const void* logits, int64_t dtype, int64_t T, int64_t batch_stride, int64_t stride,
                  const int64_t* labels, int64_t N, int64_t V, const float* temperatures, double temperature,
                  double softcap, int64_t ignore_index, float* logprobs, float* entropy, float* row_max,
                  float* log_sum, int64_t threads) {
    Forward f = {logits, {T, batch_stride, stride}, labels, V, ignore_index, {temperatures, temperature, softcap},
                 logprobs, entropy, row_max, log_sum, nullptr, nullptr, nullptr};
    forward(f, dtype, N, threads);
}

// The same with the extras: log sum p^2, the mean entry that is not -inf, and whether the label is the first at the maximum.
void token_statistics_fwd(const void* logits, int64_t dtype, int64_t T, int64_t batch_stride, int64_t stride,
                          const int64_t* labels, int64_t N, int64_t V, const float* temperatures, double temperature,
                          double softcap, int64_t ignore_index, float* logprobs, float* entropy, float* row_max,
                          float* log_sum, float* log_squares, float* mean, uint8_t* top, int64_t threads) {
    Forward f = {logits, {T, batch_stride, stride}, labels, V, ignore_index, {temperatures, temperature, softcap},
                 logprobs, entropy, row_max, log_sum, log_squares, mean, top};
    forward(f, dtype, N, threads);
}

// `out` may be the logits themselves.
void logprobs_bwd(const float* grad_logprobs, const float* grad_entropy, const float* grad_log_sum_exp,
                  const float* grad_each, const void* logits, int64_t dtype, int64_t T, int64_t batch_stride,
                  int64_t stride, const int64_t* labels, const float* logprobs, const float* entropy,
                  const float* row_max, const float* log_sum, int64_t N, int64_t V, const float* temperatures,
                  double temperature, double softcap, int64_t ignore_index, void* out, int64_t out_batch_stride,
                  int64_t out_stride, int64_t threads) {
    const bool streaming = out != logits && N * V * (dtype == F32 ? 4 : 2) > CACHED;
    Backward b = {{grad_logprobs, grad_entropy, grad_log_sum_exp, grad_each}, logits, {T, batch_stride, stride}, labels,
                  logprobs, entropy, row_max, log_sum, V, ignore_index, {temperatures, temperature, softcap}, out,
                  {T, out_batch_stride, out_stride}, streaming};
    const auto rows = dtype == F32 ? backward_rows<float> : dtype == BF16 ? backward_rows<Bf16> : backward_rows<Half>;
    parallel_for(N, rows_per_piece(V), threads, rows, &b);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(logprobs_fwd);
RK_REGISTER(token_statistics_fwd);
RK_REGISTER(logprobs_bwd);
