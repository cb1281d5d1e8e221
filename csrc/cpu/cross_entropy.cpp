// What cross-entropy needs of rows of logits beside their log-probs: sums of the entries that are not -inf, and how many
// they are.
#include "rows.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int64_t PIECE = 1 << 16;  // entries that a thread takes at once

struct Sums {
    const void* logits;
    int64_t stride, V;
    const float* temperatures;  // null: one for all rows
    double temperature, softcap;
    const uint8_t* kept;
    double *total, *count;
};

// Adds a block, padded with -inf, to a row's sums.
inline void add_sums(Block b, double& total, double& count) {
    Lanes sum[4] = {};
    Ints banned = {};  // minus their number, lane by lane
    for (int64_t i = 0; i < b.count; i += 4 * W)
        for (int k = 0; k < 4; ++k) {
            const Lanes z = load(b.x + i + k * W);
            const Ints out = z == splat<Lanes>(-__builtin_inff());
            sum[k] += out ? Lanes{} : z;
            banned += out;
        }
    total += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    count += (double)b.count + sum_lanes(__builtin_convertvector(banned, Lanes));
}

template <Transform F, class S>
void add_row(const S* x, int64_t V, Scale s, double& total, double& count) {
    float buffer[BLOCK];
    for (int64_t i = 0; i < V; i += BLOCK) add_sums(stage<F>(x + i, V - i < BLOCK ? V - i : BLOCK, s, buffer), total, count);
}

template <class S>
void sum_rows(void* context, int64_t begin, int64_t end) {
    const Sums& j = *(const Sums*)context;
    for (int64_t n = begin; n < end; ++n) {
        if (!j.kept[n]) continue;
        const S* x = (const S*)j.logits + n * j.stride;
        const Scale s = make_scale(j.temperatures ? (double)j.temperatures[n] : j.temperature, j.softcap);
        const Transform f = transform_of(s);
        const auto add = f == CAPPED ? add_row<CAPPED, S> : f == SCALED ? add_row<SCALED, S> : add_row<PLAIN, S>;
        add(x, j.V, s, j.total[n], j.count[n]);
    }
}

}  // namespace

// Adds to the sums of the rows that are kept. softcap 0: none.
void row_sums(const void* logits, int64_t dtype, int64_t stride, int64_t N, int64_t V, const float* temperatures,
              double temperature, double softcap, const uint8_t* kept, double* total, double* count, int64_t threads) {
    Sums j = {logits, stride, V, temperatures, temperature, softcap, kept, total, count};
    const auto rows = dtype == F32 ? sum_rows<float> : dtype == BF16 ? sum_rows<Bf16> : sum_rows<Half>;
    parallel_for(N, V >= PIECE ? 1 : PIECE / (V > 0 ? V : 1), threads, rows, &j);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(row_sums);
