// The module rlhf_kernels._cuda: a call of a registered launcher on a device, with the errors of its launches.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#define RK_ISA device
#include "module.h"

namespace py = pybind11;

namespace rk {

int add(Entry* entry) {
    entry->next = entries();
    entries() = entry;
    return 0;
}

namespace {

void check(cudaError_t error, const char* name) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(name) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// The launcher runs with `device` current. _native.py makes it so, in PyTorch's way, which makes no context on a GPU that
// nobody uses; where this runtime sees another one nevertheless, it is set, and the one before it again.
void call(const Entry* entry, int device, const py::args& args) {
    const std::vector<Value> values = values_of(entry, args);
    py::gil_scoped_release release;
    int before = device;
    check(cudaGetDevice(&before), entry->name);
    if (before != device) check(cudaSetDevice(device), entry->name);
    (void)cudaGetLastError();  // what failed before this call is not this call's fault
    entry->base(values.data());
    const cudaError_t error = cudaGetLastError();
    if (before != device) check(cudaSetDevice(before), entry->name);
    check(error, entry->name);
}

// Versions as 1000 * major + 10 * minor: of the runtime in this module, and the newest that the driver serves (0: there
// is no driver).
int driver() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

py::dict functions() {
    py::dict table;
    for (const Entry* entry = entries(); entry; entry = entry->next)
        table[entry->name] =
            py::cpp_function([entry](int device, const py::args& args) { call(entry, device, args); });
    return table;
}

}  // namespace
}  // namespace rk

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA launchers: functions take a device, addresses, strides, counts and a stream.";
    module.def("functions", &rk::functions, "{name: function}; each takes the device's index first.");
    module.attr("architectures") = RK_ARCHITECTURES;
    module.attr("ptx") = RK_PTX;
    module.attr("runtime") = CUDART_VERSION;
    module.def("driver", &rk::driver, "The newest CUDA version that the driver serves, as 13000 for 13.0; 0 without one.");
}
