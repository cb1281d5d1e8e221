// The small part that all ops share: host/device marks, bit-safe exp and log1p, the registry, the thread loop.
//
// Every cpu/<op>.cpp is compiled once per instruction set with RK_ISA = base | avx2 | avx512, and all its functions live
// in rk::RK_ISA, so that no copy made for a newer CPU is ever linked into an older one's path. Inside that namespace use
// pointers and integers only: a std:: template would be a weak symbol shared by all copies.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>  // only for the conversions and stores that vector types cannot express
#endif

#ifdef __CUDACC__
#define RK_HD __host__ __device__ __forceinline__
#define RK_ISA device
#else
#define RK_HD inline __attribute__((always_inline))
#endif

// Floats in a vector register of the instruction set.
#if defined(__AVX512F__)
#define RK_LANES 16
#elif defined(__AVX2__)
#define RK_LANES 8
#else
#define RK_LANES 4
#endif

namespace rk {

union Value {  // one argument of a native call: an address, a count, a stride, or a number
    int64_t i;
    double d;
};
using Call = void (*)(const Value*);

struct Entry {               // a native function: one variant per instruction set, null where it was not built
    const char* name;
    const char* signature;   // one letter an argument: i = integer or address, d = double
    Call base, avx2, avx512;
    Entry* next;
};
int add(Entry* entry);  // isa.cpp

// body(context, begin, end) over [0, count) in pieces of `grain`, on `threads` threads; each piece runs exactly once.
void parallel_for(int64_t count, int64_t grain, int64_t threads, void (*body)(void*, int64_t, int64_t), void* context);

enum DType { F32 = 0, BF16 = 1, F16 = 2 };  // as in _native.py

namespace RK_ISA {

struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };

// The arithmetic is written once for T = float and, on a CPU, T = Lanes: one vector register. A comparison of Lanes gives
// an integer lane of all ones for true, and `condition ? a : b` chooses lane by lane.
template <class T>
struct Bits;
template <>
struct Bits<float> { using type = int32_t; };

#ifndef __CUDACC__
typedef float Lanes __attribute__((vector_size(4 * RK_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * RK_LANES)));
template <>
struct Bits<Lanes> { using type = Ints; };

RK_HD Lanes load(const float* from) {
    Lanes lanes;
    __builtin_memcpy(&lanes, from, sizeof(lanes));
    return lanes;
}

RK_HD void store(float* to, Lanes lanes) { __builtin_memcpy(to, &lanes, sizeof(lanes)); }

// All ones where the byte is not 0.
typedef uint16_t Shorts __attribute__((vector_size(2 * RK_LANES)));

RK_HD Lanes load(const Bf16* from) {
    Shorts bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    const Ints wide = __builtin_convertvector(bits, Ints) << 16;
    Lanes lanes;
    __builtin_memcpy(&lanes, &wide, sizeof(lanes));
    return lanes;
}

typedef uint32_t Words __attribute__((vector_size(4 * RK_LANES)));  // bits of a NaN may overflow an int when rounded

RK_HD Shorts to_bf16(Lanes lanes) {  // to nearest, ties to even
    Ints bits;
    __builtin_memcpy(&bits, &lanes, sizeof(bits));
    const Ints odd = (bits >> 16) & 1;
    const Ints rounded = lanes == lanes ? (Ints)((Words)bits + 0x7fff + (Words)odd) : bits | 0x400000;
    return __builtin_convertvector(rounded >> 16, Shorts);
}

#if defined(__AVX512F__)
RK_HD Lanes load(const Half* from) {
    __m256i bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return (Lanes)_mm512_maskz_cvtph_ps(0xffff, bits);
}
RK_HD Shorts to_half(Lanes lanes) {
    return (Shorts)_mm512_maskz_cvtps_ph(0xffff, (__m512)lanes, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
RK_HD Lanes load(const Half* from) {
    __m128i bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return (Lanes)_mm256_cvtph_ps(bits);
}
RK_HD Shorts to_half(Lanes lanes) { return (Shorts)_mm256_cvtps_ph((__m256)lanes, _MM_FROUND_TO_NEAREST_INT); }
#else
RK_HD Lanes load(const Half* from) {
    Shorts half;
    __builtin_memcpy(&half, from, sizeof(half));
    const Ints bits = __builtin_convertvector(half, Ints);
    const Ints magnitude = (bits & 0x7fff) << 13;
    // As a float these bits are the value times 2^-112, subnormals included; inf and NaN keep the largest exponent.
    Lanes value;
    __builtin_memcpy(&value, &magnitude, sizeof(value));
    value = value * 5.192296858534828e33f;
    Ints out;
    __builtin_memcpy(&out, &value, sizeof(out));
    out = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : out;
    out |= (bits & 0x8000) << 16;
    Lanes lanes;
    __builtin_memcpy(&lanes, &out, sizeof(lanes));
    return lanes;
}
RK_HD Shorts to_half(Lanes lanes) {
    Ints bits;
    __builtin_memcpy(&bits, &lanes, sizeof(bits));
    const Ints sign = (bits >> 16) & 0x8000;
    const Ints magnitude = bits & 0x7fffffff;
    // Normal results: move the exponent's bias, round the 13 bits that fall off to even; a carry may reach infinity.
    const Words odd = ((Words)magnitude >> 13) & 1;
    const Ints normal = (Ints)(((Words)magnitude - 0x37fff001u + odd) >> 13);
    // Subnormal results: adding 0.5 puts the half's last bit at the float's last bit and rounds to even.
    Lanes size;
    __builtin_memcpy(&size, &magnitude, sizeof(size));
    const Lanes moved = size + 0.5f;
    Ints small;
    __builtin_memcpy(&small, &moved, sizeof(small));
    small -= 0x3f000000;
    Ints out = magnitude < 0x38800000 ? small : normal;
    out = magnitude >= 0x47800000 ? Ints{} + 0x7c00 : out;
    out = magnitude > 0x7f800000 ? Ints{} + 0x7e00 : out;
    return __builtin_convertvector(out | sign, Shorts);
}
#endif

RK_HD void store(Bf16* to, Lanes lanes) {
    const Shorts bits = to_bf16(lanes);
    __builtin_memcpy(to, &bits, sizeof(bits));
}

RK_HD void store(Half* to, Lanes lanes) {
    const Shorts bits = to_half(lanes);
    __builtin_memcpy(to, &bits, sizeof(bits));
}

// stream() is a store that does not read the line first and leaves the cache alone; `to` is aligned to W entries.
#if defined(__AVX512F__)
RK_HD void stream(float* to, Lanes lanes) { _mm512_stream_ps(to, (__m512)lanes); }
RK_HD void stream(Bf16* to, Lanes lanes) { _mm256_stream_si256((__m256i*)to, (__m256i)to_bf16(lanes)); }
RK_HD void stream(Half* to, Lanes lanes) { _mm256_stream_si256((__m256i*)to, (__m256i)to_half(lanes)); }
#elif defined(__AVX2__)
RK_HD void stream(float* to, Lanes lanes) { _mm256_stream_ps(to, (__m256)lanes); }
RK_HD void stream(Bf16* to, Lanes lanes) { _mm_stream_si128((__m128i*)to, (__m128i)to_bf16(lanes)); }
RK_HD void stream(Half* to, Lanes lanes) { _mm_stream_si128((__m128i*)to, (__m128i)to_half(lanes)); }
#else
template <class S>
RK_HD void stream(S* to, Lanes lanes) {
    store(to, lanes);
}
#endif

RK_HD float max_lanes(Lanes lanes) {
    float out = lanes[0];
    for (int i = 1; i < RK_LANES; ++i) out = lanes[i] > out ? lanes[i] : out;
    return out;
}

RK_HD double sum_lanes(Lanes lanes) {
    double out = 0.0;
    for (int i = 0; i < RK_LANES; ++i) out += (double)lanes[i];
    return out;
}

RK_HD bool any_lane(Ints lanes) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif defined(__AVX2__)
    return _mm256_testz_si256((__m256i)lanes, (__m256i)lanes) == 0;
#else
    int32_t out = 0;
    for (int i = 0; i < RK_LANES; ++i) out |= lanes[i];
    return out != 0;
#endif
}

// out[i] = lanes[i + By], and 0 where there is no such lane.
template <int By>
RK_HD Lanes shift_down(Lanes lanes) {
    const Lanes zero = {};
#if defined(__clang__)
    Lanes out = zero;
    for (int i = 0; i + By < RK_LANES; ++i) out[i] = lanes[i + By];
    return out;
#else
    Ints index = {};
    for (int i = 0; i < RK_LANES; ++i) index[i] = i + By;
    return __builtin_shuffle(lanes, zero, index);
#endif
}
#endif

template <class T>
RK_HD T splat(float value) {
    return T{} + value;
}

template <class T>
RK_HD T from_bits(typename Bits<T>::type bits) {
    T value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
}

template <class T>
RK_HD typename Bits<T>::type to_bits(T value) {
    typename Bits<T>::type bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    return bits;
}

template <class T>
RK_HD T absolute(T x) {
    return x < T{} ? -x : x;
}

}  // namespace RK_ISA
}  // namespace rk

