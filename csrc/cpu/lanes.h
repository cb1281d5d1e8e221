// Vectors from masked or too few entries: partial loads, and kept lanes moved together and apart again.
//
// Bit i of `bits` stands for lane i, 1 = keep.
#pragma once
#include "rk.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace rk {
namespace RK_ISA {
namespace {

constexpr int W = RK_LANES;
constexpr unsigned ALL = (1u << W) - 1;

inline unsigned kept_bits(const uint8_t* keep) {
#if RK_LANES == 16
    const __m128i bytes = _mm_loadu_si128((const __m128i*)keep);
    return (unsigned)_mm_test_epi8_mask(bytes, bytes);
#elif RK_LANES == 8
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)keep);
    return ~(unsigned)_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128())) & ALL;
#else
    unsigned bits = 0;
    for (int i = 0; i < W; ++i) bits |= (unsigned)(keep[i] != 0) << i;
    return bits;
#endif
}

inline unsigned kept_bits(const uint8_t* keep, int64_t count) {
#if RK_LANES == 16
    const __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)((1u << count) - 1), keep);
    return (unsigned)_mm_test_epi8_mask(bytes, bytes);
#else
    unsigned bits = 0;
    for (int i = 0; i < W; ++i) bits |= i < count ? (unsigned)(keep[i] != 0) << i : 0u;
    return bits;
#endif
}

inline Ints lane_numbers() {
    Ints out = {};
    for (int i = 0; i < W; ++i) out[i] = i;
    return out;
}

// All ones in the first `count` lanes.
inline Ints first_lanes(int64_t count) { return lane_numbers() < Ints{} + (int32_t)count; }

// All ones in the kept lanes. Written out: GCC 12 takes a conversion of byte vectors apart, byte by byte.
inline Ints kept_lanes(const uint8_t* keep) {
#if RK_LANES == 16
    return (Ints)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)keep)) != Ints{};
#elif RK_LANES == 8
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)keep)) != Ints{};
#else
    return Ints{keep[0], keep[1], keep[2], keep[3]} != Ints{};
#endif
}

inline Ints lanes_of(unsigned bits) {
    return (((Ints{} + 1) << lane_numbers()) & (Ints{} + (int32_t)bits)) != Ints{};
}

// Within each four lanes: out[i] = lanes[i + By], 0 where there is no such lane.
template <int By>
inline Lanes shift_in_group(Lanes lanes) {
#if RK_LANES == 16
    return (Lanes)_mm512_bsrli_epi128((__m512i)lanes, 4 * By);
#elif RK_LANES == 8
    return (Lanes)_mm256_bsrli_epi128((__m256i)lanes, 4 * By);
#else
    return shift_down<By>(lanes);
#endif
}

// In each of four lanes the first of the four that stand By fours further on, 0 where there are none.
template <int By>
inline Lanes first_of_group_ahead(Lanes lanes) {
#if RK_LANES == 16
    const Ints from = (lane_numbers() & ~3) + 4 * By;  // from 16 on: the zeros
    return (Lanes)_mm512_permutex2var_ps((__m512)lanes, (__m512i)from, _mm512_setzero_ps());
#elif RK_LANES == 8
    const __m256 ahead = _mm256_permute2f128_ps((__m256)lanes, (__m256)lanes, 0x81);
    return (Lanes)_mm256_shuffle_ps(ahead, ahead, 0);
#else
    (void)lanes;
    return Lanes{};
#endif
}

// The first `count` lanes from memory, the others 0; and back.
inline Lanes load_part(const float* from, int64_t count) {
#if RK_LANES == 16
    return (Lanes)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#elif RK_LANES == 8
    return (Lanes)_mm256_maskload_ps(from, (__m256i)first_lanes(count));
#else
    Lanes out = {};
    for (int i = 0; i < W; ++i) out[i] = i < count ? from[i] : 0.0f;
    return out;
#endif
}

inline void store_part(float* to, Lanes lanes, int64_t count) {
#if RK_LANES == 16
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)lanes);
#elif RK_LANES == 8
    _mm256_maskstore_ps(to, (__m256i)first_lanes(count), (__m256)lanes);
#else
    for (int i = 0; i < W; ++i)
        if (i < count) to[i] = lanes[i];
#endif
}

#if RK_LANES < 16
struct Orders {  // for each set of lanes where each lane's value comes from, if they move together, or apart again
    uint8_t together[1 << W][W], apart[1 << W][W];
    constexpr Orders() : together(), apart() {
        for (int bits = 0; bits < 1 << W; ++bits) {
            int n = 0;
            for (int i = 0; i < W; ++i) {
                apart[bits][i] = (uint8_t)n;
                if (bits >> i & 1) together[bits][n++] = (uint8_t)i;
            }
        }
    }
};
constexpr Orders ORDERS;

inline Lanes reorder(Lanes lanes, const uint8_t* order) {
#if RK_LANES == 8
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)order);
    return (Lanes)_mm256_permutevar8x32_ps((__m256)lanes, _mm256_cvtepu8_epi32(bytes));
#else
    Lanes out = {};
    for (int i = 0; i < W; ++i) out[i] = lanes[order[i] % W];
    return out;
#endif
}
#endif

// The kept lanes in front, 0 behind them; and the first lanes back to their places, 0 between them.
inline Lanes together(Lanes lanes, unsigned bits, int count) {
#if RK_LANES == 16
    (void)count;
    return (Lanes)_mm512_maskz_compress_ps((__mmask16)bits, (__m512)lanes);
#else
    return first_lanes(count) ? reorder(lanes, ORDERS.together[bits]) : Lanes{};
#endif
}

inline Lanes apart(Lanes lanes, unsigned bits) {
#if RK_LANES == 16
    return (Lanes)_mm512_maskz_expand_ps((__mmask16)bits, (__m512)lanes);
#else
    return lanes_of(bits) ? reorder(lanes, ORDERS.apart[bits]) : Lanes{};
#endif
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
