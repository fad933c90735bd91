// What the ops that CPUs and GPUs both have are given. Strides are in elements; pointers lie where the kernel runs.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lemur {

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

// y = silu(gate) * up. y is contiguous, [rows, cols].
struct SwigluFwd {
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* y;
  int64_t rows;
  int64_t cols;
  DType dtype;
};

struct SwigluBwd {
  const void* dy;
  int64_t dy_stride;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* dgate;  // [rows, cols]
  void* dup;    // [rows, cols]
  int64_t rows;
  int64_t cols;
  DType dtype;
};

// Rotation of [tokens, heads, head_dim]. Strides are in elements; the last dimension has stride 1.
struct Rotary {
  const void* x;
  int64_t token_stride;
  int64_t head_stride;
  void* y;  // contiguous
  int64_t heads;
};

struct RotaryTables {
  const void* cos;  // [tokens, columns]
  int64_t cos_stride;
  const void* sin;
  int64_t sin_stride;
  int64_t columns;  // head_dim, or head_dim / 2 when both elements of a pair share an angle
  int64_t tokens;
  int64_t head_dim;
  bool interleaved;
  bool backward;  // rotate by the transpose
  DType x_dtype;
  DType y_dtype;
  DType table_dtype;
};

// Loss of every row of logits, and its gradient. The forward reads dloss and writes dlogits when the latter is not
// null; the backward reads lse.
struct CrossEntropy {
  const void* logits;  // [rows, cols]
  int64_t logits_stride;
  const int64_t* labels;  // [rows]: in [0, cols), or ignore_index
  float* loss;            // [rows]
  float* lse;             // [rows]
  float* log_prob;        // [rows], null when stats are not wanted
  float* entropy;         // [rows], null when stats are not wanted
  bool* correct;          // [rows], null when stats are not wanted
  const float* dloss;     // [rows], null for ones
  void* dlogits;          // [rows, cols], contiguous; may be logits itself
  int64_t rows;
  int64_t cols;
  int64_t ignore_index;
  float label_smoothing;
  float z_loss;
  float softcap;  // 0: none
  DType dtype;
};

}  // namespace lemur
