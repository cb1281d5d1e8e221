// CUDA's blocks on a CPU, for tests: csrc/cuda compiles against this instead of the toolkit's headers.
//
// The threads of a block are fibers that take turns on one thread of the CPU; a fiber runs until it waits for its warp
// or its block, and a warp as far as it comes before another one starts. RLHF_KERNELS_FIBERS says in which order threads
// and warps are taken: "down" (the default) from the last to the first, "up" from the first, "random" shuffled for each
// turn. What needs a barrier that is not there shows in one of them. Blocks come one after the other, in the same order. A wait that can never end, because some
// threads have left or wait for something else, ends the process with a message, and so does a word that is read or
// written where it is not aligned (build.py). Shared memory is filled with 0xff before each block.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ __attribute__((section("rk_shared"))) static

struct Index {
    unsigned x;
};

namespace on_cpu {

enum Waits { FOR_NOTHING, FOR_WARP, FOR_BLOCK, LEFT };
constexpr int LANES = 32;
constexpr size_t STACK = 256 << 10;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    Waits waits;
};

// The numbers from 0 to count - 1 as the order has them.
struct Order {
    enum { DOWN, UP, RANDOM } kind = DOWN;
    std::vector<int64_t> numbers;
    std::minstd_rand random;

    explicit Order(int64_t count) : numbers((size_t)count) {
        const char* asked = getenv("RLHF_KERNELS_FIBERS");
        const std::string name = asked ? asked : "down";
        if (name != "down" && name != "up" && name != "random") {
            fprintf(stderr, "cuda_on_cpu: RLHF_KERNELS_FIBERS=%s, expected down, up or random\n", asked);
            abort();
        }
        kind = name == "up" ? UP : name == "random" ? RANDOM : DOWN;
        std::iota(numbers.begin(), numbers.end(), 0);
        if (kind == DOWN) std::reverse(numbers.begin(), numbers.end());
    }
    const std::vector<int64_t>& turn() {
        if (kind == RANDOM) std::shuffle(numbers.begin(), numbers.end(), random);
        return numbers;
    }
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<unsigned> slots;  // a word of each thread, for shuffles
    std::function<void()> body;
    ucontext_t scheduler;
    int current = 0;
};

inline Block block;
inline Index block_index, block_size, grid_size;
inline Index thread_index() { return {(unsigned)block.current}; }

inline void enter() {
    block.body();
    block.fibers[block.current].waits = LEFT;
    swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

inline void wait(Waits what) {
    Fiber& fiber = block.fibers[block.current];
    fiber.waits = what;
    swapcontext(&fiber.context, &block.scheduler);
}

// Lets the threads [begin, end) go on if all of them wait for `what`.
inline bool release(int begin, int end, Waits what) {
    for (int i = begin; i < end; ++i)
        if (block.fibers[i].waits != what) return false;
    for (int i = begin; i < end; ++i) block.fibers[i].waits = FOR_NOTHING;
    return true;
}

__attribute__((noinline)) inline void prepare(Fiber& fiber) {
    fiber.waits = FOR_NOTHING;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
}

extern "C" __attribute__((visibility("hidden"))) char __start_rk_shared[], __stop_rk_shared[];

struct Orders {
    Order blocks, warps, lanes;
};

// Runs a warp as far as it comes without the others; whether all its threads have left.
inline bool run_warp(int first, Order& lanes) {
    do {
        for (const int64_t lane : lanes.turn()) {
            block.current = first + (int)lane;
            Fiber& fiber = block.fibers[block.current];
            if (fiber.waits == FOR_NOTHING) swapcontext(&block.scheduler, &fiber.context);
        }
    } while (release(first, first + LANES, FOR_WARP));
    for (int i = first; i < first + LANES; ++i)
        if (block.fibers[i].waits != LEFT) return false;
    return true;
}

inline void run_block(int threads, Orders& orders) {
    memset(__start_rk_shared, 0xff, (size_t)(__stop_rk_shared - __start_rk_shared));
    for (int i = 0; i < threads; ++i) prepare(block.fibers[i]);
    for (bool all_left = false; !all_left;) {
        all_left = true;
        for (const int64_t warp : orders.warps.turn()) all_left = run_warp((int)warp * LANES, orders.lanes) && all_left;
        if (!release(0, threads, FOR_BLOCK) && !all_left) {
            fprintf(stderr, "cuda_on_cpu: block %u waits for ever: its threads do not meet at the same barrier\n",
                    block_index.x);
            abort();
        }
    }
}

// Kernels launched and memory set so far: what would be nodes of a graph.
extern "C" {
__attribute__((visibility("default"))) inline int64_t cuda_on_cpu_nodes = 0;
}

inline void run(std::function<void()> body, int64_t blocks, int threads) {
    ++cuda_on_cpu_nodes;
    if (threads % LANES != 0 || threads > 1024 || blocks > 0x7fffffff) {
        fprintf(stderr, "cuda_on_cpu: %lld blocks of %d threads\n", (long long)blocks, threads);
        abort();
    }
    if ((int)block.fibers.size() < threads) block.fibers.resize((size_t)threads);
    block.slots.assign((size_t)threads, 0);
    block.body = std::move(body);
    block_size.x = (unsigned)threads;
    grid_size.x = (unsigned)blocks;
    Orders orders = {Order(blocks), Order(threads / LANES), Order(LANES)};
    for (const int64_t i : orders.blocks.turn()) {
        block_index.x = (unsigned)i;
        run_block(threads, orders);
    }
}

inline unsigned exchange(unsigned word, int lane) {
    const int first = block.current / LANES * LANES;
    block.slots[(size_t)block.current] = word;
    wait(FOR_WARP);
    word = block.slots[(size_t)(first + lane)];
    wait(FOR_WARP);
    return word;
}

template <class T>
T shuffle(T x, int lane) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles words of 4 or 8 bytes");
    unsigned words[sizeof(T) / 4];
    memcpy(words, &x, sizeof(T));
    for (unsigned& word : words) word = exchange(word, lane);
    memcpy(&x, words, sizeof(T));
    return x;
}

