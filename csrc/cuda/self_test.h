// Host side of the CUDA part that bindings.cpp calls. Includes nothing of CUDA, so that it compiles without.
#pragma once

#include <cstdint>
#include <string>

namespace lemur::cuda {

// Version of the installed driver as 1000 * major + 10 * minor; 0 when there is none.
int driver_version();

// Number of usable devices; throws std::runtime_error with CUDA's own words when there is no driver or no device.
int device_count();

// Runs a kernel on `device` and checks what it wrote. Returns the architecture it ran as, such as 90. Throws
// std::runtime_error when CUDA reports an error, or the result is wrong.
int self_test(int device);

}  // namespace lemur::cuda
