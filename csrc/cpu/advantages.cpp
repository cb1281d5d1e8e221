// GAE, KL-shaped rewards and whitening over the rows (responses) of a batch.
//
// A row is walked from its last kept token to its first: in chunks, which stay in the first-level cache while their
// rewards, advantages and moments are made, and in segments, which begin sums of their own. So the segments of one long
// row can be shared among threads; whether they are or not, the same numbers are added in the same order.
#include "advantages.h"

#include <stdlib.h>

#include "advantage_chunks.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int64_t CHUNK = 256;              // tokens; a multiple of RK_LANES
constexpr int64_t SEGMENT = 16384;          // a multiple of CHUNK
constexpr int64_t PIECE = 32768;            // tokens, about 15 us of work, or it is not worth waking a thread for
constexpr int64_t STREAM_BYTES = 16 << 20;  // results larger than this go past the caches

struct Rows {  // [B, T] with a row stride, or packed rows at offsets cu[b] .. cu[b + 1]
    const int64_t* cu;
    int64_t B, T;

    int64_t length(int64_t b) const { return cu ? cu[b + 1] - cu[b] : T; }
    int64_t start(int64_t b, int64_t stride) const { return cu ? cu[b] : b * stride; }
    int64_t total() const { return B > 0 ? start(B, T) : 0; }
    // A unit is a segment of a row. Row b owns those from here to the next row's first; the last of them may be empty.
    int64_t first_unit(int64_t b) const { return start(b, T) / SEGMENT + b; }
    int64_t units() const { return B > 0 ? first_unit(B) : 0; }
    int64_t row_of(int64_t unit) const {
        int64_t low = 0, high = B;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (first_unit(middle) <= unit ? low : high) = middle;
        }
        return low;
    }
    // `count` rows or units cut into pieces worth waking a thread for.
    int64_t grain(int64_t count) const {
        const int64_t mean = count > 0 ? total() / count : 0, piece = PIECE / (mean > 0 ? mean : 1);
        return piece > 0 ? piece : 1;
    }
};

struct Unit {  // what is known of a segment
    Moments moments;
    GaePart part;  // first of the segment itself; then, in place of its advantage, that of the token after it
    int64_t end;   // in a row's first unit: one past its last kept token
};

void find_ends(const Rows& rows, const uint8_t* mask, int64_t mask_stride, Unit* units) {
    for (int64_t b = 0; b < rows.B; ++b)
        units[rows.first_unit(b)].end = kept_end(mask ? mask + rows.start(b, mask_stride) : nullptr, rows.length(b));
}

struct Job {
    const float *scores, *log_probs, *ref, *rewards, *values, *last_values;
    const uint8_t* mask;
    int64_t log_probs_stride, ref_stride, rewards_stride, values_stride, mask_stride;
    Rows rows;
    Decay decay;
    float kl_coef, clip;
    int64_t kl_estimator;  // 0: the rewards are given
    bool stream;
    Moments* moments;  // of the advantages, one for each row; null: nobody wants them
    Unit* units;       // scratch, if the segments of rows are shared among threads
    float* out[4];     // advantages, returns; if the rewards are made here, rewards and kl
};

struct Row {
    const float *log_probs, *ref, *rewards, *values;
    const uint8_t* keep;
    float* out[4];
    float score, last_value;
    int64_t end;
};

// Row b; what stands behind its last kept token is written here.
Row row_of(const Job& j, int64_t b, bool clear) {
    const Rows& rows = j.rows;
    const int64_t length = rows.length(b);
    Row r = {};
    r.keep = j.mask ? j.mask + rows.start(b, j.mask_stride) : nullptr;
    r.end = j.units ? j.units[rows.first_unit(b)].end : kept_end(r.keep, length);
    r.values = j.values + rows.start(b, j.values_stride);
    r.last_value = j.last_values ? j.last_values[b] : 0.0f;
    for (int i = 0; i < 4; ++i)
        if (j.out[i]) r.out[i] = j.out[i] + rows.start(b, rows.T);
    for (int i = 0; i < 4 && clear; ++i)
        if (j.out[i]) zero(r.out[i], r.end, length, j.stream);
    if (j.kl_estimator == 0) {
        r.rewards = j.rewards + rows.start(b, j.rewards_stride);
        return r;
    }
    r.log_probs = j.log_probs + rows.start(b, j.log_probs_stride);
    r.ref = j.ref + rows.start(b, j.ref_stride);
    r.rewards = r.out[2];
    const float score = j.scores[b] > j.clip ? j.clip : j.scores[b];
    r.score = score < -j.clip ? -j.clip : score;
    return r;
}

