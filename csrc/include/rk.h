// The small part that all ops share: host/device marks, bit-safe exp and log1p, the registry, the thread loop.
//
// Every cpu/<op>.cpp is compiled once per instruction set with RK_ISA = base | avx2 | avx512, and all its functions live
// in rk::RK_ISA, so that no copy made for a newer CPU is ever linked into an older one's path. Inside that namespace use
// pointers and integers only: a std:: template would be a weak symbol shared by all copies.
#pragma once
#include <stddef.h>
#include <stdint.h>

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

namespace RK_ISA {

// The arithmetic is written once for T = float and, on a CPU, T = Lanes: one vector register. A comparison of Lanes gives
// an integer lane of all ones for true, and `condition ? a : b` chooses lane by lane.
template <class T>
struct Bits;
template <>
struct Bits<float> {
    using type = int32_t;
};

#ifndef __CUDACC__
typedef float Lanes __attribute__((vector_size(4 * RK_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * RK_LANES)));
template <>
struct Bits<Lanes> {
    using type = Ints;
};

RK_HD Lanes load(const float* from) {
    Lanes lanes;
    __builtin_memcpy(&lanes, from, sizeof(lanes));
    return lanes;
}

RK_HD void store(float* to, Lanes lanes) { __builtin_memcpy(to, &lanes, sizeof(lanes)); }

// All ones where the byte is not 0.
RK_HD Ints load_mask(const uint8_t* keep) {
    typedef uint8_t Bytes __attribute__((vector_size(RK_LANES)));
    Bytes bytes;
    __builtin_memcpy(&bytes, keep, sizeof(bytes));
    return __builtin_convertvector(bytes, Ints) != Ints{};
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

// e^x. At most 1.5 ulp on [-87, 88.7]; subnormal results below, 0 under -104, inf above 88.73; NaN stays NaN.
template <class T>
RK_HD T exp_f32(T x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer that sits in the low bits
    x = x < splat<T>(-104.0f) ? splat<T>(-104.0f) : x;
    x = x > splat<T>(89.0f) ? splat<T>(89.0f) : x;
    const T shifted = x * 1.44269504f + shift;
    const T n = shifted - shift;
    const auto k = to_bits(shifted) - to_bits(splat<T>(shift));
    T r = x - n * 0.693359375f;  // ln 2 in two parts; the first has few bits, so the product is exact
    r = r + n * 2.12194440e-4f;
    T p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;  // Taylor to r^7 on |r| <= ln(2)/2: remainder 5e-9
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const auto half = k >> 1;  // 2^k in two factors, so that neither overflows
    return p * from_bits<T>((half + 127) << 23) * from_bits<T>((k - half + 127) << 23);
}

// log(1 + u) for 0 <= u <= 1. At most 2 ulp: 2 atanh(u / (2 + u)) as a series in s^2 <= 1/9, remainder 2e-9 relative.
template <class T>
RK_HD T log1p_unit_f32(T u) {
    const T s = u / (2.0f + u);
    const T q = s * s;
    T p = q * (1.0f / 15.0f) + 1.0f / 13.0f;
    p = p * q + 1.0f / 11.0f;
    p = p * q + 1.0f / 9.0f;
    p = p * q + 1.0f / 7.0f;
    p = p * q + 1.0f / 5.0f;
    p = p * q + 1.0f / 3.0f;
    return 2.0f * (s + s * q * p);
}

}  // namespace RK_ISA
}  // namespace rk

#if defined(RK_BASELINE)
// RK_REGISTER(f) adds rk::base::f, and its variants where they are built, to the module's table. It expands in the
// baseline pass only: a static constructor compiled for a newer instruction set would run at import on every CPU.
namespace rk {
namespace base {

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

}  // namespace base
}  // namespace rk

#define RK_CALL(isa, function) &rk::base::Unpack<decltype(rk::base::function)>::call<rk::isa::function>
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
#define RK_CALLS(function) RK_CALL(base, function), nullptr, nullptr
#endif
#define RK_REGISTER(function)                                                                                       \
    RK_VARIANTS(function)                                                                                           \
    static rk::Entry rk_entry_##function = {#function, rk::base::Unpack<decltype(rk::base::function)>::signature, \
                                            RK_CALLS(function), nullptr};                                           \
    static const int rk_added_##function = rk::add(&rk_entry_##function)
#else
#define RK_REGISTER(function) static_assert(true, "registered in the baseline pass")
#endif
