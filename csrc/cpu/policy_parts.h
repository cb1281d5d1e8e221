// The parts of a policy loss on a block of tokens: weights, policy, KL to the reference, values, entropy.
//
// A part visits a vector of tokens, sums in registers and returns the gradients; at the end of a block its sums are
// added to doubles. The parts walk a block one after the other, which leaves each of them enough registers, and each
// fetches what the next one needs.
#pragma once
#include "advantages.h"
#include "policy.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int W = RK_LANES;
constexpr int LINE = 16;     // floats in a cache line
constexpr int BLOCK = 1024;  // tokens
constexpr int PILOT = 16;  // kept tokens whose median the squares of a piece are taken around

// What is summed over the kept tokens. A GAP is the distance from a pilot, a number close to the mean; a SQUARE that of
// the distance, which does not cancel as a sum of plain squares would.
enum Sum {
    POLICY_LOSS, LOG_RATIO_SQUARE, LOW, HIGH, BOUNDED, RATIO_GAP, RATIO_SQUARE,
    VALUE_LOSS, HELD, VALUE, ERROR_GAP, ERROR_SQUARE, TARGET_GAP, TARGET_SQUARE, ENTROPY_LOSS, ENTROPY,
    K1, K3, KL_LOSS, REF_KL, FACTOR, FACTOR_SQUARE, FILTERED, SUMS
};

typedef double Doubles __attribute__((vector_size(8 * RK_LANES)));

template <class L>
inline void add(Doubles& sum, const L& lanes) {
    sum += __builtin_convertvector(lanes, Doubles);
}

inline void tally(Ints& counts, Ints where) { counts -= where; }  // a truth is -1

struct Totals {  // of a piece
    double sum[SUMS];
    double ratio_max;
    Moments ratios, errors, targets;
};

// visit() takes a vector of each input, the last of which are 0 where the tokens end; INPUTS says how many.
template <class Objective, bool Clamped>  // Clamped: the log-ratio is
struct PolicyPart {
    static constexpr int INPUTS = Objective::SEQUENCE ? 6 : Objective::COEFFICIENT ? 5 : 4;
    PolicyNumbers<Lanes> numbers;
    Lanes pilot;
    Doubles* sums;
    Lanes* ratio_max;
    Lanes loss = {}, squares = {}, gap = {}, square = {}, peak = {}, k1 = {}, k3 = {};
    Ints low = {}, high = {}, bounded = {};

    // x: log_prob, old_log_prob, advantage, weight; of_sequence and length, or the coefficient
    inline Lanes visit(const Lanes* x, Ints keep) {
        const Lanes zero = {};
        PolicyToken<Lanes> token = policy_token<Clamped>(keep ? x[0] : zero, keep ? x[1] : zero, keep ? x[2] : zero,
                                                         keep ? x[0] - x[1] : zero, numbers);
        if constexpr (Objective::SEQUENCE) token.of_sequence = keep ? x[4] : zero, token.length = x[5];
        if constexpr (Objective::COEFFICIENT) token.coefficient = keep ? x[4] : zero;
        const PolicyTerm<Lanes> term = Objective::of(token, numbers);
        const Lanes ratio = keep ? term.ratio : zero;
        const Lanes off = keep ? term.ratio - pilot : zero;
        loss += x[3] * term.loss;
        squares += token.raw * token.raw;
        gap += off;
        square += off * off;
        peak = ratio > peak ? ratio : peak;
        tally(low, term.low);  // without `keep`: no band ends at a ratio of 1 with an advantage of 0
        tally(high, term.high);
        tally(bounded, term.bounded & keep);
        k1 -= token.raw;
        k3 += kl_k3_of(token.exp, -token.raw);
        return x[3] * term.slope;
    }

    void flush() const {
        add(sums[POLICY_LOSS], loss);
        add(sums[LOG_RATIO_SQUARE], squares);
        add(sums[LOW], low);
        add(sums[HIGH], high);
        add(sums[BOUNDED], bounded);
        add(sums[RATIO_GAP], gap);
        add(sums[RATIO_SQUARE], square);
        add(sums[K1], k1);
        add(sums[K3], k3);
        *ratio_max = peak > *ratio_max ? peak : *ratio_max;
    }
};

