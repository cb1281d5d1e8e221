// The policy loss of any objective, the KL to a reference, the entropy bonus, the value loss, their gradients and metrics.
#include "policy_walk.h"

namespace rk {
namespace RK_ISA {
namespace {

template <class Objective>
void walk_policy(const Job& j, bool summed, void* stream) {
    using Counted = std::conditional_t<Objective::SEQUENCE, Objective, NoObjective>;
    walk<Counted>(walk_kernel<Walk<Objective, true, false, true, false>>, j, summed, stream);
}

// In the order of TERMS in reference/policy.py.
void (*const walks[])(const Job&, bool, void*) = {
    walk_policy<ClipObjective>,        walk_policy<SequenceObjective>,   walk_policy<CispoObjective>,
    walk_policy<SapoObjective>,        walk_policy<GmpoObjective>,       walk_policy<DppoObjective<false>>,
    walk_policy<DppoObjective<true>>,  walk_policy<PlainObjective>,      walk_policy<DroObjective>,
    walk_policy<KlCovObjective>,
};
static_assert(sizeof(walks) / sizeof(walks[0]) == OBJECTIVES, "a walk for each objective");

}  // namespace

// Either log_probs or values is there. `loss`, which may be null, is the sum of its parts times kl_coef, value_scale and
// entropy_scale. The scratch is that of ppo_fwd_f32, records of LONG_RECORD numbers, and `parts`
// [B, 2] for the objectives of sequences. The doubles are those of Settings in reference/policy.py.
void policy_fwd_f32(const uint8_t* mask, const float* log_probs, const float* old_log_probs, const float* advantages,
                    const float* ref_log_probs, const float* weights, const float* coefficients, const float* values,
                    const float* old_values, const float* returns, const float* entropy, const float* normalizer,
                    const float* entropy_normalizer, int64_t B, int64_t T, double term, double a, double b, double c,
                    double d, double log_ratio_clamp, double kl_estimator, double kl_gradient, double kl_coef,
                    double kl_low, double kl_high, double kl_cap, double kl_ratio_cap, double cliprange_value,
                    double value_scale, double entropy_scale, double loss_agg_mode, double entropy_agg_mode,
                    int64_t* counts, int64_t* lengths, float* parts, double* records, int* done, float* losses,
                    float* loss, float* grad_log_probs, float* grad_values, float* grad_entropy, float* stats, void* stream) {
    Job j = {};
    j.from[LOG_PROB] = log_probs, j.from[OLD_LOG_PROB] = old_log_probs, j.from[ADVANTAGE] = advantages;
    j.from[VALUE_NOW] = values, j.from[OLD_VALUE] = old_values ? old_values : values, j.from[RETURN] = returns;
    j.from[ENTROPY_NOW] = entropy, j.from[REF] = ref_log_probs;
    j.from[FACTOR] = weights, j.from[COEFFICIENT] = coefficients;
    j.mask = mask, j.B = B, j.T = T, j.N = B * T, j.width = T > 0 ? T : 1;
    j.numbers = policy_numbers(a, b, c, log_ratio_clamp);
    j.kl = {(float)kl_low, (float)kl_high, (float)kl_cap, (float)kl_ratio_cap};
    j.kl_estimator = (int)kl_estimator, j.kl_gradient = (int)kl_gradient, j.kl_coef = (float)kl_coef;
    j.value_range = (float)cliprange_value, j.value_scale = (float)value_scale, j.entropy_scale = (float)entropy_scale;
    j.share = {(int64_t)loss_agg_mode, normalizer};
    j.entropy_share = {entropy ? (int64_t)entropy_agg_mode : (int64_t)TOKEN_SUM, entropy_normalizer};
    j.counts = (Counts*)counts, j.lengths = lengths, j.parts = (SequencePart*)parts, j.records = records, j.done = done;
    j.policy_loss = losses, j.kl_loss = losses + 1, j.value_loss = losses + 2, j.entropy_loss = losses + 3;
    j.whole = {loss, nullptr, nullptr, kl_coef, value_scale, entropy_scale};
    j.grad_log_probs = log_probs ? grad_log_probs : nullptr, j.grad_values = values ? grad_values : nullptr;
    j.grad_entropy = entropy ? grad_entropy : nullptr, j.stats = stats;
    j.vector = all_aligned(j);
    if (log_probs)
        walks[(int)term](j, d != 0.0, stream);
    else
        walk<NoObjective>(walk_kernel<Walk<NoObjective, true, true, true, false>>, j, false, stream);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(policy_fwd_f32);
