// Row loops that logprobs, kl and linear share: the statistics of a stretch of logits, and their gradient.
//
// A stretch is taken in blocks that stay in the first-level cache: one visit finds the block's maximum, a second one
// adds up exp(z - maximum so far). So each entry costs one exp, and memory is read once.
#pragma once
#include "logprobs.h"

namespace rk {
namespace RK_ISA {

constexpr int W = RK_LANES;
constexpr int64_t BLOCK = 2048;  // entries; a multiple of 4 W

struct Scale {  // z = x * scale, or softcap * tanh(x / softcap) * scale if softcap > 0
    float scale, softcap, inverse_softcap;
};

inline Scale make_scale(double temperature, double softcap) {
    return {(float)(1.0 / temperature), (float)softcap, softcap > 0.0 ? (float)(1.0 / softcap) : 0.0f};
}

struct Scales {  // of rows, which share one temperature if `temperatures` is null
    const float* temperatures;
    double temperature, softcap;

    Scale of(int64_t row) const { return make_scale(temperatures ? (double)temperatures[row] : temperature, softcap); }
};

enum Transform { PLAIN, SCALED, CAPPED };  // how x becomes z

inline Transform transform_of(Scale s) { return s.softcap > 0.0f ? CAPPED : s.scale == 1.0f ? PLAIN : SCALED; }

template <Transform F>
inline Lanes transform(Lanes x, Scale s) {
    if (F == CAPPED) return cap(x, s.inverse_softcap, s.softcap, s.scale).z;
    return F == SCALED ? x * s.scale : x;
}

// A vector from fewer than W entries; the lanes beyond them hold `fill`.
template <class S>
inline Lanes load_some(const S* x, int64_t count, float fill) {
    S some[W] = {};
    for (int64_t i = 0; i < count; ++i) some[i] = x[i];
    Lanes lanes = load(some);
    for (int64_t i = count; i < W; ++i) lanes[i] = fill;
    return lanes;
}

template <class S>
inline void store_some(S* to, Lanes lanes, int64_t count) {
    S some[W];
    store(some, lanes);
    for (int64_t i = 0; i < count; ++i) to[i] = some[i];
}

template <class S>
inline float entry(const S* x) {
    return load_some(x, 1, 0.0f)[0];
}

// z of one entry, with the same rounding as the row's other entries.
template <class S>
inline double scaled_entry(const S* x, Scale s) {
    const Lanes lanes = load_some(x, 1, 0.0f);
    const Transform f = transform_of(s);
    return (double)(f == CAPPED ? transform<CAPPED>(lanes, s) : f == SCALED ? transform<SCALED>(lanes, s) : lanes)[0];
}

// z of some entries as floats: the source itself, or a copy in `buffer` padded with -inf to a multiple of 4 W. z is
// rounded before anything is subtracted from it: a fused x * scale - max would leave the product's rounding error, which
// is large where the logits are.
struct Block {
    const float* x;
    int64_t count;
};

template <Transform F, class S>
inline Block stage(const S* x, int64_t count, Scale s, float* buffer) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(buffer + i, transform<F>(load(x + i), s));
    if (i < count) {
        store(buffer + i, transform<F>(load_some(x + i, count - i, -__builtin_inff()), s));
        i += W;
    }
    for (; i % (4 * W) != 0; i += W) store(buffer + i, splat<Lanes>(-__builtin_inff()));
    return {buffer, i};
}

template <Transform F>
inline Block stage(const float* x, int64_t count, Scale s, float* buffer) {
    if (F == PLAIN && count % (4 * W) == 0) return {x, count};
    return stage<F, float>(x, count, s, buffer);
}

inline float block_max(Block b) {
    Lanes m[4];
    for (int k = 0; k < 4; ++k) m[k] = load(b.x + k * W);
    for (int64_t i = 4 * W; i < b.count; i += 4 * W)
        for (int k = 0; k < 4; ++k) {
            const Lanes x = load(b.x + i + k * W);
            m[k] = m[k] > x ? m[k] : x;
        }
    for (int k = 1; k < 4; ++k) m[0] = m[0] > m[k] ? m[0] : m[k];
    return max_lanes(m[0]);
}

inline bool has_nan(Block b) {
    Ints found = {};
    for (int64_t i = 0; i < b.count; i += W) {
        const Lanes x = load(b.x + i);
        found |= x != x;
    }
    return any_lane(found);
}

// What a block adds to a row's extras, if they are wanted.
struct NoExtras {};

template <class Extras>
struct BlockExtras {
    void add(int, Lanes, Lanes) {}
    void finish(Block, double, Extras&) const {}
};

template <>
struct BlockExtras<RowExtras> {
    Lanes squares[4] = {}, total[4] = {};
    Ints banned = {};  // minus the number of entries that are -inf, lane by lane

