// Four tokens of a thread: their numbers and their mask, moved at once where they are aligned and within the row.
#pragma once
#include <cuda_runtime.h>

#include "rk.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int ITEMS = 4;  // tokens of a thread
constexpr unsigned ALL = (1u << ITEMS) - 1;

__host__ __device__ __forceinline__ bool aligned(const void* address, int bytes) {
    return (uintptr_t)address % bytes == 0;
}

// Aligned, and within the row.
__device__ __forceinline__ void load_four(const float* from, float* x) {
    const float4 four = *(const float4*)from;
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

// Zeros stand for what is not within the row.
__device__ __forceinline__ void load_some(const float* from, int64_t t, int64_t length, float* x) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) x[i] = t + i < length ? from[t + i] : 0.0f;
}

__device__ __forceinline__ void load(const float* from, int64_t t, int64_t length, bool vector, float* x) {
    if (vector && t + ITEMS <= length)
        load_four(from + t, x);
    else
        load_some(from, t, length, x);
}

// The mask's four bytes, 0 for what is not within the row. Nothing is done with them here, so that nobody waits.
__device__ __forceinline__ unsigned load_mask(const uint8_t* mask, int64_t t, int64_t length, bool vector) {
    if (t + ITEMS <= length && (!mask || vector)) return mask ? *(const unsigned*)(mask + t) : 0xffffffffu;
    unsigned bytes = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
        if (t + i < length) bytes |= (mask ? (unsigned)mask[t + i] : 1u) << (8 * i);
    return bytes;
}

// A bit for each of them that is not 0.
__device__ __forceinline__ unsigned kept_of(unsigned bytes) {
    unsigned kept = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) kept |= (bytes >> (8 * i) & 0xff) ? 1u << i : 0u;
    return kept;
}

__device__ __forceinline__ void store_four(float* to, const float* x) {
    *(float4*)to = make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void store_some(float* to, int64_t t, int64_t length, const float* x) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
        if (t + i < length) to[t + i] = x[i];
}

__device__ __forceinline__ void store(float* to, int64_t t, int64_t length, bool vector, const float* x) {
    if (vector && t + ITEMS <= length)
        store_four(to + t, x);
    else
        store_some(to, t, length, x);
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