// What the s-th segment of a row, counted from the end, is handed by the tokens after it.
Carry carry_into(const Row& r, int64_t s, double advantage) {
    int64_t next = r.end - s * SEGMENT;
    while (next < r.end && r.keep && !r.keep[next]) ++next;
    return {advantage, 0.0, next < r.end ? r.values[next] : r.last_value, 0};
}

// A segment: rewards and kl, if Shape; advantages, returns and moments, if Write. The carry is left at its start.
template <bool Shape, bool Write>
void segment(const Job& j, const Row& r, int64_t s, Carry& carry, Unit& unit) {
    alignas(4 * W) float buffers[4][CHUNK];
    const int64_t high = r.end - s * SEGMENT, low = high > SEGMENT ? high - SEGMENT : 0;
    const auto kl_of = j.kl_estimator == KL_K1   ? kl_chunk<KL_K1>
                       : j.kl_estimator == KL_K2 ? kl_chunk<KL_K2>
                                                 : kl_chunk<KL_K3>;
    const bool moments = Write && j.moments;
    const bool straight = !Shape && !moments && (!j.stream || (aligned(r.out[0] + high) && aligned(r.out[1] + high)));
    const auto gae_of = !Write ? gae_chunk<NOTHING> : straight && j.stream ? gae_chunk<STREAMED> : gae_chunk<CACHED>;
    const bool buffered = j.stream && !straight;
    Sums sums;
    carry.segment = 0.0;
    carry.kept = 0;
    for (int64_t t = high; t > low;) {
        const int64_t n = straight || t - low < CHUNK ? t - low : CHUNK;
        t -= n;
        float* to[4] = {};
        for (int i = Write ? 0 : 2; i < (Shape ? 4 : 2); ++i) to[i] = buffered ? buffers[i] : r.out[i] + t;
        const uint8_t* keep = r.keep ? r.keep + t : nullptr;
        if (Shape) {
            kl_of(r.log_probs + t, r.ref + t, keep, n, j.kl_coef, to[2], to[3]);
            if (t + n == r.end) to[2][n - 1] += r.score;
        }
        gae_of(Shape ? to[2] : r.rewards + t, r.values + t, keep, n, j.decay, carry, to[0], to[1]);
        if (moments) add_chunk(to[0], keep, n, sums);
        for (int i = Write ? 0 : 2; i < (Shape ? 4 : 2) && buffered; ++i) flush(r.out[i] + t, to[i], n);
    }
    if (moments) unit.moments = sums.moments();
    if (!Write) unit.part = {carry.segment, j.decay.to_the(carry.kept)};
}

inline Moments joined(Moments a, Moments b) { return a.count == 0.0 ? b : b.count == 0.0 ? a : moments_merge(a, b); }

// One thread walks the row to its start.
void whole_row(const Job& j, int64_t b) {
    const Row r = row_of(j, b, true);
    Carry carry = carry_into(r, 0, 0.0);
    if (r.end <= SEGMENT && !j.kl_estimator && !j.stream) {  // as segment() would; short rows notice its preparations
        gae_chunk<CACHED>(r.rewards, r.values, r.keep, r.end, j.decay, carry, r.out[0], r.out[1]);
        return;
    }
    double later = 0.0;
    Moments row = {0.0, 0.0, 0.0};
    for (int64_t s = 0; s * SEGMENT < r.end; ++s) {
        Unit unit = {};
        if (s > 0) carry.advantage = later = gae_join({carry.segment, j.decay.to_the(carry.kept)}, later);
        if (j.kl_estimator)
            segment<true, true>(j, r, s, carry, unit);
        else
            segment<false, true>(j, r, s, carry, unit);
        row = joined(row, unit.moments);
    }
    if (j.moments) j.moments[b] = row;
}

// Two visits of each segment: what it is worth by itself, and, when all that follows it is known, its results.
void first_visit(const Job& j, int64_t b, int64_t s, int64_t unit) {
    const Row r = row_of(j, b, s == 0);
    Carry carry = carry_into(r, s, 0.0);
    if (j.kl_estimator)
        segment<true, false>(j, r, s, carry, j.units[unit]);
    else
        segment<false, false>(j, r, s, carry, j.units[unit]);
}

void second_visit(const Job& j, int64_t b, int64_t s, int64_t unit) {
    const Row r = row_of(j, b, false);
    Carry carry = carry_into(r, s, j.units[unit].part.advantage);
    segment<false, true>(j, r, s, carry, j.units[unit]);
}

