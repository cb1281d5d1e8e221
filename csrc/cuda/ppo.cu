// The PPO loss and its gradients: the walk of policy_walk.h with the clipped objective and the metrics that ppo_loss has.
#include "ppo.h"

#include "policy_walk.h"

namespace rk {
namespace RK_ISA {
namespace {

template <bool Values, bool Entropy>
void (*kernel_of(bool own))(const Job) {
    return own ? walk_kernel<Walk<ClipObjective, false, Values, Entropy, true>>
               : walk_kernel<Walk<ClipObjective, false, Values, Entropy, false>>;
}

struct Product {
    const float* from;
    float* to;
    int64_t count;
};

struct Products {
    const float *loss, *policy_loss, *value_loss;  // upstream gradients, or null
    float vf_coef;
    Product log_probs, values, entropy;
    bool vector;
};

__device__ __forceinline__ void multiply(const Product& p, float scale, int64_t i, bool vector) {
    float x[ITEMS];
    load(p.from, i, p.count, vector, x);
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) x[k] *= scale;
    store(p.to, i, p.count, vector, x);
}

__global__ void __launch_bounds__(THREADS) ppo_bwd_kernel(const Products j) {
    const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * ITEMS;
    const float whole = j.loss ? *j.loss : 0.0f, policy = j.policy_loss ? *j.policy_loss : 0.0f;
    const float value = j.value_loss ? *j.value_loss : 0.0f;
    multiply(j.log_probs, whole + policy, i, j.vector);
    multiply(j.values, j.vf_coef != 0.0f ? whole + value / j.vf_coef : value, i, j.vector);
    multiply(j.entropy, whole, i, j.vector);
}

}  // namespace

// loss = policy + vf_coef value + entropy_scale entropy; it and its two parts as tensors of their own may be null.
// `counts` [COUNTING_BLOCKS, 2] and `lengths` [B] are scratch; `records` [pieces + groups, RECORD] and `done`
// [groups + 1] too, a group being GROUP pieces, and there being at least one of each.
void ppo_fwd_f32(const float* log_probs, const float* old_log_probs, const float* advantages, const uint8_t* mask,
                 const float* values, const float* old_values, const float* returns, const float* entropy,
                 const float* normalizer, int64_t B, int64_t T, double cliprange, double cliprange_high,
                 double dual_clip, double cliprange_value, int64_t aggregation, double value_scale,
                 double entropy_scale, double vf_coef, int64_t* counts, int64_t* lengths, double* records, int* done,
                 float* losses, float* loss, float* policy_loss, float* value_loss, float* grad_log_probs,
                 float* grad_values, float* grad_entropy, float* stats, void* stream) {
    Job j = {};
    j.from[LOG_PROB] = log_probs, j.from[OLD_LOG_PROB] = old_log_probs, j.from[ADVANTAGE] = advantages;
    j.from[VALUE_NOW] = values, j.from[OLD_VALUE] = old_values ? old_values : values, j.from[RETURN] = returns;
    j.from[ENTROPY_NOW] = entropy;
    j.mask = mask, j.B = B, j.T = T, j.N = B * T, j.width = T > 0 ? T : 1;
    j.numbers = policy_numbers(1.0 - cliprange, 1.0 + cliprange_high, dual_clip, __builtin_inf());
    j.value_range = (float)cliprange_value;
    j.value_scale = (float)value_scale, j.entropy_scale = (float)entropy_scale;
    j.share = {aggregation, normalizer}, j.entropy_share = {TOKEN_SUM, nullptr};
    j.counts = (Counts*)counts, j.lengths = lengths, j.records = records, j.done = done, j.stats = stats;
    j.policy_loss = losses, j.value_loss = losses + 1, j.entropy_loss = losses + 2;
    j.whole = {loss, policy_loss, value_loss, 0.0, vf_coef, entropy_scale};
    j.grad_log_probs = grad_log_probs;
    j.grad_values = values ? grad_values : nullptr, j.grad_entropy = entropy ? grad_entropy : nullptr;
    j.vector = all_aligned(j);
    const bool own = j.share.own_length();
    walk<NoObjective>(values ? (entropy ? kernel_of<true, true>(own) : kernel_of<true, false>(own))
                             : (entropy ? kernel_of<false, true>(own) : kernel_of<false, false>(own)),
                      j, false, stream);
}

void ppo_bwd_f32(const float* grad_loss, const float* grad_policy_loss, const float* grad_value_loss, double vf_coef,
                 const float* grad_log_probs, const float* grad_values, const float* grad_entropy, int64_t log_probs,
                 int64_t values, int64_t entropy, float* out_log_probs, float* out_values, float* out_entropy,
                 void* stream) {
    Products j = {grad_loss, grad_policy_loss, grad_value_loss, (float)vf_coef,
                  {grad_log_probs, out_log_probs, log_probs}, {grad_values, out_values, values},
                  {grad_entropy, out_entropy, entropy}, true};
    int64_t most = 0;
    for (const Product& p : {j.log_probs, j.values, j.entropy}) {
        j.vector = j.vector && (p.count == 0 || all_aligned({p.from, p.to}));
        most = p.count > most ? p.count : most;
    }
    launch(ppo_bwd_kernel, pieces_of(most, THREADS * ITEMS), THREADS, stream, j);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(ppo_fwd_f32);
RK_REGISTER(ppo_bwd_f32);
