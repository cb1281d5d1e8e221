// What the modules _cpu and _cuda share: the list of registered functions, and a call of one with Python's arguments.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "rk.h"

namespace rk {

inline Entry*& entries() {
    static Entry* first = nullptr;
    return first;
}

inline std::vector<Value> values_of(const Entry* entry, const pybind11::args& args) {
    const size_t count = std::string(entry->signature).size();
    if (args.size() != count)
        throw pybind11::type_error(std::string(entry->name) + " takes " + std::to_string(count) + " arguments, got " +
                                   std::to_string(args.size()));
    std::vector<Value> values(count);
    for (size_t i = 0; i < count; ++i)
        if (entry->signature[i] == 'd')
            values[i].d = args[i].cast<double>();
        else
            values[i].i = args[i].cast<int64_t>();
    return values;
}

}  // namespace rk