void carry_over(const Job& j) {
    int64_t unit = 0;
    for (int64_t b = 0; b < j.rows.B; ++b) {
        double advantage = 0.0;
        for (; unit < j.rows.first_unit(b + 1); ++unit) {
            const GaePart part = j.units[unit].part;
            j.units[unit].part.advantage = advantage;
            advantage = gae_join(part, advantage);
        }
    }
}

// The moments of rows from those of their segments, in the order in which one thread meets them.
void row_moments(const Rows& rows, const Unit* units, Moments* moments) {
    for (int64_t b = 0, unit = 0; b < rows.B; ++b) {
        moments[b] = {0.0, 0.0, 0.0};
        for (; unit < rows.first_unit(b + 1); ++unit) moments[b] = joined(moments[b], units[unit].moments);
    }
}

// call(job, row, segment, unit) for each unit, in threads.
template <class J>
struct UnitCall {
    const J* job;
    void (*call)(const J&, int64_t, int64_t, int64_t);
};

template <class J>
void for_units(const J& job, void (*call)(const J&, int64_t, int64_t, int64_t), int64_t threads) {
    UnitCall<J> context = {&job, call};
    const int64_t units = job.rows.units();
    parallel_for(
        units, job.rows.grain(units), threads,
        [](void* context, int64_t begin, int64_t end) {
            const UnitCall<J>& c = *(const UnitCall<J>*)context;
            const Rows& rows = c.job->rows;
            int64_t b = rows.row_of(begin);
            for (int64_t unit = begin; unit < end; ++unit) {
                while (b + 1 < rows.B && rows.first_unit(b + 1) <= unit) ++b;
                c.call(*c.job, b, unit - rows.first_unit(b), unit);
            }
        },
        &context);
}

// The moments of all rows, added up in their order.
Moments merged(const Moments* rows, int64_t B) {
    Moments all = {0.0, 0.0, 0.0};
    for (int64_t b = 0; b < B; ++b) {
        all.count += rows[b].count;
        all.mean += rows[b].count * rows[b].mean;
    }
    all.mean /= all.count > 0.0 ? all.count : 1.0;
    for (int64_t b = 0; b < B; ++b) {
        const double gap = rows[b].mean - all.mean;
        all.m2 += rows[b].m2 + rows[b].count * gap * gap;
    }
    return all;
}

struct WhitenJob {
    const float* x;
    int64_t x_stride;
    const uint8_t* mask;
    int64_t mask_stride;
    Rows rows;
    Moments* moments;
    Unit* units;
    Whitening whitening;
    float* out;
};

Moments segment_moments(const WhitenJob& j, int64_t b, int64_t s, int64_t end) {
    const uint8_t* keep = j.mask ? j.mask + j.rows.start(b, j.mask_stride) : nullptr;
    const int64_t high = end - s * SEGMENT, low = high > SEGMENT ? high - SEGMENT : 0;
    Sums sums;
    if (high > 0) add_chunk(j.x + j.rows.start(b, j.x_stride) + low, keep ? keep + low : nullptr, high - low, sums);
    return sums.moments();
}

void unit_moments(const WhitenJob& j, int64_t b, int64_t s, int64_t unit) {
    j.units[unit].moments = segment_moments(j, b, s, j.units[j.rows.first_unit(b)].end);
}

void whiten_unit(const WhitenJob& j, int64_t b, int64_t s, int64_t) {
    const uint8_t* keep = j.mask ? j.mask + j.rows.start(b, j.mask_stride) : nullptr;
    const int64_t high = j.rows.length(b) - s * SEGMENT, low = high > SEGMENT ? high - SEGMENT : 0;
    if (high <= 0) return;
    const float* x = j.x + j.rows.start(b, j.x_stride) + low;
    whiten_chunk(x, keep ? keep + low : nullptr, high - low, j.whitening, j.out + j.rows.start(b, j.rows.T) + low);
}

void run(Job& j, double gamma, double lam, int64_t threads) {
    const int64_t B = j.rows.B, total = j.rows.total();
    int64_t longest = 0, results = 0;
    for (int64_t b = 0; b < B; ++b) longest = j.rows.length(b) > longest ? j.rows.length(b) : longest;
    for (int i = 0; i < 4; ++i) results += j.out[i] ? total * (int64_t)sizeof(float) : 0;
    j.stream = results >= STREAM_BYTES;
    j.decay.fill(gamma, lam);
    // Two visits cost about half as much again, but are shared evenly.
    const bool share = longest > SEGMENT && (double)longest * (double)threads > 1.5 * (double)total;
    j.units = share ? (Unit*)malloc((size_t)j.rows.units() * sizeof(Unit)) : nullptr;
    if (j.units) {
        find_ends(j.rows, j.mask, j.mask_stride, j.units);
        for_units(j, first_visit, threads);
        carry_over(j);
        for_units(j, second_visit, threads);
        if (j.moments) row_moments(j.rows, j.units, j.moments);
        free(j.units);
        return;
    }
    parallel_for(
        B, j.rows.grain(B), threads,
        [](void* context, int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) whole_row(*(const Job*)context, b);
        },
        &j);
}

}  // namespace

