// The policy loss of every objective, its gradients and its metrics, in one pass over the tokens; the PPO loss is one of
// its calls. Objectives of whole sequences pass over the rows first.
//
// The tokens lie flat and are cut into pieces of a fixed size; what a piece adds up to is stored, and the pieces are
// merged in order, so that the result has the same bits on any number of threads. A piece is walked in blocks.
#include "policy_parts.h"

namespace rk {
namespace RK_ISA {
namespace {

enum Aggregation { TOKEN_MEAN, TOKEN_SUM, SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM_NORM };

struct Settings {  // as in reference/policy.py
    double term, a, b, c, d, log_ratio_clamp, kl_estimator, kl_gradient, kl_coef, kl_low, kl_high, kl_cap, kl_ratio_cap,
        cliprange_value, value_scale, entropy_scale, loss_agg_mode, entropy_agg_mode;
};

struct Weights {
    double weight;           // of a token
    const int64_t* lengths;  // kept tokens of each row, which divide its weight once more; null: they do not
};

struct Job {
    const uint8_t* mask;
    const float *log_probs, *old_log_probs, *advantages;  // null without a policy
    const float *ref_log_probs, *weights, *coefficients, *values, *old_values, *returns, *entropy;  // null: absent
    float *grad_log_probs, *grad_values, *grad_entropy;
    int64_t B, T, piece;
    Settings settings;
    PolicyNumbers<float> numbers;
    Weights weight, entropy_weight;
    SequencePart* sequences;  // of each row
    Totals* totals;