#include "exp.h"

#if defined(RK_BASELINE) || defined(__CUDACC__)
// RK_REGISTER(f) adds rk::base::f, and its variants where they are built, to the module's table; under nvcc it adds
// rk::device::f, a launcher. It expands in the baseline pass only: a static constructor compiled for a newer instruction
// set would run at import on every CPU.
namespace rk {
namespace RK_ISA {

template <class T>
struct Slot {
    static constexpr char code = 'i';
    static T get(Value value) { return (T)value.i; }
};
template <>
struct Slot<double> {
    static constexpr char code = 'd';
    static double get(Value value) { return value.d; }
};

template <size_t... I>
struct Indices {};
template <size_t N, size_t... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <size_t... I>
struct MakeIndices<0, I...> {
    using type = Indices<I...>;
};

template <class F>
struct Unpack;
template <class... A>
struct Unpack<void(A...)> {
    static constexpr char signature[] = {Slot<A>::code..., 0};
    template <void (*F)(A...), size_t... I>
    static void spread(const Value* values, Indices<I...>) {
        F(Slot<A>::get(values[I])...);
    }
    template <void (*F)(A...)>
    static void call(const Value* values) {
        spread<F>(values, typename MakeIndices<sizeof...(A)>::type());
    }
};

}  // namespace RK_ISA
}  // namespace rk

#define RK_CALL(isa, function) &rk::RK_ISA::Unpack<decltype(rk::RK_ISA::function)>::call<rk::isa::function>
#if defined(RK_X86)
#define RK_VARIANTS(function)                                      \
    namespace rk {                                                 \
    namespace avx2 {                                               \
    decltype(base::function) function;                             \
    }                                                              \
    namespace avx512 {                                             \
    decltype(base::function) function;                             \
    }                                                              \
    }
#define RK_CALLS(function) RK_CALL(base, function), RK_CALL(avx2, function), RK_CALL(avx512, function)
#else
#define RK_VARIANTS(function)
#define RK_CALLS(function) RK_CALL(RK_ISA, function), nullptr, nullptr
#endif
#define RK_REGISTER(function)                                                                                       \
    RK_VARIANTS(function)                                                                                           \
    static rk::Entry rk_entry_##function = {#function, rk::RK_ISA::Unpack<decltype(rk::RK_ISA::function)>::signature, \
                                            RK_CALLS(function), nullptr};                                           \
    static const int rk_added_##function = rk::add(&rk_entry_##function)
#else
#define RK_REGISTER(function) static_assert(true, "registered in the baseline pass")
#endif
