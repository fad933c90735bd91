// The table of CPU kernels. Every kernel is compiled once per instruction set; isa.cpp chooses a table at run time.
//
// To add an op: its arguments and a line in Kernels here, its file in csrc/cpu and in CMakeLists.txt (CPU_KERNELS), a
// line in kernels.cpp, a binding in bindings.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dtype.h"

namespace lemur::cpu {

// y = round(h * rstd) * weight, with h = round(x + residual) or x itself. Strides are in elements, from row to row.
struct RmsNormFwd {
  const void* x;
  int64_t x_stride;
  const void* residual;  // null: no residual, and h is not written
  int64_t residual_stride;
  const void* weight;  // [cols]
  void* y;             // [rows, cols], of the dtype that x and weight promote to
  void* h;             // [rows, cols], of x's dtype
  float* rstd;         // [rows], or null when no gradient will be asked for
  int64_t rows;
  int64_t cols;
  float eps;
  DType x_dtype;
  DType w_dtype;
};

struct RmsNormBwd {
  const void* dy;  // of y's dtype
  int64_t dy_stride;
  const void* dh;  // of x's dtype: what comes down the residual stream; null when nothing does
  int64_t dh_stride;
  const void* h;
  int64_t h_stride;
  const void* weight;
  const float* rstd;
  void* dx;   // [rows, cols], of x's dtype; the gradient of the residual is the same
  float* dw;  // [cols], or null when it is not wanted
  int64_t rows;
  int64_t cols;
  DType x_dtype;
  DType w_dtype;
};

struct Kernels {
  const char* isa;
  void (*rms_norm_fwd)(const RmsNormFwd&);
  void (*rms_norm_bwd)(const RmsNormBwd&);
};

// The table of the instruction set in use: the best that this CPU has, or the one that LEMUR_FAST_CPU names.
// Throws std::invalid_argument for a name that is unknown, not built, or lacking on this CPU. Call it with the GIL
// held: it reads the environment, which Python may change.
const Kernels& kernels();

// Names of the CPU features that matter here and that this CPU has.
std::vector<std::string> features();

// Names of the instruction sets that were built and that this CPU has, best first.
std::vector<std::string> usable_isas();

}  // namespace lemur::cpu