void gae_fwd_f32(const float* rewards, int64_t rewards_stride, const float* values, int64_t values_stride,
                 const uint8_t* mask, int64_t mask_stride, const float* last_values, const int64_t* cu_seqlens,
                 int64_t B, int64_t T, double gamma, double lam, float* advantages, float* returns, int64_t threads) {
    Job job = {};
    job.rewards = rewards, job.rewards_stride = rewards_stride;
    job.values = values, job.values_stride = values_stride;
    job.mask = mask, job.mask_stride = mask_stride;
    job.last_values = last_values;
    job.rows = {cu_seqlens, B, T};
    job.out[0] = advantages, job.out[1] = returns;
    run(job, gamma, lam, threads);
}

void rlhf_advantages_fwd_f32(const float* scores, const float* log_probs, int64_t log_probs_stride, const float* ref,
                             int64_t ref_stride, const float* values, int64_t values_stride, const uint8_t* mask,
                             int64_t mask_stride, const int64_t* cu_seqlens, int64_t B, int64_t T, double kl_coef,
                             double gamma, double lam, int64_t kl_estimator, double reward_clip, int64_t whiten,
                             double* row_stats, float* advantages, float* returns, float* rewards, float* kl,
                             int64_t threads) {
    Job job = {};
    job.scores = scores;
    job.log_probs = log_probs, job.log_probs_stride = log_probs_stride;
    job.ref = ref, job.ref_stride = ref_stride;
    job.values = values, job.values_stride = values_stride;
    job.mask = mask, job.mask_stride = mask_stride;
    job.rows = {cu_seqlens, B, T};
    job.kl_coef = (float)kl_coef, job.clip = (float)reward_clip;
    job.kl_estimator = kl_estimator;
    job.moments = whiten ? (Moments*)row_stats : nullptr;
    job.out[0] = advantages, job.out[1] = returns, job.out[2] = rewards, job.out[3] = kl;
    run(job, gamma, lam, threads);
    if (!whiten) return;
    const Whitening whitening = whitening_of(merged(job.moments, B), true);
    const WhitenJob rest = {advantages, T, mask, mask_stride, job.rows, nullptr, nullptr, whitening, advantages};
    for_units(rest, whiten_unit, threads);
}

void whiten_stats_f32(const float* x, int64_t x_stride, const uint8_t* mask, int64_t mask_stride, int64_t B, int64_t T,
                      double* row_stats, double* stats, int64_t threads) {
    WhitenJob job = {x, x_stride, mask, mask_stride, {nullptr, B, T}, (Moments*)row_stats, nullptr, {}, nullptr};
    job.units = T > SEGMENT ? (Unit*)malloc((size_t)job.rows.units() * sizeof(Unit)) : nullptr;
    if (job.units) {
        find_ends(job.rows, mask, mask_stride, job.units);
        for_units(job, unit_moments, threads);
        row_moments(job.rows, job.units, job.moments);
        free(job.units);
    } else {
        parallel_for(
            B, job.rows.grain(B), threads,
            [](void* context, int64_t begin, int64_t end) {
                const WhitenJob& j = *(const WhitenJob*)context;
                for (int64_t b = begin; b < end; ++b) {
                    const int64_t end = kept_end(j.mask ? j.mask + b * j.mask_stride : nullptr, j.rows.T);
                    j.moments[b] = {0.0, 0.0, 0.0};
                    for (int64_t s = 0; s * SEGMENT < end; ++s)
                        j.moments[b] = joined(j.moments[b], segment_moments(j, b, s, end));
                }
            },
            &job);
    }
    *(Moments*)stats = merged((const Moments*)row_stats, B);
}

void whiten_fwd_f32(const float* x, int64_t x_stride, const uint8_t* mask, int64_t mask_stride, int64_t B, int64_t T,
                    const double* stats, int64_t center, float* out, int64_t threads) {
    const Whitening whitening = whitening_of(*(const Moments*)stats, center != 0);
    const WhitenJob job = {x, x_stride, mask, mask_stride, {nullptr, B, T}, nullptr, nullptr, whitening, out};
    for_units(job, whiten_unit, threads);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(gae_fwd_f32);
RK_REGISTER(whiten_stats_f32);
RK_REGISTER(whiten_fwd_f32);
RK_REGISTER(rlhf_advantages_fwd_f32);