inline void whole(unsigned mask) {
    if (mask == 0xffffffffu) return;
    fprintf(stderr, "cuda_on_cpu: only whole warps are supported\n");
    abort();
}

// As ex2.approx.ftz, at its worst: 2 ulp too much, but for whole x, and 0 where it would be subnormal.
inline float power_of_two(float x) {
    const float power = exp2f(x);
    if (power < 1.17549435e-38f) return 0.0f;
    return x == rintf(x) || !(power < 1e38f) ? power : power * (1.0f + 2.384185791e-7f);
}

inline int lane() { return block.current % LANES; }

}  // namespace on_cpu

#define threadIdx on_cpu::thread_index()
#define blockIdx on_cpu::block_index
#define blockDim on_cpu::block_size
#define gridDim on_cpu::grid_size

inline void __syncthreads() { on_cpu::wait(on_cpu::FOR_BLOCK); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    on_cpu::whole(mask);
    on_cpu::wait(on_cpu::FOR_WARP);
}
template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
    on_cpu::whole(mask);
    return on_cpu::shuffle(x, lane % on_cpu::LANES);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int flip) {
    on_cpu::whole(mask);
    return on_cpu::shuffle(x, on_cpu::lane() ^ flip);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int by) {
    on_cpu::whole(mask);
    const int from = on_cpu::lane() - by;
    return on_cpu::shuffle(x, from < 0 ? on_cpu::lane() : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int by) {
    on_cpu::whole(mask);
    const int from = on_cpu::lane() + by;
    return on_cpu::shuffle(x, from >= on_cpu::LANES ? on_cpu::lane() : from);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    on_cpu::whole(mask);
    const size_t first = (size_t)(on_cpu::block.current / on_cpu::LANES * on_cpu::LANES);
    on_cpu::block.slots[(size_t)on_cpu::block.current] = predicate != 0;
    on_cpu::wait(on_cpu::FOR_WARP);
    unsigned bits = 0;
    for (int lane = 0; lane < on_cpu::LANES; ++lane) bits |= on_cpu::block.slots[first + (size_t)lane] << lane;
    on_cpu::wait(on_cpu::FOR_WARP);
    return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz((unsigned)bits); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0.0f ? x < 1.0f ? x : 1.0f : 0.0f; }
inline void __threadfence() {}
// Fibers do not run at the same time, so an atomic is the plain operation.
template <class T>
T atomicAdd(T* at, T x) {
    const T before = *at;
    *at = before + x;
    return before;
}
template <class T>
T atomicInc(T* at, T most) {
    const T before = *at;
    *at = before >= most ? 0 : before + 1;
    return before;
}

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

typedef int cudaError_t;
typedef struct Stream* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) {
    fprintf(stderr, "cuda_on_cpu: a device is set that is current\n");
    abort();
}
constexpr int CUDART_VERSION = 0;
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t count, cudaStream_t) {
    ++on_cpu::cuda_on_cpu_nodes;
    return memset(to, byte, count), cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaSuccess"; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
