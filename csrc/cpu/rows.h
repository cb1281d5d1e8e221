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

inline double scaled_entry(float x, Scale s) {
    if (s.softcap > 0.0f) return (double)cap(x, s.inverse_softcap, s.softcap, s.scale).z;
    return (double)x * (double)s.scale;
}

// Entries as floats, ready for the exp: the source itself, or a copy in `buffer` padded with -inf to a multiple of 4 W.
struct Block {
    const float* x;
    int64_t count;
};

template <bool Cap, class S>
inline Block stage(const S* x, int64_t count, Scale s, float* buffer) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        const Lanes lanes = load(x + i);
        store(buffer + i, Cap ? cap(lanes, s.inverse_softcap, s.softcap, s.scale).z : lanes);
    }
    if (i < count) {
        const Lanes lanes = load_some(x + i, count - i, -__builtin_inff());
        store(buffer + i, Cap ? cap(lanes, s.inverse_softcap, s.softcap, s.scale).z : lanes);
        i += W;
    }
    for (; i % (4 * W) != 0; i += W) store(buffer + i, splat<Lanes>(-__builtin_inff()));
    return {buffer, i};
}

template <bool Cap>
inline Block stage(const float* x, int64_t count, Scale s, float* buffer) {
    if (!Cap && count % (4 * W) == 0) return {x, count};
    return stage<Cap, float>(x, count, s, buffer);
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

// Adds a block to the statistics. A NaN anywhere makes the sum NaN. While the exps are computed, memory is asked for
// the entries that come next, from `ahead` on.
template <bool Entropy, class S>
inline void add_block(Block b, float scale, const S* ahead, RowStats& stats) {
    const float max = block_max(b) * scale;
    if (!(max > -__builtin_inff())) {
        if (has_nan(b)) stats.sum = __builtin_nan("");
        return;
    }
    if (max > stats.max) stats = raise_max(stats, max);
    const float shift = -stats.max;
    Lanes sum[4] = {}, weighted[4] = {};
    for (int64_t i = 0; i < b.count; i += 4 * W)
        for (int k = 0; k < 4; ++k) {
            if (k * W * sizeof(S) % 64 == 0) __builtin_prefetch(ahead + i + k * W);
            const Lanes d = load(b.x + i + k * W) * scale + shift;
            const Lanes e = exp_nonpositive_f32(d);
            sum[k] += e;
            if (Entropy) weighted[k] += e * (d < splat<Lanes>(EXP_FLOOR) ? splat<Lanes>(EXP_FLOOR) : d);  // not 0 * -inf
        }
    stats.sum += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (Entropy) stats.weighted += sum_lanes((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
}

// Adds `count` entries to the statistics.
template <bool Entropy, bool Cap, class S>
inline void add_stretch(const S* x, int64_t count, Scale s, RowStats& stats) {
    float buffer[BLOCK];
    for (int64_t i = 0; i < count; i += BLOCK) {
        const int64_t size = count - i < BLOCK ? count - i : BLOCK;
        add_block<Entropy>(stage<Cap>(x + i, size, s, buffer), Cap ? 1.0f : s.scale, x + i + size, stats);
    }
}

// d/dx of a vector of entries; 0 where x is -inf.
template <bool Cap>
inline Lanes slope_of(Lanes x, Scale s, float shift, float log_sum, RowSlope row) {
    Lanes z_minus_max, slope;
    if (Cap) {
        const Capped<Lanes> c = cap(x, s.inverse_softcap, s.softcap, s.scale);
        z_minus_max = c.z + shift;
        slope = c.slope;
    } else {
        z_minus_max = x * s.scale + shift;
        slope = splat<Lanes>(s.scale);
    }
    return entry_gradient(z_minus_max - log_sum, row) * slope;
}

template <class S>
inline void write(S* to, Lanes lanes, bool streaming) {
    if (streaming)
        stream(to, lanes);
    else
        store(to, lanes);
}

// d/dx of `count` entries, written to `out`, which may be x itself. A row without probability (max = -inf) gives 0.
template <bool Cap, class S>
inline void gradient_stretch(const S* x, int64_t count, Scale s, float max, float log_sum, RowSlope row,
                             bool streaming, S* out) {
    const float shift = max == -__builtin_inff() ? 0.0f : -max;
    int64_t i = 0;
    if (streaming) {  // up to the first aligned vector
        const int64_t off = (int64_t)((uintptr_t)out / sizeof(S)) % W;
        i = off == 0 ? 0 : W - off;
        i = i < count ? i : count;
        store_some(out, slope_of<Cap>(load_some(x, i, 0.0f), s, shift, log_sum, row), i);
    }
    for (; i + W <= count; i += W) write(out + i, slope_of<Cap>(load(x + i), s, shift, log_sum, row), streaming);
    if (i < count)
        store_some(out + i, slope_of<Cap>(load_some(x + i, count - i, 0.0f), s, shift, log_sum, row), count - i);
}

template <class S>
inline void fill_row(S* out, int64_t count, float value) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(out + i, splat<Lanes>(value));
    store_some(out + i, splat<Lanes>(value), count - i);
}

}  // namespace RK_ISA
}  // namespace rk
