// libFuzzer over the native CPU kernels, without Python: one instruction set a binary, bounds and arithmetic checked.
//
// The first byte chooses a target, the others its shapes, strides, flags and numbers. A target calls kernels through the
// registry and checks what is cheap to state: no number is made from nothing, zeros under masks, finite results from
// finite input with garbage beside it. Memory::call adds what holds for all: same bits in any order of the pieces, inputs
// untouched, outputs written to the end. A kernel without a target stops the run.
#include "logits.h"
#include "tokens.h"

namespace rk {

static Entry* first_entry = nullptr;

int add(Entry* entry) {
    entry->next = first_entry;
    first_entry = entry;
    return 0;
}

void parallel_for(int64_t count, int64_t grain, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
    const int64_t pieces = (count + grain - 1) / grain;
    for (int64_t i = 0; i < pieces; ++i) {
        const int64_t begin = (fuzz::reverse_pieces ? pieces - 1 - i : i) * grain;
        body(context, begin, begin + grain < count ? begin + grain : count);
    }
}

}  // namespace rk

namespace fuzz {

bool reverse_pieces = false;

const rk::Entry* Memory::find(const char* name) {
    for (const rk::Entry* entry = rk::first_entry; entry; entry = entry->next)
        if (!strcmp(entry->name, name)) return entry;
    REQUIRE(false, "no kernel is called %s", name);
}

namespace {

struct Target {
    void (*run)(Source&, Memory&);
    std::vector<const char*> kernels;  // that it calls
};

const Target kTargets[] = {
    {gae, {"gae_fwd_f32"}},
    {rlhf_advantages, {"rlhf_advantages_fwd_f32"}},
    {whiten, {"whiten_stats_f32", "whiten_fwd_f32"}},
    {bradley_terry, {"bradley_terry_fwd_f32", "bradley_terry_bwd_f32"}},
    {plackett_luce, {"plackett_luce_fwd_f32", "bradley_terry_bwd_f32"}},
    {policy, {"policy_fwd_f32", "policy_bwd_f32"}},
    {logprobs, {"logprobs_fwd", "token_statistics_fwd", "logprobs_bwd"}},
    {row_sums, {"row_sums"}},
    {kl, {"kl_fwd", "kl_bwd"}},
    {approx_kl, {"approx_kl_fwd", "approx_kl_bwd"}},
    {preference, {"preference_fwd_f32", "preference_bwd_f32"}},
    {linear, {"linear_fold_f32", "linear_fold_extras_f32", "linear_gradient_f32"}},
};

bool has_target(const char* kernel) {
    for (const Target& target : kTargets)
        for (const char* name : target.kernels)
            if (!strcmp(name, kernel)) return true;
    return false;
}

}  // namespace
}  // namespace fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) {
    for (const rk::Entry* entry = rk::first_entry; entry; entry = entry->next)
        REQUIRE(fuzz::has_target(entry->name), "the kernel %s has no target", entry->name);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    fuzz::Source source(data, size);
    const int64_t target = source.below(sizeof(fuzz::kTargets) / sizeof(fuzz::kTargets[0]));
    source.seed();
    fuzz::Memory memory(source);
    fuzz::kTargets[target].run(source, memory);
    return 0;
}
