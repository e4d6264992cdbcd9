// Adds the submodule `cuda` to a module.
#pragma once

#include <pybind11/pybind11.h>

namespace esfast::cuda {

void bind(pybind11::module_& parent);

}  // namespace esfast::cuda
