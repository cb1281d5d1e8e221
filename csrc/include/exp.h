// e^x, e^x - 1, tanh and log(1 + u), once for float and for a vector of them; rk.h includes it.
#pragma once
#include "rk.h"

namespace rk {
namespace RK_ISA {

// x, but at least low, at most high; a NaN stays NaN.
template <class T>
RK_HD T at_least(T x, T low) {
    return x < low ? low : x;
}

template <class T>
RK_HD T at_most(T x, T high) {
    return x > high ? high : x;
}

// e^x = 2^n (1 + r + r^2 q), with x held within [-104, 89].
template <class T>
struct ExpParts {
    T n, r, q;
    typename Bits<T>::type biased;  // n + 254 in the low 9 bits

    RK_HD T half_power() const { return from_bits<T>((biased - 128) << 23); }  // 2^n / 2, for n > -126
};

// 2^n p in two factors, so that neither overflows.
template <class T>
RK_HD T scaled(T p, ExpParts<T> e) {
    const auto half = e.biased >> 1;
    return p * from_bits<T>(half << 23) * from_bits<T>((e.biased - half) << 23);
}

#if defined(__AVX512F__)  // each in one instruction, with the same bits
RK_HD Lanes at_least(Lanes x, Lanes low) { return (Lanes)_mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)x); }
RK_HD Lanes at_most(Lanes x, Lanes high) { return (Lanes)_mm512_maskz_min_ps(0xffff, (__m512)high, (__m512)x); }
RK_HD Lanes scaled(Lanes p, ExpParts<Lanes> e) {
    return (Lanes)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)e.n);
}
#endif

template <class T>
RK_HD ExpParts<T> exp_parts(T x) {
    const float shift = 12582912.0f + 254.0f;  // 1.5 * 2^23: adding it rounds to an integer that sits in the low bits
    x = at_most(at_least(x, splat<T>(-104.0f)), splat<T>(89.0f));
    const T shifted = x * 1.44269504f + shift;
    const T n = shifted - shift;
    T r = x - n * 0.693359375f;  // ln 2 in two parts; the first has few bits, so the product is exact
    r = r + n * 2.12194440e-4f;
    T q = r * (1.0f / 5040.0f) + 1.0f / 720.0f;  // Taylor to r^7 on |r| <= ln(2)/2: remainder 5e-9
    q = q * r + 1.0f / 120.0f;
    q = q * r + 1.0f / 24.0f;
    q = q * r + 1.0f / 6.0f;
    q = q * r + 0.5f;
    return {n, r, q, to_bits(shifted)};
}

template <class T>
RK_HD T exp_of(ExpParts<T> e) {
    return scaled(e.q * e.r * e.r + e.r + 1.0f, e);
}

// e^x. At most 1.5 ulp on [-87, 88.7]; subnormal results below, 0 under -104, inf above 88.73; NaN stays NaN.
template <class T>
RK_HD T exp_f32(T x) {
    return exp_of(exp_parts(x));
}

constexpr float EXP_FLOOR = -88.0f;  // exp_nonpositive_f32 is 0 from here on down

// e^x for x <= 0, cheaper than exp_f32. At most 1.2 ulp on [-87, 0]; 0 below -87.7, where e^x < 9e-39; NaN stays NaN.
template <class T>
RK_HD T exp_nonpositive_f32(T x) {
    const float shift = 12582912.0f + 127.0f;  // as in exp_f32, with the exponent's bias
    x = x < splat<T>(EXP_FLOOR) ? splat<T>(EXP_FLOOR) : x;
    const T shifted = x * 1.44269504f + shift;
    const T n = shifted - shift;
    T r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    T p = r * 1.3814538e-3f + 8.3687454e-3f;  // minimax on |r| <= ln(2)/2: remainder 3e-9
    p = p * r + 4.1668389e-2f;
    p = p * r + 0.16666522f;
    p = p * r + 0.49999994f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * from_bits<T>(to_bits(shifted) << 23);  // 2^n, and 0 for n = -127
}

// e^x - 1 for x <= 0. At most 1.5 ulp: above -0.35 its Taylor series to x^8, remainder 3e-10 relative.
template <class T>
RK_HD T expm1_nonpositive_f32(T x) {
    T p = x * (1.0f / 40320.0f) + 1.0f / 5040.0f;
    p = p * x + 1.0f / 720.0f;
    p = p * x + 1.0f / 120.0f;
    p = p * x + 1.0f / 24.0f;
    p = p * x + 1.0f / 6.0f;
    p = p * x + 0.5f;
    const T near = x + x * x * p;
    return x > splat<T>(-0.35f) ? near : exp_f32(x) - 1.0f;
}

// tanh x. At most 3 ulp: an odd minimax polynomial up to 0.625, 1 - 2 / (e^2x + 1) beyond; NaN stays NaN.
template <class T>
RK_HD T tanh_f32(T x) {
    const T size = absolute(x);
    const T q = x * x;
    T p = 2.0639090e-2f - q * 5.7049906e-3f;
    p = p * q - 5.3739715e-2f;
    p = p * q + 0.13331442f;
    p = p * q - 0.33333281f;
    const T near = x + x * q * p;
    const T u = exp_nonpositive_f32(-2.0f * size);
    const T far = 1.0f - 2.0f * u / (1.0f + u);
    const T beyond = x < T{} ? -far : far;
    return size < splat<T>(0.625f) ? near : beyond;
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
