// The CUDA kernels, as bindings.cpp calls them. Includes nothing of CUDA, so that it compiles without.
//
// Every function launches on a stream and returns at once. It throws std::runtime_error, which names the op and its
// shapes, when CUDA refuses the launch. Pointers lie on the device. To add an op: its arguments in arguments.h, its
// file in csrc/cuda and in cmake/cuda.cmake (CUDA_KERNELS), a line here, a binding in cuda/bindings.cpp.
#pragma once

#include "arguments.h"

namespace lemur::cuda {

// Where a kernel runs. It need not be the current device.
struct Place {
  int device;
  void* stream;  // a cudaStream_t
};

// Weights have x's dtype or are float32.
void rms_norm_fwd(const RmsNormFwd& args, const Place& place);

// partial, [parts, cols] of float32, is scratch for the parts of dw: unused where dw is null. More parts than
// processors are of no use.
void rms_norm_bwd(const RmsNormBwd& args, float* partial, int64_t parts, const Place& place);

void swiglu_fwd(const SwigluFwd& args, const Place& place);
void swiglu_bwd(const SwigluBwd& args, const Place& place);

// One or two tensors in one launch. Of the dtypes of x, y and the tables, those that differ from float32 are equal.
void rotary(const Rotary* xs, int count, const RotaryTables& tables, const Place& place);

// A label outside [0, cols) that is not ignored makes its row NaN.
void cross_entropy_fwd(const CrossEntropy& args, const Place& place);
void cross_entropy_bwd(const CrossEntropy& args, const Place& place);

}  // namespace lemur::cuda
