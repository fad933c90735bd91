#pragma once

#include <pybind11/pybind11.h>

namespace lemur::cuda {

// Adds the functions of the submodule `cuda`.
void bind(pybind11::module_& cuda);

}  // namespace lemur::cuda
