// What `linear` does with a chunk of logits between its matrix products: fold it into the rows' running statistics, and
// turn it in place into the gradient of the logits. A chunk is [n, v]: n tokens, v columns of the vocabulary.
#include "rows.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int64_t PIECE = 1 << 16;  // entries that a thread takes at once

int64_t rows_per_piece(int64_t v) { return v >= PIECE ? 1 : PIECE / (v > 0 ? v : 1); }

struct Chunk {
    float* logits;
    int64_t stride, columns, first;  // `first`: the vocabulary's entry that stands in column 0
    const float* bias;               // [columns] or null
    Scales scales;
    const int64_t* labels;
    const uint8_t* kept;

    float* row(int64_t i) const { return logits + i * stride; }
    int64_t column(int64_t i) const {  // of the label, -1 if it is not in this chunk
        const int64_t at = labels[i] - first;
        return at >= 0 && at < columns ? at : -1;
    }
    void add_bias(float* x) const {
        if (!bias) return;
        int64_t j = 0;
        for (; j + W <= columns; j += W) store(x + j, load(x + j) + load(bias + j));
        for (; j < columns; ++j) x[j] += bias[j];
    }
};

struct Fold {
    Chunk chunk;
    float* max;
    double *rest, *weighted;  // weighted null: no entropy
    float* label_logit;
    uint8_t* here;
    double *squares, *total, *count;  // null: no extras
    int64_t* top;                     // the first entry at the maximum
};

void fold_row(const Fold& f, int64_t i, const float* x, Scale scale, RowStats& stats) {
    if (!f.squares) {
        const auto add = f.weighted ? add_entries<true, float> : add_entries<false, float>;
        return add(x, f.chunk.columns, scale, stats);
    }
    RowExtras extras = {f.squares[i], f.total[i], f.count[i], f.top[i]};
    add_entries<true>(x, f.chunk.columns, f.chunk.first, scale, stats, extras);
    f.squares[i] = extras.squares;
    f.total[i] = extras.total;
    f.count[i] = extras.count;
    f.top[i] = extras.first;
}

void fold_rows(void* context, int64_t begin, int64_t end) {
    const Fold& f = *(const Fold*)context;
    for (int64_t i = begin; i < end; ++i) {
        if (!f.chunk.kept[i]) continue;
        float* x = f.chunk.row(i);
        f.chunk.add_bias(x);
        const Scale scale = f.chunk.scales.of(i);
        RowStats stats = {f.max[i], f.rest[i], f.weighted ? f.weighted[i] : 0.0};
        fold_row(f, i, x, scale, stats);
        f.max[i] = stats.max;
        f.rest[i] = stats.rest;
        if (f.weighted) f.weighted[i] = stats.weighted;
        const int64_t at = f.chunk.column(i);
        if (at >= 0) {
            f.label_logit[i] = (float)scaled_entry(x + at, scale);
            f.here[i] = 1;
        }
    }
}

struct Gradient {
    Chunk chunk;
    bool has_bias_in;  // the fold has added the bias to this very chunk
    Upstreams upstream;
    const float *logprobs, *entropy, *max, *log_sum;
};

void gradient_rows(void* context, int64_t begin, int64_t end) {
    const Gradient& g = *(const Gradient*)context;
    for (int64_t i = begin; i < end; ++i) {
        float* x = g.chunk.row(i);
        const int64_t v = g.chunk.columns;
        if (!g.chunk.kept[i]) {
            fill_row(x, v, 0.0f);
            continue;
        }
        if (g.logprobs[i] != g.logprobs[i]) {
            fill_row(x, v, __builtin_nanf(""));
            continue;
        }
        if (!g.has_bias_in) g.chunk.add_bias(x);
        const Scale scale = g.chunk.scales.of(i);
        const RowUpstream upstream = g.upstream.row(i);
        const float entropy = g.upstream.entropy ? g.entropy[i] : 0.0f;
        const RowSlope slope = row_slope(upstream, entropy);
        const int64_t at = g.chunk.column(i);
        const float at_label = at >= 0 ? x[at] : 0.0f;
        gradient_entries(x, v, scale, row_gradient(g.max[i], g.log_sum[i], slope), false, x);
        if (at < 0 || !g.upstream.logprobs || at_label == -__builtin_inff()) continue;
        x[at] = label_gradient(g.logprobs[i], entropy, upstream) * label_slope(at_label, scale);
    }
}

}  // namespace

// Adds the bias to the chunk, in place, and the chunk to the statistics of the rows that are kept.
void linear_fold_f32(float* logits, int64_t stride, int64_t n, int64_t columns, int64_t first, const float* bias,
                     const float* temperatures, double temperature, double softcap, const int64_t* labels,
                     const uint8_t* kept, float* max, double* rest, double* weighted, float* label_logit, uint8_t* here,
                     int64_t threads) {
    Fold f = {{logits, stride, columns, first, bias, {temperatures, temperature, softcap}, labels, kept}, max, rest,
              weighted, label_logit, here, nullptr, nullptr, nullptr, nullptr};
    parallel_for(n, rows_per_piece(columns), threads, fold_rows, &f);
}

// The same, with the extras of a row.
void linear_fold_extras_f32(float* logits, int64_t stride, int64_t n, int64_t columns, int64_t first, const float* bias,
                            const float* temperatures, double temperature, double softcap, const int64_t* labels,
                            const uint8_t* kept, float* max, double* rest, double* weighted, float* label_logit,
                            uint8_t* here, double* squares, double* total, double* count, int64_t* top,
                            int64_t threads) {
    Fold f = {{logits, stride, columns, first, bias, {temperatures, temperature, softcap}, labels, kept}, max, rest,
              weighted, label_logit, here, squares, total, count, top};
    parallel_for(n, rows_per_piece(columns), threads, fold_rows, &f);
}

// Turns the chunk into d/dlogits; 0 in rows that are not kept, NaN in rows whose log-prob is.
void linear_gradient_f32(float* logits, int64_t stride, int64_t n, int64_t columns, int64_t first, const float* bias,
                         int64_t has_bias_in, const float* temperatures, double temperature, double softcap,
                         const int64_t* labels, const uint8_t* kept, const float* grad_logprobs,
                         const float* grad_entropy, const float* grad_log_sum_exp, const float* grad_each,
                         const float* logprobs, const float* entropy, const float* max, const float* log_sum,
                         int64_t threads) {
    Gradient g = {{logits, stride, columns, first, bias, {temperatures, temperature, softcap}, labels, kept},
                  has_bias_in != 0, {grad_logprobs, grad_entropy, grad_log_sum_exp, grad_each}, logprobs, entropy, max,
                  log_sum};
    parallel_for(n, rows_per_piece(columns), threads, gradient_rows, &g);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(linear_fold_f32);
RK_REGISTER(linear_fold_extras_f32);
RK_REGISTER(linear_gradient_f32);
