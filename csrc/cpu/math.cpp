// The vector maths that the ops share, element by element, for tests/kernels/test_math.py to hold against float64. No op calls
// this.
#include "bradley_terry.h"
#include "policy.h"

namespace rk {
namespace RK_ISA {
namespace {

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

template <class T>
RK_HD T kl_k3_of(T d) {
    return rk::RK_ISA::kl_k3_of(exp_parts(-d), d);
}

}  // namespace

// n is a multiple of 16 here.
void bf16_from_f32_each(const float* x, int64_t n, uint16_t* y, int64_t) { narrow<Bf16>(x, n, y); }
void f16_from_f32_each(const float* x, int64_t n, uint16_t* y, int64_t) { narrow<Half>(x, n, y); }
void f32_from_bf16_each(const uint16_t* x, int64_t n, float* y, int64_t) { widen<Bf16>(x, n, y); }
void f32_from_f16_each(const uint16_t* x, int64_t n, float* y, int64_t) { widen<Half>(x, n, y); }

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(bf16_from_f32_each);
RK_REGISTER(f16_from_f32_each);
RK_REGISTER(f32_from_bf16_each);
RK_REGISTER(f32_from_f16_each);

// Registers <function>_each.
#define RK_EACH(function)                                                                                   \
    namespace rk {                                                                                          \
    namespace RK_ISA {                                                                                      \
    namespace {                                                                                             \
    struct Of_##function {                                                                                  \
        template <class T>                                                                                  \
        RK_HD static T of(T x) {                                                                            \
            return function(x);                                                                             \
        }                                                                                                   \
    };                                                                                                      \
    }                                                                                                       \
    void function##_each(const float* x, int64_t n, float* y, int64_t) { each<Of_##function>(x, n, y); }    \
    }                                                                                                       \
    }                                                                                                       \
    RK_REGISTER(function##_each)

RK_EACH(exp_f32);
RK_EACH(exp2_nonpositive_f32);
RK_EACH(exp_nonpositive_f32);
RK_EACH(expm1_f32);
RK_EACH(expm1_nonpositive_f32);
RK_EACH(kl_k3);
RK_EACH(kl_k3_of);
RK_EACH(kl_k3_slope);
RK_EACH(log1m_exp_f32);
RK_EACH(log1p_f32);
RK_EACH(log1p_polynomial);
RK_EACH(log1p_unit_f32);
RK_EACH(log_unit_f32);
RK_EACH(tanh_f32);
