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

// total = x, or total + x; [rows, cols] both, x contiguous.
struct Accumulate {
  float* total;
  int64_t total_stride;
  const void* x;
  int64_t rows;
  int64_t cols;
  bool add;
  DType dtype;
};

// y = round(x * factor), [rows, cols], contiguous.
struct Scale {
  const void* x;
  bool transposed;  // x lies in memory as [cols, rows]
  void* y;
  int64_t rows;
  int64_t cols;
  float factor;
  DType x_dtype;
  DType y_dtype;
};

// A tensor [tokens, heads, head_dim] whose last dimension has stride 1.
struct Strided {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

struct AttentionDocument {
  int64_t query_start;
  int64_t queries;
  int64_t key_start;
  int64_t keys;
};

// Attention of documents, and its gradients. out, dq, dk and dv are contiguous.
struct Attention {
  const AttentionDocument* documents;
  int64_t num_documents;
  Strided q;          // [query_tokens, q_heads, head_dim]
  Strided k;          // [key_tokens, kv_heads, head_dim]
  Strided v;          // as k
  void* out;          // forward: as q
  float* lse;         // [q_heads, query_tokens]; written by the forward, read by the backward
  Strided o;          // backward: the forward's out
  Strided dout;       // backward
  const float* dlse;  // backward: [q_heads, query_tokens], or null
  void* dq;           // backward
  void* dk;
  void* dv;
  int64_t query_tokens;
  int64_t key_tokens;
  int64_t past_query;  // tokens from here on belong to no document
  int64_t past_key;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;
  bool causal;
  int64_t window;  // 0: all keys
  float softcap;   // 0: none
  float scale;
  DType dtype;
};

struct Kernels {
  const char* isa;
  void (*rms_norm_fwd)(const RmsNormFwd&);
  void (*rms_norm_bwd)(const RmsNormBwd&);
  void (*swiglu_fwd)(const SwigluFwd&);
  void (*swiglu_bwd)(const SwigluBwd&);
  void (*rotary)(const Rotary* xs, int count, const RotaryTables&);
  void (*cross_entropy_fwd)(const CrossEntropy&);
  void (*cross_entropy_bwd)(const CrossEntropy&);
  void (*accumulate)(const Accumulate&);
  void (*scale)(const Scale&);
  void (*attention_fwd)(const Attention&);
  void (*attention_bwd)(const Attention&);
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
