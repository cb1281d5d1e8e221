// A chunk of a row's tokens, small enough for the first-level cache: its KL, advantages, moments, and whitening.
//
// A chunk is walked backwards in blocks of RK_LANES tokens. A block is scanned by doubling; if its mask has gaps, the
// kept tokens are moved together first. So padding and packing give the same bits, wherever the padding stands.
#pragma once
#include "advantages.h"
#include "lanes.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int H = W / 2;
constexpr int64_t AHEAD = 512;  // tokens that a prefetch runs ahead

typedef double Doubles __attribute__((vector_size(8 * H)));
typedef int64_t Longs __attribute__((vector_size(8 * H)));

struct Steps {  // factors of the scan
    Lanes one, two, group, groups;
    Lanes carry;  // carry[i] = decay^(W - i)
    float gamma;

    // A_i = sum over j >= i of decay^(j - i) delta_j within the block: first in groups of 4 lanes, then between them.
    Lanes scan(Lanes delta) const {
        delta += one * shift_in_group<1>(delta);
        delta += two * shift_in_group<2>(delta);
        if (W > 4) delta += group * first_of_group_ahead<1>(delta);
        if (W > 8) delta += groups * first_of_group_ahead<2>(delta);
        return delta;
    }
};

struct Decay {
    double decay;
    double power[W + 1];   // power[n] = decay^n
    float weights[2 * W];  // decay^(W - i), 0 from W on: the factors of a carry into n lanes begin at W - n
    Steps steps;

    void fill(double gamma, double lam) {
        decay = gamma * lam;
        power[0] = 1.0;
        for (int i = 0; i < W; ++i) power[i + 1] = power[i] * decay;
        for (int i = 0; i < 2 * W; ++i) weights[i] = i < W ? (float)power[W - i] : 0.0f;
        steps.gamma = (float)gamma;
        for (int i = 0; i < W; ++i) {
            steps.one[i] = (float)power[1];
            steps.two[i] = (float)power[2];
            steps.group[i] = (float)power[4 - i % 4];
            steps.groups[i] = (float)power[W > 8 ? 8 - i % 4 : 0];
            steps.carry[i] = weights[i];
        }
    }

    double to_the(int64_t count) const {
        double out = 1.0;
        for (double factor = decay; count > 0; count >>= 1, factor *= factor) out *= count & 1 ? factor : 1.0;
        return out;
    }
};

struct Carry {
    double advantage;  // of the kept token that follows
    double segment;    // the same, of a row that ends with the segment
    float value;       // of the kept token that follows
    int64_t kept;      // tokens of the segment so far
};

struct Block {
    Lanes advantage, returns;
};

inline void advance(Carry& carry, Lanes sum, Lanes value, int n, double factor) {
    carry.advantage = gae_join({(double)sum[0], factor}, carry.advantage);
    carry.segment = gae_join({(double)sum[0], factor}, carry.segment);
    carry.value = value[0];
    carry.kept += n;
}

inline Block full_block(Lanes reward, Lanes value, double factor, Carry& carry, const Steps& steps) {
    Lanes next = shift_down<1>(value);
    next[W - 1] = carry.value;
    const Lanes sum = steps.scan(gae_delta(reward, next, value, steps.gamma));
    const Lanes a = sum + steps.carry * (float)carry.advantage;
    advance(carry, sum, value, W, factor);
    return {a, a + value};
}

// n kept lanes in front, zeros behind them.
inline Block short_block(Lanes reward, Lanes value, int n, Carry& carry, const Steps& steps, const Decay& d) {
    const Lanes next = lane_numbers() == Ints{} + (n - 1) ? Lanes{} + carry.value : shift_down<1>(value);
    const Lanes sum = steps.scan(gae_delta(reward, next, value, steps.gamma));  // 0 in the lanes from n on
    const Lanes a = sum + load(d.weights + (W - n)) * (float)carry.advantage;
    advance(carry, sum, value, n, d.power[n]);
    return {a, a + value};
}

inline Block sparse_block(Lanes reward, Lanes value, unsigned bits, Carry& carry, const Steps& steps, const Decay& d) {
    if (bits == 0) return {Lanes{}, Lanes{}};
    const int n = __builtin_popcount(bits);
    const Block block = short_block(together(reward, bits, n), together(value, bits, n), n, carry, steps, d);
    return {apart(block.advantage, bits), apart(block.returns, bits)};
}

enum Output { NOTHING, CACHED, STREAMED };

template <Output Out>
inline void put(float* to, Lanes lanes) {
    if (Out == STREAMED)
        stream(to, lanes);
    else if (Out == CACHED)
        store(to, lanes);
}

// n tokens of a row. STREAMED wants the end of the results aligned to whole blocks.
template <Output Out>
void gae_chunk(const float* reward, const float* value, const uint8_t* keep, int64_t n, const Decay& d, Carry& carry,
               float* advantage, float* returns) {
    const Steps steps = d.steps;  // a copy, which stores to floats cannot change: it stays in registers
    const double factor = d.power[W];
    Carry c = carry;
    int64_t t = n;
    while (t >= W) {
        t -= W;
        // Rows are read backwards, which the hardware foresees less well.
        __builtin_prefetch(reward + t - AHEAD);
        __builtin_prefetch(value + t - AHEAD);
        const unsigned bits = keep ? kept_bits(keep + t) : ALL;
        const Lanes r = load(reward + t), v = load(value + t);
        const Block block = bits == ALL ? full_block(r, v, factor, c, steps) : sparse_block(r, v, bits, c, steps, d);
        put<Out>(advantage + t, block.advantage);
        put<Out>(returns + t, block.returns);
    }
    if (t > 0) {
        const unsigned all = (1u << t) - 1, bits = keep ? kept_bits(keep, t) : all;
        const Lanes r = load_part(reward, t), v = load_part(value, t);
        const Block block = bits == all ? short_block(r, v, (int)t, c, steps, d)
                                        : sparse_block(r, v, bits, c, steps, d);
        if (Out != NOTHING) store_part(advantage, block.advantage, t);
        if (Out != NOTHING) store_part(returns, block.returns, t);
    }
    carry = c;
}

