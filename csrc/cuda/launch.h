// What every .cu file needs: launches, entries of any dtype as fp32, and sums over warps and blocks in a fixed order.
//
// Blocks are one-dimensional, of whole warps, and so are grids. Errors of a launch are raised by module.cpp. Warps are
// the 32 lanes of NVIDIA's.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "rk.h"

namespace rk {
namespace RK_ISA {

constexpr int WARP = 32;
constexpr unsigned WHOLE_WARP = 0xffffffffu;

inline int64_t pieces_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

constexpr int64_t MOST_BLOCKS = 0x7fffffff;  // of a grid

// Runs `kernel` on `blocks` blocks of `threads` threads; nothing for no blocks.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Arguments... arguments) {
    if (blocks == 0) return;
    if (blocks > MOST_BLOCKS)
        throw std::length_error("the tensors take " + std::to_string(blocks) + " blocks of a GPU, which has at most " +
                                std::to_string(MOST_BLOCKS));
#ifdef __CUDACC__
    kernel<<<(unsigned)blocks, threads, 0, (cudaStream_t)stream>>>((Parameters)arguments...);
#else  // tests/cuda_on_cpu
    (void)stream;
    on_cpu::run([=] { kernel((Parameters)arguments...); }, blocks, threads);
#endif
}

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

// 2^x within 2 ulp, in one instruction; 0 where it would be subnormal.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDACC__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return on_cpu::power_of_two(x);
#endif
}

// An entry of an array whose dtype is known when the kernel runs.
__device__ __forceinline__ float entry(const void* from, int64_t dtype, int64_t i) {
    if (dtype == F32) return ((const float*)from)[i];
    if (dtype == BF16) return as_float(((const __nv_bfloat16*)from)[i]);
    return as_float(((const __half*)from)[i]);
}
__device__ __forceinline__ void put_entry(void* to, int64_t dtype, int64_t i, float x) {
    if (dtype == F32)
        ((float*)to)[i] = x;
    else if (dtype == BF16)
        ((__nv_bfloat16*)to)[i] = from_float<__nv_bfloat16>(x);
    else
        ((__half*)to)[i] = from_float<__half>(x);
}

// x of the lane whose number differs by `mask`; T may be a struct of whole words.
template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int mask) {
    static_assert(sizeof(T) % 4 == 0, "a shuffle moves words");
    unsigned words[sizeof(T) / 4];
    memcpy(words, &x, sizeof(T));
    for (unsigned& word : words) word = __shfl_xor_sync(WHOLE_WARP, word, mask);
    memcpy(&x, words, sizeof(T));
    return x;
}

// join(a, b) over the lanes of a warp, lower lanes first; every lane gets the result. All lanes must call.
template <class T, class Join>
__device__ __forceinline__ T over_warp(T x, Join join) {
    const int lane = threadIdx.x % WARP;
    for (int distance = 1; distance < WARP; distance *= 2) {
        const T other = shuffle_xor(x, distance);
        x = lane & distance ? join(other, x) : join(x, other);
    }
    return x;
}

namespace {  // what has shared memory has it for each file

// The same over a block of Threads threads, lower threads first; every thread gets the result. All threads must call.
template <int Threads, class T, class Join>
__device__ __forceinline__ T over_block(T x, Join join) {
    __shared__ T of_warp[Threads / WARP];
    x = over_warp(x, join);
    __syncthreads();  // what the last call left may still be read
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    x = of_warp[0];
    for (int warp = 1; warp < Threads / WARP; ++warp) x = join(x, of_warp[warp]);
    return x;
}

}  // namespace

struct Add {
    template <class T>
    __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
struct Highest {  // NaN wins
    __device__ __forceinline__ float operator()(float a, float b) const { return b > a || b != b ? b : a; }
};

}  // namespace RK_ISA
}  // namespace rk