struct WeightPart {  // its "gradient" is the weight times the token's factor
    static constexpr int INPUTS = 2;
    Doubles* sums;
    Lanes factor = {}, square = {};
    Ints filtered = {};

    inline Lanes visit(const Lanes* x, Ints keep) {  // x: factor, weight
        const Lanes one = keep ? x[0] : Lanes{};
        factor += one;
        square += one * one;
        tally(filtered, (one == Lanes{}) & keep);
        return x[1] * one;
    }

    void flush() const {
        add(sums[FACTOR], factor);
        add(sums[FACTOR_SQUARE], square);
        add(sums[FILTERED], filtered);
    }
};

template <int Estimator, int Gradient>
struct KlPart {  // adds to the gradient of the policy part
    static constexpr bool RATIO = Gradient == REF_RATIO || Gradient == REF_STRAIGHT_THROUGH_RATIO;
    static constexpr int INPUTS = RATIO ? 5 : 4;
    RefKlNumbers<Lanes> range;
    PolicyNumbers<Lanes> numbers;
    Lanes coef;
    Doubles* sums;
    Lanes loss = {}, kl = {};

    inline Lanes visit(const Lanes* x, Ints keep) {  // x: log_prob, ref_log_prob, weight, gradient; old_log_prob
        const Lanes e = keep ? x[0] - x[1] : Lanes{};
        PolicyToken<Lanes> token = {};
        if constexpr (RATIO) token = policy_token(keep ? x[0] : Lanes{}, keep ? x[4] : Lanes{}, Lanes{}, numbers);
        const RefKlTerm<Lanes> term = ref_kl_term<Estimator, Gradient>(e, token.ratio, token.stuck, range);
        loss += x[2] * term.value;
        kl += term.value;
        return x[3] + coef * (x[2] * term.slope);
    }

    void flush() const {
        add(sums[KL_LOSS], loss);
        add(sums[REF_KL], kl);
    }
};

struct ValuePart {
    static constexpr int INPUTS = 4;
    Lanes range, scale, error_pilot, target_pilot;
    Doubles* sums;
    Lanes loss = {}, value = {}, error_gap = {}, error_square = {}, target_gap = {}, target_square = {};
    Ints held = {};

    inline Lanes visit(const Lanes* x, Ints keep) {  // x: value, old value, return, weight
        const Lanes v = keep ? x[0] : Lanes{};
        const Lanes r = keep ? x[2] : Lanes{};
        const ValueTerm<Lanes> term = value_term(v, keep ? x[1] : Lanes{}, r, range);
        const Lanes error_off = keep ? term.error - error_pilot : Lanes{};
        const Lanes target_off = keep ? r - target_pilot : Lanes{};
        loss += x[3] * term.square;
        value += v;
        error_gap += error_off;
        error_square += error_off * error_off;
        target_gap += target_off;
        target_square += target_off * target_off;
        tally(held, term.held);
        return scale * x[3] * term.slope;
    }

    void flush() const {
        add(sums[VALUE_LOSS], loss);
        add(sums[HELD], held);
        add(sums[VALUE], value);
        add(sums[ERROR_GAP], error_gap);
        add(sums[ERROR_SQUARE], error_square);
        add(sums[TARGET_GAP], target_gap);
        add(sums[TARGET_SQUARE], target_square);
    }
};

struct EntropyPart {
    static constexpr int INPUTS = 2;
    Lanes scale;
    Doubles* sums;
    Lanes loss = {}, entropy = {};

    inline Lanes visit(const Lanes* x, Ints keep) {  // x: entropy, weight
        const Lanes kept = keep ? x[0] : Lanes{};
        loss += x[1] * kept;
        entropy += kept;
        return scale * x[1];
    }

    void flush() const {
        add(sums[ENTROPY_LOSS], loss);
        add(sums[ENTROPY], entropy);
    }
};