    inline void add(int k, Lanes z, Lanes e) {
        const Ints out = z == splat<Lanes>(-__builtin_inff());
        squares[k] += e * e;
        total[k] += out ? Lanes{} : z;
        banned += out;
    }
    void finish(Block b, double seconds, RowExtras& extras) const {
        extras.squares += sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) + seconds;
        extras.total += sum_lanes((total[0] + total[1]) + (total[2] + total[3]));
        extras.count += (double)b.count + sum_lanes(__builtin_convertvector(banned, Lanes));
    }
};

// Extras that were told from `old`, told from the maximum of a block, which begins at the row's entry `at`.
inline void raise_extras(NoExtras&, float, float, Block, int64_t) {}
inline void raise_extras(RowExtras& extras, float old, float max, Block b, int64_t at) {
    extras = raise_max(extras, old, max);
    int64_t i = 0;
    while (!any_lane(load(b.x + i) == splat<Lanes>(max))) i += W;
    while (b.x[i] != max) ++i;
    extras.first = at + i;
}

// Adds up the exps of a block that does not exceed the maximum; of one that brings it (New), one entry there is left out.
// While the exps are computed, memory is asked for the entries that come next, from `ahead` on.
template <bool Entropy, bool New, class S, class Extras>
inline void add_exps(Block b, const S* ahead, RowStats& stats, Extras& extras) {
    const float shift = -stats.max;
    Lanes sum[4] = {}, weighted[4] = {};
    BlockExtras<Extras> more;
    Ints top = {};  // minus the number of entries at the maximum
    for (int64_t i = 0; i < b.count; i += 4 * W)
        for (int k = 0; k < 4; ++k) {
            if (k * W * sizeof(S) % 64 == 0) __builtin_prefetch(ahead + i + k * W);
            const Lanes z = load(b.x + i + k * W), d = z + shift;
            const Lanes e = exp_nonpositive_f32(d);
            const Ints at_max = New ? d == Lanes{} : Ints{};
            top += at_max;
            sum[k] += at_max ? Lanes{} : e;
            more.add(k, z, at_max ? Lanes{} : e);
            if (Entropy) weighted[k] += e * (d < splat<Lanes>(EXP_FLOOR) ? splat<Lanes>(EXP_FLOOR) : d);  // not 0 * -inf
        }
    const double seconds = New ? -sum_lanes(__builtin_convertvector(top, Lanes)) - 1.0 : 0.0;
    stats.rest += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (New) stats.rest += seconds;
    more.finish(b, seconds, extras);
    if (Entropy) stats.weighted += sum_lanes((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
}

// Adds a block, which begins at the row's entry `at`, to the statistics. A NaN anywhere makes the sum NaN.
template <bool Entropy, class S, class Extras>
inline void add_block(Block b, int64_t at, const S* ahead, RowStats& stats, Extras& extras) {
    const float max = block_max(b);
    if (!(max > -__builtin_inff())) {
        if (has_nan(b)) stats.rest = __builtin_nan("");
        return;
    }
    if (max > stats.max) {
        raise_extras(extras, stats.max, max, b, at);
        stats = raise_max(stats, max);
        add_exps<Entropy, true>(b, ahead, stats, extras);
    } else {
        add_exps<Entropy, false>(b, ahead, stats, extras);
    }
}

// Adds `count` entries, which begin at the row's entry `at`, to the statistics.
template <bool Entropy, Transform F, class S, class Extras>
inline void add_stretch(const S* x, int64_t count, int64_t at, Scale s, RowStats& stats, Extras& extras) {
    float buffer[BLOCK];
    for (int64_t i = 0; i < count; i += BLOCK) {
        const int64_t size = count - i < BLOCK ? count - i : BLOCK;
        add_block<Entropy>(stage<F>(x + i, size, s, buffer), at + i, x + i + size, stats, extras);
    }
}

template <bool Entropy, class S, class Extras>
inline void add_entries(const S* x, int64_t count, int64_t at, Scale s, RowStats& stats, Extras& extras) {
    const Transform f = transform_of(s);
    if (f == CAPPED) return add_stretch<Entropy, CAPPED>(x, count, at, s, stats, extras);
    if (f == SCALED) return add_stretch<Entropy, SCALED>(x, count, at, s, stats, extras);
    add_stretch<Entropy, PLAIN>(x, count, at, s, stats, extras);
}

template <bool Entropy, class S>
inline void add_entries(const S* x, int64_t count, Scale s, RowStats& stats) {
    NoExtras none;
    add_entries<Entropy>(x, count, 0, s, stats, none);
}

template <class S>
inline void write(S* to, Lanes lanes, bool streaming) {
    if (streaming)
        stream(to, lanes);
    else
        store(to, lanes);
}

// Upstream gradients of rows; null: none from it.
struct Upstreams {
    const float *logprobs, *entropy, *log_sum_exp, *each;

    RowUpstream row(int64_t n) const {
        return {logprobs ? logprobs[n] : 0.0f, entropy ? entropy[n] : 0.0f, log_sum_exp ? log_sum_exp[n] : 0.0f,
                each ? each[n] : 0.0f};
    }
};

// What a row's gradient needs: its maximum, log of its sum and upstream gradients.
struct RowGradient {
    float shift, log_sum;
    RowSlope slope;
};

inline RowGradient row_gradient(float max, float log_sum, RowSlope slope) {
    return {max == -__builtin_inff() ? 0.0f : -max, log_sum, slope};
}

// d/dx of a vector of entries from their z; 0 where x is -inf.
template <Transform F, bool Each>
inline Lanes slope_of(Lanes z, Scale s, RowGradient row) {
    const Lanes d = entry_gradient<Each>(z + row.shift - row.log_sum, row.slope);
    if (F == CAPPED) return d * cap_slope(z, s.inverse_softcap / s.scale, s.scale);
    return F == SCALED ? d * s.scale : d;
}

// d/dx of up to BLOCK entries, written to `out`, which may be x itself.
template <Transform F, bool Each, class S>
inline void gradient_block(const S* x, int64_t count, Scale s, RowGradient row, bool streaming, S* out) {
    float buffer[F == PLAIN ? 1 : BLOCK];
    if (F != PLAIN) stage<F>(x, count, s, buffer);
    int64_t i = 0;
    for (; i + W <= count; i += W)
        write(out + i, slope_of<F, Each>(F == PLAIN ? load(x + i) : load(buffer + i), s, row), streaming);
    if (i < count) {
        const Lanes z = F == PLAIN ? load_some(x + i, count - i, 0.0f) : load(buffer + i);
        store_some(out + i, slope_of<F, Each>(z, s, row), count - i);
    }
}

template <Transform F, bool Each, class S>
inline void gradient_stretch(const S* x, int64_t count, Scale s, RowGradient row, bool streaming, S* out) {
    int64_t i = 0;
    if (streaming) {  // up to the first aligned vector
        const int64_t off = (int64_t)((uintptr_t)out / sizeof(S)) % W;
        i = off == 0 ? 0 : W - off;
        i = i < count ? i : count;
        gradient_block<F, Each>(x, i, s, row, false, out);
    }
    for (; i < count; i += BLOCK)
        gradient_block<F, Each>(x + i, count - i < BLOCK ? count - i : BLOCK, s, row, streaming, out + i);
}

template <bool Each, class S>
inline void gradient_entries(const S* x, int64_t count, Scale s, RowGradient row, bool streaming, S* out) {
    const Transform f = transform_of(s);
    if (f == CAPPED) return gradient_stretch<CAPPED, Each>(x, count, s, row, streaming, out);
    if (f == SCALED) return gradient_stretch<SCALED, Each>(x, count, s, row, streaming, out);
    gradient_stretch<PLAIN, Each>(x, count, s, row, streaming, out);
}

// d/dx of `count` entries, written to `out`, which may be x itself.
template <class S>
inline void gradient_entries(const S* x, int64_t count, Scale s, RowGradient row, bool streaming, S* out) {
    if (row.slope.each != 0.0f) return gradient_entries<true>(x, count, s, row, streaming, out);
    gradient_entries<false>(x, count, s, row, streaming, out);
}

// The label's gradient carries this of it to its logit x.
inline float label_slope(float x, Scale s) {
    return s.softcap > 0.0f ? cap(x, s.inverse_softcap, s.softcap, s.scale).slope : s.scale;
}

template <class S>
inline void fill_row(S* out, int64_t count, float value) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(out + i, splat<Lanes>(value));
    store_some(out + i, splat<Lanes>(value), count - i);
}

}  // namespace RK_ISA
}  // namespace rk