template <int Estimator>
inline Lanes kl_block(Lanes p, Lanes q, Ints kept) {
    const Lanes zero = {};
    return kl_estimate<Estimator>(log_ratio(kept ? p : zero, kept ? q : zero));
}

template <int Estimator>
void kl_chunk(const float* log_prob, const float* ref, const uint8_t* keep, int64_t n, float kl_coef, float* reward,
              float* kl) {
    int64_t t = 0;
    for (; t + W <= n; t += W) {
        const Ints kept = keep ? kept_lanes(keep + t) : ~Ints{};
        const Lanes k = kl_block<Estimator>(load(log_prob + t), load(ref + t), kept);
        store(kl + t, k);
        store(reward + t, -kl_coef * k);
    }
    const int64_t rest = n - t;
    if (rest == 0) return;
    const Ints kept = keep ? lanes_of(kept_bits(keep + t, rest)) : first_lanes(rest);
    const Lanes k = kl_block<Estimator>(load_part(log_prob + t, rest), load_part(ref + t, rest), kept);
    store_part(kl + t, k, rest);
    store_part(reward + t, -kl_coef * k, rest);
}

struct Sums {  // of x - shift and its square, lane by lane in double; shift is one of the x
    double shift = 0.0;
    int64_t count = 0;
    Doubles sum[2] = {}, squares[2] = {};

    void add(const float* x, int n) {  // W floats, of which the first n count
        if (count == 0) shift = (double)x[0];
        for (int h = 0; h < 2; ++h) {
            typedef float Half __attribute__((vector_size(4 * H)));
            Half half;
            __builtin_memcpy(&half, x + h * H, sizeof(half));
            Doubles gap = __builtin_convertvector(half, Doubles) - shift;
            if (n < W) {
                Longs lane = {};
                for (int i = 0; i < H; ++i) lane[i] = h * H + i;
                gap = lane < Longs{} + n ? gap : Doubles{};
            }
            sum[h] += gap;
            squares[h] += gap * gap;
        }
        count += n;
    }

    Moments moments() const {
        double total[H], square[H];
        for (int i = 0; i < H; ++i) {
            total[i] = sum[0][i] + sum[1][i];
            square[i] = squares[0][i] + squares[1][i];
        }
        for (int n = H / 2; n > 0; n /= 2)
            for (int i = 0; i < n; ++i) {
                total[i] += total[i + n];
                square[i] += square[i + n];
            }
        return moments_of((double)count, shift, total[0], square[0]);
    }
};

void add_chunk(const float* x, const uint8_t* keep, int64_t n, Sums& sums) {
    Sums s = sums;
    float kept[W];
    int64_t t = n;
    while (t > 0) {
        const int64_t count = t < W ? t : W;
        t -= count;
        const unsigned bits = keep ? count < W ? kept_bits(keep, count) : kept_bits(keep + t) : (1u << count) - 1;
        if (bits == ALL) {
            s.add(x + t, W);
        } else if (bits != 0) {
            const int number = __builtin_popcount(bits);
            store(kept, together(count < W ? load_part(x, count) : load(x + t), bits, number));
            s.add(kept, number);
        }
    }
    sums = s;
}

void whiten_chunk(const float* x, const uint8_t* keep, int64_t n, Whitening w, float* out) {
    const Lanes zero = {};
    int64_t t = 0;
    for (; t + W <= n; t += W) {
        const Ints kept = keep ? kept_lanes(keep + t) : ~Ints{};
        store(out + t, kept ? whiten(load(x + t), w) : zero);
    }
    const int64_t rest = n - t;
    if (rest == 0) return;
    const Ints kept = keep ? lanes_of(kept_bits(keep + t, rest)) : first_lanes(rest);
    store_part(out + t, kept ? whiten(load_part(x + t, rest), w) : zero, rest);
}

// One past the last kept token.
inline int64_t kept_end(const uint8_t* keep, int64_t T) {
    if (!keep) return T;
    for (uint64_t eight = 0; T >= 8; T -= 8) {
        __builtin_memcpy(&eight, keep + T - 8, 8);
        if (eight != 0) break;
    }
    while (T > 0 && !keep[T - 1]) --T;
    return T;
}

inline bool aligned(const float* address) { return (uintptr_t)address % (4 * W) == 0; }

void zero(float* out, int64_t begin, int64_t end, bool past_caches) {
    for (; past_caches && begin < end && !aligned(out + begin); ++begin) out[begin] = 0.0f;
    for (; begin + W <= end; begin += W) past_caches ? stream(out + begin, Lanes{}) : store(out + begin, Lanes{});
    if (begin < end) store_part(out + begin, Lanes{}, end - begin);
}

// A buffer of the first-level cache to its place in memory, past the caches.
void flush(float* to, const float* from, int64_t n) {
    int64_t i = 0;
    for (; i < n && !aligned(to + i); ++i) to[i] = from[i];
    for (; i + W <= n; i += W) stream(to + i, load(from + i));
    for (; i < n; ++i) to[i] = from[i];
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