int64_t count_kept(const uint8_t* mask, int64_t T) {
    typedef uint8_t Bytes __attribute__((vector_size(4 * RK_LANES)));
    constexpr int64_t N = sizeof(Bytes);
    int64_t count = 0, t = 0;
    while (t + N <= T) {
        const int64_t stop = t + 255 * N < T ? t + 255 * N : T;  // a byte counts to 255
        Bytes counts = {};
        for (; t + N <= stop; t += N) {
            Bytes bytes;
            __builtin_memcpy(&bytes, mask + t, N);
            counts -= (Bytes)(bytes != Bytes{});
        }
        for (int i = 0; i < (int)N; ++i) count += counts[i];
    }
    for (; t < T; ++t) count += mask[t] != 0;
    return count;
}

inline bool any_kept(const uint8_t* mask) {
    uint32_t words[W / 4], any = 0;
    __builtin_memcpy(words, mask, sizeof(words));
    for (int i = 0; i < W / 4; ++i) any |= words[i];
    return any != 0;
}

inline Ints load_keep(const int32_t* from) {
    Ints lanes;
    __builtin_memcpy(&lanes, from, sizeof(lanes));
    return lanes;
}

// A block's tokens: which of them are kept, as bytes and as lanes.
struct Block {
    const uint8_t* mask;
    const int32_t* keep;
    int64_t count;
};

// What a part reads and writes in memory.
struct Stream {
    const float *a, *b, *c;
    float* grad;

    Stream at(int64_t t) const { return {a + t, b + t, c + t, grad + t}; }
};

template <class Part>
void walk(Part part, const float* const (&from)[Part::INPUTS], float* to, Stream next, Block block) {
    constexpr int N = Part::INPUTS;
    int64_t t = 0;
    for (; t + W <= block.count; t += W) {
        Lanes grad = {};
        if (t % LINE == 0) __builtin_prefetch(next.grad + t, 1, 2);
        if (any_kept(block.mask + t)) {
            if (t % LINE == 0) {
                __builtin_prefetch(next.a + t, 0, 2);
                __builtin_prefetch(next.b + t, 0, 2);
                __builtin_prefetch(next.c + t, 0, 2);
            }
            const Ints kept = load_keep(block.keep + t);
            Lanes x[N];
            for (int k = 0; k < N; ++k) x[k] = load(from[k] + t);
            grad = part.visit(x, kept);
            grad = kept ? grad : Lanes{};
        }
        store(to + t, grad);
    }
    if (t < block.count) {  // the last tokens of all, filled up with absent ones
        const size_t bytes = (size_t)(block.count - t) * sizeof(float);
        float rest[W] = {};
        Lanes x[N];
        for (int k = 0; k < N; ++k) {
            __builtin_memcpy(rest, from[k] + t, bytes);
            x[k] = load(rest);
        }
        int32_t keep[W] = {};
        __builtin_memcpy(keep, block.keep + t, bytes);
        const Ints kept = load_keep(keep);
        const Lanes grad = part.visit(x, kept);
        store(rest, kept ? grad : Lanes{});
        __builtin_memcpy(to + t, rest, bytes);
    }
    part.flush();
}

// Fills to[i] with number(row) of each of the tokens from `begin` on.
template <class Number>
void fill_by_row(int64_t T, int64_t begin, int64_t count, float* to, Number number) {
    for (int64_t t = 0; t < count;) {
        const int64_t row = (begin + t) / T;
        const int64_t stop = (row + 1) * T - begin < count ? (row + 1) * T - begin : count;
        const float x = number(row);
        for (; t < stop; ++t) to[t] = x;
    }
}

// Median over the tokens at `places`: robust, and exactly the number where all are equal.
template <class Number>
float median_of(const int64_t* places, int count, Number number) {
    float sorted[PILOT] = {};
    for (int i = 0; i < count; ++i) {
        const float one = number(places[i]);
        int k = i;
        for (; k > 0 && sorted[k - 1] > one; --k) sorted[k] = sorted[k - 1];
        sorted[k] = one;
    }
    return sorted[count / 2];
}

float finite_or_0(float x) { return absolute(x) <= 3.40282347e38f ? x : 0.0f; }

// Moments from the sums around a pilot; *gap becomes the plain sum.
Moments moments(float pilot, double* gap, double square, double count) {
    if (count == 0.0) return {0.0, 0.0, 0.0};
    const double mean = pilot + *gap / count;
    const double m2 = square - *gap * *gap / count;
    *gap += count * pilot;
    return {count, mean, m2 < 0.0 ? 0.0 : m2};
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
