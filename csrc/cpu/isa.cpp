// The module rlhf_kernels._cpu: run-time CPU detection, the registry, the thread loop. Compiled at baseline only.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define RK_FORKS 1
#endif
#if defined(RK_X86)
#include <cpuid.h>
#endif

#define RK_ISA base
#include "module.h"
#include "pool.h"

namespace py = pybind11;

namespace rk {
namespace {

struct Isa {
    const char* name;
    bool (*present)();
    Call Entry::*variant;
};

bool always() { return true; }
#if defined(RK_X86)
bool has_f16c() {  // clang 14's __builtin_cpu_supports does not know the name
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Isa kIsas[] = {  // plainest first
    {"base", always, &Entry::base},
#if defined(RK_X86)
    {"avx2", has_avx2, &Entry::avx2},
    {"avx512", has_avx512, &Entry::avx512},
#endif
};

py::list isas() {
    py::list names;
    for (const Isa& isa : kIsas)
        if (isa.present()) names.append(isa.name);
    return names;
}

void call(const Entry* entry, Call variant, const py::args& args) {
    const std::vector<Value> values = values_of(entry, args);
    py::gil_scoped_release release;
    variant(values.data());
}

// {name: function} of one instruction set.
py::dict functions(const std::string& name) {
    for (const Isa& isa : kIsas) {
        if (name != isa.name || !isa.present()) continue;
        py::dict table;
        for (const Entry* entry = entries(); entry; entry = entry->next) {
            const Call variant = entry->*isa.variant;
            table[entry->name] = py::cpp_function([entry, variant](const py::args& args) { call(entry, variant, args); });
        }
        return table;
    }
    throw py::value_error("this machine cannot run the instruction set " + name);
}

// fork() copies one thread. In the child libgomp still counts on its pool and would wait for it for ever.
bool forked = false;

void serial_after_fork() {
#ifdef RK_FORKS
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
}

constexpr bool sanitized() {
#ifdef __SANITIZE_ADDRESS__
    return true;
#else
    return false;
#endif
}

}  // namespace

int add(Entry* entry) {
    entry->next = entries();
    entries() = entry;
    return 0;
}

void parallel_for(int64_t count, int64_t grain, int64_t threads, void (*body)(void*, int64_t, int64_t), void* context) {
    const int64_t pieces = (count + grain - 1) / grain;
    const auto one = [=](int64_t piece) {
        const int64_t begin = piece * grain;
        body(context, begin, count - begin > grain ? begin + grain : count);
    };
#ifdef _OPENMP
    if (pieces > 1 && threads > 1 && !forked && !omp_in_parallel()) {
#pragma omp parallel for num_threads((int)threads) schedule(dynamic)
        for (int64_t piece = 0; piece < pieces; ++piece) one(piece);
        return;
    }
#endif
    (void)threads;
    for (int64_t piece = 0; piece < pieces; ++piece) one(piece);
}

}  // namespace rk

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Native CPU kernels: functions take addresses, strides, counts and a thread count.";
    rk::serial_after_fork();
    module.attr("sanitized") = rk::sanitized();
    module.def("isas", &rk::isas, "Instruction sets that were built and that this CPU has, plainest first.");
    module.def("functions", &rk::functions, "{name: function} of one instruction set.");
#ifdef __linux__
    rk::bind_pool(module);
#endif
#ifdef _OPENMP
    module.attr("threaded") = true;
#else
    module.attr("threaded") = false;
#endif
}