    int term() const { return (int)settings.term; }
};

struct Buffers {  // of a block
    alignas(64) int32_t keep[BLOCK];
    alignas(64) float weight[BLOCK], entropy_weight[BLOCK], factor[BLOCK], of_sequence[BLOCK], length[BLOCK];
};

struct Place {  // where a block stands in the piece
    int64_t t;
    Block block;
    Stream next;  // what is needed after this part
};

typedef void (*PolicyWalk)(const Job&, Buffers&, Place, float pilot, Doubles* sums, Lanes* ratio_max);

template <class Objective, bool Clamped>
void walk_policy(const Job& j, Buffers& b, Place p, float pilot, Doubles* sums, Lanes* ratio_max) {
    typedef PolicyPart<Objective, Clamped> Part;
    const Part part = {splat_numbers<Lanes>(j.numbers), splat<Lanes>(pilot), sums, ratio_max};
    const float* const inputs[] = {j.log_probs + p.t, j.old_log_probs + p.t, j.advantages + p.t,
                                   j.weights ? b.factor : b.weight,
                                   Objective::COEFFICIENT ? j.coefficients + p.t : b.of_sequence, b.length};
    const float* from[Part::INPUTS];
    for (int k = 0; k < Part::INPUTS; ++k) from[k] = inputs[k];
    walk(part, from, j.grad_log_probs + p.t, p.next, p.block);
}

PolicyWalk policy_walk(const Job& j) {
    static const PolicyWalk walks[OBJECTIVES] = {
        walk_policy<ClipObjective, true>,        walk_policy<SequenceObjective, true>,
        walk_policy<CispoObjective, true>,       walk_policy<SapoObjective, true>,
        walk_policy<GmpoObjective, true>,        walk_policy<DppoObjective<false>, true>,
        walk_policy<DppoObjective<true>, true>,  walk_policy<PlainObjective, true>,
        walk_policy<DroObjective, true>,         walk_policy<KlCovObjective, true>,
    };
    const bool clamped = j.settings.log_ratio_clamp < __builtin_inf();
    return clamped || j.term() != OBJ_CLIP ? walks[j.term()] : walk_policy<ClipObjective, false>;
}

template <int Estimator, int Gradient>
void walk_kl(const Job& j, Buffers& b, Place p, Doubles* sums) {
    typedef KlPart<Estimator, Gradient> Part;
    const Settings& s = j.settings;
    const RefKlNumbers<Lanes> range = {splat<Lanes>((float)s.kl_low), splat<Lanes>((float)s.kl_high),
                                       splat<Lanes>((float)s.kl_cap), splat<Lanes>((float)s.kl_ratio_cap)};
    const Part part = {range, splat_numbers<Lanes>(j.numbers), splat<Lanes>((float)s.kl_coef), sums};
    float* const grad = j.grad_log_probs + p.t;
    const float* const inputs[] = {j.log_probs + p.t, j.ref_log_probs + p.t, b.weight, grad, j.old_log_probs + p.t};
    const float* from[Part::INPUTS];
    for (int k = 0; k < Part::INPUTS; ++k) from[k] = inputs[k];
    walk(part, from, grad, p.next, p.block);
}

template <int Estimator>
void walk_kl(const Job& j, Buffers& b, Place p, Doubles* sums) {
    switch ((int)j.settings.kl_gradient) {
        case REF_PLAIN: return walk_kl<Estimator, REF_PLAIN>(j, b, p, sums);
        case REF_STRAIGHT_THROUGH: return walk_kl<Estimator, REF_STRAIGHT_THROUGH>(j, b, p, sums);
        case REF_RATIO: return walk_kl<Estimator, REF_RATIO>(j, b, p, sums);
        default: return walk_kl<Estimator, REF_STRAIGHT_THROUGH_RATIO>(j, b, p, sums);
    }
}

void walk_kl(const Job& j, Buffers& b, Place p, Doubles* sums) {
    switch ((int)j.settings.kl_estimator) {
        case REF_K1: return walk_kl<REF_K1>(j, b, p, sums);
        case REF_K2: return walk_kl<REF_K2>(j, b, p, sums);
        case REF_K3: return walk_kl<REF_K3>(j, b, p, sums);
        default: return walk_kl<REF_ABS>(j, b, p, sums);
    }
}

void fill_weights(const Weights& w, int64_t T, int64_t begin, int64_t count, float* to) {
    fill_by_row(T, begin, count, to, [&](int64_t row) {
        return (float)(w.weight / (double)(w.lengths[row] > 0 ? w.lengths[row] : 1));
    });
}

struct Pilots {
    float ratio, error, target;
};

Pilots pilots_of(const Job& j, int64_t begin, int64_t end) {
    int64_t places[PILOT];
    int found = 0;
    for (int64_t t = begin; t < end && found < PILOT; ++t)
        if (j.mask[t]) places[found++] = t;
    Pilots out = {};
    if (j.log_probs && j.term() == OBJ_SEQUENCE) {
        out.ratio = median_of(places, found, [&](int64_t t) { return j.sequences[t / j.T].of_sequence; });
    } else if (j.log_probs) {
        const float raw = median_of(places, found, [&](int64_t t) { return j.log_probs[t] - j.old_log_probs[t]; });
        out.ratio = exp_f32(held_log_ratio(raw, j.numbers));
    }
    if (j.values) {
        out.error = median_of(places, found, [&](int64_t t) { return j.values[t] - j.returns[t]; });
        out.target = median_of(places, found, [&](int64_t t) { return j.returns[t]; });
    }
    return {finite_or_0(out.ratio), finite_or_0(out.error), finite_or_0(out.target)};
}

void walk_piece(const Job& j, int64_t begin, int64_t end, Totals* out) {
    const Pilots pilots = pilots_of(j, begin, end);
    const Settings& s = j.settings;
    const PolicyWalk policy = policy_walk(j);
    Doubles sums[SUMS] = {};
    Lanes ratio_max = {};
    const ValuePart value = {splat<Lanes>((float)s.cliprange_value), splat<Lanes>((float)s.value_scale),
                             splat<Lanes>(pilots.error), splat<Lanes>(pilots.target), sums};
    const EntropyPart entropy = {splat<Lanes>((float)s.entropy_scale), sums};
    Stream streams[5];
    int parts = 0;
    if (j.weights) streams[parts++] = {j.weights, j.weights, j.weights, j.grad_log_probs};
    if (j.log_probs) streams[parts++] = {j.log_probs, j.old_log_probs, j.advantages, j.grad_log_probs};
    if (j.ref_log_probs) streams[parts++] = {j.ref_log_probs, j.ref_log_probs, j.ref_log_probs, j.grad_log_probs};
    if (j.values) streams[parts++] = {j.values, j.old_values, j.returns, j.grad_values};
    if (j.entropy) streams[parts++] = {j.entropy, j.entropy, j.entropy, j.grad_entropy};
    Buffers b;
    for (int i = 0; i < BLOCK; ++i) b.weight[i] = (float)j.weight.weight;
    for (int i = 0; i < BLOCK; ++i) b.entropy_weight[i] = (float)j.entropy_weight.weight;
    int64_t kept = 0;
    for (int64_t t = begin; t < end; t += BLOCK) {
        const int64_t count = end - t < BLOCK ? end - t : BLOCK;
        const Block block = {j.mask + t, b.keep, count};
        for (int64_t i = 0; i < count; ++i) b.keep[i] = block.mask[i] ? -1 : 0;
        kept += count_kept(block.mask, count);
        if (j.weight.lengths) fill_weights(j.weight, j.T, t, count, b.weight);
        if (j.entropy_weight.lengths) fill_weights(j.entropy_weight, j.T, t, count, b.entropy_weight);
        if (j.sequences) {
            fill_by_row(j.T, t, count, b.of_sequence, [&](int64_t row) { return j.sequences[row].of_sequence; });
            fill_by_row(j.T, t, count, b.length, [&](int64_t row) { return j.sequences[row].length; });
        }
        int part = 0;
        const auto place = [&] {
            const bool last = ++part >= parts;
            return Place{t, block, last ? streams[0].at(t + BLOCK < end ? t + BLOCK : t) : streams[part].at(t)};
        };
        if (j.weights) walk(WeightPart{sums}, {j.weights + t, b.weight}, b.factor, place().next, block);
        if (j.log_probs) policy(j, b, place(), pilots.ratio, sums, &ratio_max);
        if (j.ref_log_probs) walk_kl(j, b, place(), sums);
        if (j.values)
            walk(value, {j.values + t, j.old_values + t, j.returns + t, b.weight}, j.grad_values + t, place().next, block);
        if (j.entropy) walk(entropy, {j.entropy + t, b.entropy_weight}, j.grad_entropy + t, place().next, block);
    }
    *out = {};
    double* sum = out->sum;
    for (int k = 0; k < SUMS; ++k)
        for (int i = 0; i < W; ++i) sum[k] += sums[k][i];
    out->ratio_max = max_lanes(ratio_max);
    out->ratios = moments(pilots.ratio, sum + RATIO_GAP, sum[RATIO_SQUARE], (double)kept);
    out->errors = moments(pilots.error, sum + ERROR_GAP, sum[ERROR_SQUARE], (double)kept);
    out->targets = moments(pilots.target, sum + TARGET_GAP, sum[TARGET_SQUARE], (double)kept);
}

template <class Objective>
SequencePart sequence_of(const Job& j, int64_t row) {
    const int64_t begin = row * j.T;
    const PolicyNumbers<Lanes> numbers = splat_numbers<Lanes>(j.numbers);
    Doubles log_ratios = {}, advantages = {};
    const auto visit = [&](const float* log_prob, const float* old, const float* advantage, Ints keep) {
        const Lanes a = keep ? load(advantage) : Lanes{};
        const Lanes u = Objective::log_ratio_of(load(log_prob) - load(old), a, numbers);
        add(log_ratios, keep ? u : Lanes{});
        add(advantages, a);
    };
    const auto keep_of = [](const uint8_t* mask) {
        Ints keep = {};
        for (int i = 0; i < W; ++i) keep[i] = mask[i] ? -1 : 0;
        return keep;
    };
    int64_t t = 0;
    for (; t + W <= j.T; t += W) {
        const int64_t at = begin + t;
        if (any_kept(j.mask + at))
            visit(j.log_probs + at, j.old_log_probs + at, j.advantages + at, keep_of(j.mask + at));
    }
    if (t < j.T) {
        const size_t rest = (size_t)(j.T - t);
        const float* from[] = {j.log_probs + begin + t, j.old_log_probs + begin + t, j.advantages + begin + t};
        float x[3][W] = {};
        uint8_t mask[W] = {};
        for (int k = 0; k < 3; ++k) __builtin_memcpy(x[k], from[k], rest * sizeof(float));
        __builtin_memcpy(mask, j.mask + begin + t, rest);
        visit(x[0], x[1], x[2], keep_of(mask));
    }
    SequenceSums sums = {0.0, 0.0, count_kept(j.mask + begin, j.T)};
    for (int i = 0; i < W; ++i) sums.log_ratio += log_ratios[i], sums.advantage += advantages[i];
    return Objective::sequence_part(sums, j.settings.d != 0.0);
}

// stats in the order of STATS in reference/policy.py; a mean over nothing is 0 / 0.
void write_results(const Job& j, int64_t pieces, double tokens, float* losses, float* stats) {
    Totals all = {};
    for (int64_t i = 0; i < pieces; ++i) {
        const Totals& one = j.totals[i];
        for (int k = 0; k < SUMS; ++k) all.sum[k] += one.sum[k];
        all.ratio_max = one.ratio_max > all.ratio_max ? one.ratio_max : all.ratio_max;
        all.ratios = moments_merge(all.ratios, one.ratios);
        all.errors = moments_merge(all.errors, one.errors);
        all.targets = moments_merge(all.targets, one.targets);
    }
    const double ratio_mean = all.sum[RATIO_GAP] / tokens;
    const double ratio_max = ratio_mean == ratio_mean ? all.ratio_max : ratio_mean;  // a maximum drops a NaN
    const auto mean = [&](const void* present, double sum) { return present ? sum / tokens : 0.0; };
    const float* policy = j.log_probs;
    const double factor = all.sum[FACTOR];
    const double results[] = {
        tokens,
        mean(policy, 0.5 * all.sum[LOG_RATIO_SQUARE]),
        mean(policy, all.sum[LOW] + all.sum[HIGH]),
        mean(policy, all.sum[BOUNDED]),
        policy ? ratio_mean : 0.0,
        mean(policy, all.ratios.m2),
        policy ? ratio_max : 0.0,
        mean(j.entropy, all.sum[ENTROPY]),
        mean(j.values, all.sum[HELD]),
        j.values ? 1.0 - all.errors.m2 / all.targets.m2 : 0.0,
        mean(j.values, all.sum[VALUE]),
        mean(j.values, all.sum[TARGET_GAP]),
        mean(policy, all.sum[K1]),
        mean(policy, all.sum[K3]),
        mean(policy, all.sum[LOW]),
        mean(policy, all.sum[HIGH]),
        mean(j.ref_log_probs, all.sum[REF_KL]),
        j.weights ? factor * factor / (tokens * all.sum[FACTOR_SQUARE]) : 0.0,
        mean(j.weights, all.sum[FILTERED]),
    };
    for (size_t i = 0; i < sizeof(results) / sizeof(results[0]); ++i) stats[i] = (float)results[i];
    const double parts[] = {all.sum[POLICY_LOSS], all.sum[KL_LOSS], 0.5 * all.sum[VALUE_LOSS], all.sum[ENTROPY_LOSS]};
    for (int i = 0; i < 4; ++i) losses[i] = (float)parts[i];
}

struct Counts {
    int64_t tokens, sequences;
};

Counts count_rows(const Job& j, int64_t* lengths) {  // and the kept tokens of each row
    Counts counts = {0, 0};
    for (int64_t b = 0; b < j.B; ++b) {
        lengths[b] = count_kept(j.mask + b * j.T, j.T);
        counts.tokens += lengths[b];
        counts.sequences += lengths[b] > 0;
    }
    return counts;
}

Weights weigh(const Job& j, Counts counts, double mode, const float* normalizer, const int64_t* lengths) {
    const int aggregation = (int)mode;
    if (aggregation == TOKEN_SUM) return {1.0, nullptr};
    const int64_t count = aggregation == TOKEN_MEAN ? counts.tokens : counts.sequences;
    const double weight = 1.0 / (normalizer ? (double)*normalizer : count > 0 ? (double)count : 1.0);
    if (aggregation == SEQ_MEAN_TOKEN_SUM_NORM) return {weight / (double)(j.T > 0 ? j.T : 1), nullptr};
    return {weight, aggregation == SEQ_MEAN_TOKEN_MEAN ? lengths : nullptr};
}

}  // namespace

// `settings` are those of reference/policy.py. `sequences` [B, 2], `lengths` [B] and `workspace` are scratch.
void policy_fwd_f32(const uint8_t* mask, const float* log_probs, const float* old_log_probs, const float* advantages,
                    const float* ref_log_probs, const float* weights, const float* coefficients, const float* values,
                    const float* old_values, const float* returns, const float* entropy, const float* normalizer,
                    const float* entropy_normalizer, const double* settings, int64_t B, int64_t T, int64_t piece,
                    int64_t* lengths, float* sequences, double* workspace, float* losses, float* grad_log_probs,
                    float* grad_values, float* grad_entropy, float* stats, int64_t threads) {
    Job j = {mask, log_probs, old_log_probs, advantages, ref_log_probs, weights, coefficients, values,
             old_values ? old_values : values, returns, entropy, grad_log_probs, grad_values, grad_entropy, B, T, piece,
             *(const Settings*)settings, {}, {}, {}, (SequencePart*)sequences, (Totals*)workspace};
    const Settings& s = j.settings;
    j.numbers = policy_numbers(s.a, s.b, s.c, s.log_ratio_clamp);
    const Counts counts = count_rows(j, lengths);
    j.weight = weigh(j, counts, s.loss_agg_mode, normalizer, lengths);
    j.entropy_weight = weigh(j, counts, s.entropy_agg_mode, entropy_normalizer, lengths);
    if (sequences)
        parallel_for(
            B, T > 0 && T < piece ? piece / T : 1, threads,
            [](void* context, int64_t begin, int64_t end) {
                const Job& j = *(const Job*)context;
                const auto of = j.term() == OBJ_GMPO ? sequence_of<GmpoObjective> : sequence_of<SequenceObjective>;
                for (int64_t row = begin; row < end; ++row) j.sequences[row] = of(j, row);
            },
            &j);
    const int64_t pieces = (B * T + piece - 1) / piece;
    parallel_for(
        pieces, 1, threads,
        [](void* context, int64_t begin, int64_t end) {
            const Job& j = *(const Job*)context;
            const int64_t N = j.B * j.T;
            for (int64_t i = begin; i < end; ++i)
                walk_piece(j, i * j.piece, (i + 1) * j.piece < N ? (i + 1) * j.piece : N, j.totals + i);
        },
        &j);
    write_results(j, pieces, (double)counts.tokens, losses, stats);
}

void policy_bwd_f32(const float* grad_loss, const float* grad_policy_loss, const float* grad_value_loss, double vf_coef,
                    const float* grad_log_probs, const float* grad_values, const float* grad_entropy, int64_t log_probs,
                    int64_t values, int64_t entropy, float* out_log_probs, float* out_values, float* out_entropy,
                    int64_t threads) {
    struct Product {
        const float* from;
        float* to;
        float scale;
        int64_t count;
    };
    const double whole = grad_loss ? *grad_loss : 0.0;
    const double policy = grad_policy_loss ? *grad_policy_loss : 0.0;
    const double value = grad_value_loss ? *grad_value_loss : 0.0;
    Product products[] = {{grad_log_probs, out_log_probs, (float)(whole + policy), log_probs},
                          {grad_values, out_values, (float)(vf_coef != 0.0 ? whole + value / vf_coef : value), values},
                          {grad_entropy, out_entropy, (float)whole, entropy}};
    const int64_t most = log_probs > values ? log_probs : values;
    parallel_for(
        most > entropy ? most : entropy, 32768, threads,
        [](void* context, int64_t begin, int64_t end) {
            for (int i = 0; i < 3; ++i) {
                const Product& p = ((const Product*)context)[i];
                const int64_t stop = end < p.count ? end : p.count;
                for (int64_t t = begin; t < stop; ++t) p.to[t] = p.scale * p.from[t];
            }
        },
        products);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(policy_fwd_f32);
RK_REGISTER(policy_bwd_f32);
