// The table of CPU kernels. Every kernel is compiled once per instruction set; isa.cpp chooses a table at run time.
//
// To add an op: its arguments here (in arguments.h, when GPUs have it too) and a line in Kernels, its file in csrc/cpu
// and in CMakeLists.txt (CPU_KERNELS), a line in kernels.cpp, a binding in bindings.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "arguments.h"
#include "dtype.h"

namespace lemur::cpu {

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

// Whether vdpbf16ps, the product of pairs of bfloat16 without AMX, does twice the work of a float32 fma in the same
// time. Intel's chips with fp16 arithmetic, which were made for AMX, take twice the time; those before them, and AMD's,
// do not.
bool bfloat16_at_full_rate();

// Names of the instruction sets that were built and that this CPU has, best first.
std::vector<std::string> usable_isas();

}  // namespace lemur::cpu
