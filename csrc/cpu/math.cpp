// The vector maths that the ops share, element by element, for tests/test_math.py to hold against float64. No op calls
// this.
#include "preference.h"

namespace rk {
namespace RK_ISA {
namespace {

struct Exp {
    template <class T>
    RK_HD static T of(T x) {
        return exp_f32(x);
    }
};
struct ExpNonpositive {
    template <class T>
    RK_HD static T of(T x) {
        return exp_nonpositive_f32(x);
    }
};
struct Expm1Nonpositive {
    template <class T>
    RK_HD static T of(T x) {
        return expm1_nonpositive_f32(x);
    }
};
struct LogUnit {
    template <class T>
    RK_HD static T of(T x) {
        return log_unit_f32(x);
    }
};
struct Log1pUnit {
    template <class T>
    RK_HD static T of(T x) {
        return log1p_unit_f32(x);
    }
};
struct Tanh {
    template <class T>
    RK_HD static T of(T x) {
        return tanh_f32(x);
    }
};

// Whole vectors, and what is left one float at a time: a caller chooses between the two by n.
template <class F>
void each(const float* x, int64_t n, float* y) {
    int64_t i = 0;
    for (; i + RK_LANES <= n; i += RK_LANES) store(y + i, F::of(load(x + i)));
    for (; i < n; ++i) y[i] = F::of(x[i]);
}

template <class Narrow>
void narrow(const float* x, int64_t n, uint16_t* y) {
    for (int64_t i = 0; i + RK_LANES <= n; i += RK_LANES) store((Narrow*)(y + i), load(x + i));
}

template <class Narrow>
void widen(const uint16_t* x, int64_t n, float* y) {
    for (int64_t i = 0; i + RK_LANES <= n; i += RK_LANES) store(y + i, load((const Narrow*)(x + i)));
}

}  // namespace

void exp_f32_each(const float* x, int64_t n, float* y, int64_t) { each<Exp>(x, n, y); }
void exp_nonpositive_f32_each(const float* x, int64_t n, float* y, int64_t) { each<ExpNonpositive>(x, n, y); }
void expm1_nonpositive_f32_each(const float* x, int64_t n, float* y, int64_t) { each<Expm1Nonpositive>(x, n, y); }
void log_unit_f32_each(const float* x, int64_t n, float* y, int64_t) { each<LogUnit>(x, n, y); }
void log1p_unit_f32_each(const float* x, int64_t n, float* y, int64_t) { each<Log1pUnit>(x, n, y); }
void tanh_f32_each(const float* x, int64_t n, float* y, int64_t) { each<Tanh>(x, n, y); }

// n is a multiple of 16 here.
void bf16_from_f32_each(const float* x, int64_t n, uint16_t* y, int64_t) { narrow<Bf16>(x, n, y); }
void f16_from_f32_each(const float* x, int64_t n, uint16_t* y, int64_t) { narrow<Half>(x, n, y); }
void f32_from_bf16_each(const uint16_t* x, int64_t n, float* y, int64_t) { widen<Bf16>(x, n, y); }
void f32_from_f16_each(const uint16_t* x, int64_t n, float* y, int64_t) { widen<Half>(x, n, y); }

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(exp_f32_each);
RK_REGISTER(exp_nonpositive_f32_each);
RK_REGISTER(expm1_nonpositive_f32_each);
RK_REGISTER(log_unit_f32_each);
RK_REGISTER(log1p_unit_f32_each);
RK_REGISTER(tanh_f32_each);
RK_REGISTER(bf16_from_f32_each);
RK_REGISTER(f16_from_f32_each);
RK_REGISTER(f32_from_bf16_each);
RK_REGISTER(f32_from_f16_each);
