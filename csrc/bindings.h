// What the bindings of the CPU and of the CUDA kernels share: the arguments of an op, checked as far as they can be
// without knowing the tensors, and their names in Python. The torch side, lemur_fast/ops, checks shapes, dtypes and
// devices before it hands over raw pointers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "dtype.h"

namespace lemur::bindings {

namespace py = pybind11;

// Pointers cross as integers (Tensor.data_ptr()); 0 means absent.
template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

inline DType dtype_of(const char* name, int code) {
  if (code < 0 || code > 2) refuse(std::string(name) + ": got " + std::to_string(code) + "; takes a code of _C.DType");
  return static_cast<DType>(code);
}

inline void check_size(const char* name, int64_t value, int64_t least) {
  if (value < least) {
    refuse(std::string(name) + ": got " + std::to_string(value) + "; must be at least " + std::to_string(least));
  }
}

inline void check_present(const char* name, std::uintptr_t address, int64_t rows) {
  if (address == 0 && rows > 0) refuse(std::string(name) + ": got a null pointer");
}

// ---- arguments ----

inline RmsNormFwd rms_norm_fwd(std::uintptr_t x, int64_t x_stride, std::uintptr_t residual, int64_t residual_stride,
                               std::uintptr_t weight, std::uintptr_t y, std::uintptr_t h, std::uintptr_t rstd,
                               int64_t rows, int64_t cols, float eps, int x_dtype, int w_dtype) {
  check_size("rows", rows, 0);
  check_size("cols", cols, 1);
  check_present("x", x, rows);
  check_present("weight", weight, rows);
  check_present("y", y, rows);
  if (residual) check_present("h", h, rows);
  return {pointer<void>(x),
          x_stride,
          pointer<void>(residual),
          residual_stride,
          pointer<void>(weight),
          pointer<void>(y),
          pointer<void>(h),
          pointer<float>(rstd),
          rows,
          cols,
          eps,
          dtype_of("x_dtype", x_dtype),
          dtype_of("w_dtype", w_dtype)};
}

inline RmsNormBwd rms_norm_bwd(std::uintptr_t dy, int64_t dy_stride, std::uintptr_t dh, int64_t dh_stride,
                               std::uintptr_t h, int64_t h_stride, std::uintptr_t weight, std::uintptr_t rstd,
                               std::uintptr_t dx, std::uintptr_t dw, int64_t rows, int64_t cols, int x_dtype,
                               int w_dtype) {
  check_size("rows", rows, 0);
  check_size("cols", cols, 1);
  check_present("dy", dy, rows);
  check_present("h", h, rows);
  check_present("weight", weight, rows);
  check_present("rstd", rstd, rows);
  check_present("dx", dx, rows);
  return {pointer<void>(dy),
          dy_stride,
          pointer<void>(dh),
          dh_stride,
          pointer<void>(h),
          h_stride,
          pointer<void>(weight),
          pointer<float>(rstd),
          pointer<void>(dx),
          pointer<float>(dw),
          rows,
          cols,
          dtype_of("x_dtype", x_dtype),
          dtype_of("w_dtype", w_dtype)};
}

inline SwigluFwd swiglu_fwd(std::uintptr_t gate, int64_t gate_stride, std::uintptr_t up, int64_t up_stride,
                            std::uintptr_t y, int64_t rows, int64_t cols, int dtype) {
  check_size("rows", rows, 0);
  check_size("cols", cols, 1);
  check_present("gate", gate, rows);
  check_present("up", up, rows);
  check_present("y", y, rows);
  return {pointer<void>(gate),     gate_stride, pointer<void>(up), up_stride, pointer<void>(y), rows, cols,
          dtype_of("dtype", dtype)};
}

inline SwigluBwd swiglu_bwd(std::uintptr_t dy, int64_t dy_stride, std::uintptr_t gate, int64_t gate_stride,
                            std::uintptr_t up, int64_t up_stride, std::uintptr_t dgate, std::uintptr_t dup,
                            int64_t rows, int64_t cols, int dtype) {
  check_size("rows", rows, 0);
  check_size("cols", cols, 1);
  check_present("dy", dy, rows);
  check_present("gate", gate, rows);
  check_present("up", up, rows);
  check_present("dgate", dgate, rows);
  check_present("dup", dup, rows);
  return {pointer<void>(dy),
          dy_stride,
          pointer<void>(gate),
          gate_stride,
          pointer<void>(up),
          up_stride,
          pointer<void>(dgate),
          pointer<void>(dup),
          rows,
          cols,
          dtype_of("dtype", dtype)};
}

// (x, token_stride, head_stride, y, heads)
using RotaryItem = std::tuple<std::uintptr_t, int64_t, int64_t, std::uintptr_t, int64_t>;

struct RotaryArguments {
  std::vector<Rotary> xs;
  RotaryTables tables;
};

inline RotaryArguments rotary(const std::vector<RotaryItem>& items, std::uintptr_t cos, int64_t cos_stride,
                              std::uintptr_t sin, int64_t sin_stride, int64_t columns, int64_t tokens, int64_t head_dim,
                              bool interleaved, bool backward, int x_dtype, int y_dtype, int table_dtype) {
  check_size("tokens", tokens, 0);
  check_size("head_dim", head_dim, 2);
  if (head_dim % 2) refuse("head_dim: got " + std::to_string(head_dim) + "; must be even");
  if (columns != head_dim && columns != head_dim / 2) {
    refuse("columns: got " + std::to_string(columns) + "; takes head_dim or half of it, " + std::to_string(head_dim));
  }
  check_present("cos", cos, tokens);
  check_present("sin", sin, tokens);
  std::vector<Rotary> xs;
  for (const auto& [x, token_stride, head_stride, y, heads] : items) {
    check_size("heads", heads, 0);
    check_present("x", x, tokens * heads);
    check_present("y", y, tokens * heads);
    xs.push_back({pointer<void>(x), token_stride, head_stride, pointer<void>(y), heads});
  }
  return {std::move(xs),
          {pointer<void>(cos), cos_stride, pointer<void>(sin), sin_stride, columns, tokens, head_dim, interleaved,
           backward, dtype_of("x_dtype", x_dtype), dtype_of("y_dtype", y_dtype), dtype_of("table_dtype", table_dtype)}};
}

inline CrossEntropy cross_entropy_fwd(std::uintptr_t logits, int64_t logits_stride, std::uintptr_t labels,
                                      std::uintptr_t loss, std::uintptr_t lse, std::uintptr_t log_prob,
                                      std::uintptr_t entropy, std::uintptr_t correct, std::uintptr_t dloss,
                                      std::uintptr_t dlogits, int64_t rows, int64_t cols, int64_t ignore_index,
                                      float label_smoothing, float z_loss, float softcap, int dtype) {
  check_size("rows", rows, 0);
  check_size("cols", cols, 1);
  check_present("logits", logits, rows);
  check_present("labels", labels, rows);
  check_present("loss", loss, rows);
  check_present("lse", lse, rows);
  if (log_prob) {
    check_present("entropy", entropy, rows);
    check_present("correct", correct, rows);
  }
  return {pointer<void>(logits),
          logits_stride,
          pointer<const int64_t>(labels),
          pointer<float>(loss),
          pointer<float>(lse),
          pointer<float>(log_prob),
          pointer<float>(entropy),
          pointer<bool>(correct),
          pointer<float>(dloss),
          pointer<void>(dlogits),
          rows,
          cols,
          ignore_index,
          label_smoothing,
          z_loss,
          softcap,
          dtype_of("dtype", dtype)};
}

inline CrossEntropy cross_entropy_bwd(std::uintptr_t dloss, std::uintptr_t logits, int64_t logits_stride,
                                      std::uintptr_t labels, std::uintptr_t lse, std::uintptr_t dlogits, int64_t rows,
                                      int64_t cols, int64_t ignore_index, float label_smoothing, float z_loss,
                                      float softcap, int dtype) {
  check_size("rows", rows, 0);
  check_size("cols", cols, 1);
  check_present("dloss", dloss, rows);
  check_present("logits", logits, rows);
  check_present("labels", labels, rows);
  check_present("lse", lse, rows);
  check_present("dlogits", dlogits, rows);
  return {pointer<void>(logits),
          logits_stride,
          pointer<const int64_t>(labels),
          nullptr,
          pointer<float>(lse),
          nullptr,
          nullptr,
          nullptr,
          pointer<float>(dloss),
          pointer<void>(dlogits),
          rows,
          cols,
          ignore_index,
          label_smoothing,
          z_loss,
          softcap,
          dtype_of("dtype", dtype)};
}

// ---- names in Python; `more` are those that a device adds ----

template <typename Function, typename... More>
void def_rms_norm_fwd(py::module_& m, const Function& f, const More&... more) {
  using namespace py::literals;
  m.def("rms_norm_fwd", f, "x"_a, "x_stride"_a, "residual"_a, "residual_stride"_a, "weight"_a, "y"_a, "h"_a, "rstd"_a,
        "rows"_a, "cols"_a, "eps"_a, "x_dtype"_a, "w_dtype"_a, more...,
        "y, h and rstd of RMSNorm; pointers as integers, 0 for absent; see csrc/arguments.h.");
}

template <typename Function, typename... More>
void def_rms_norm_bwd(py::module_& m, const Function& f, const More&... more) {
  using namespace py::literals;
  m.def("rms_norm_bwd", f, "dy"_a, "dy_stride"_a, "dh"_a, "dh_stride"_a, "h"_a, "h_stride"_a, "weight"_a, "rstd"_a,
        "dx"_a, "dw"_a, "rows"_a, "cols"_a, "x_dtype"_a, "w_dtype"_a, more...,
        "dx and dw of RMSNorm; pointers as integers, 0 for absent; see csrc/arguments.h.");
}

template <typename Function, typename... More>
void def_swiglu_fwd(py::module_& m, const Function& f, const More&... more) {
  using namespace py::literals;
  m.def("swiglu_fwd", f, "gate"_a, "gate_stride"_a, "up"_a, "up_stride"_a, "y"_a, "rows"_a, "cols"_a, "dtype"_a,
        more..., "y of SwiGLU; see csrc/arguments.h.");
}

template <typename Function, typename... More>
void def_swiglu_bwd(py::module_& m, const Function& f, const More&... more) {
  using namespace py::literals;
  m.def("swiglu_bwd", f, "dy"_a, "dy_stride"_a, "gate"_a, "gate_stride"_a, "up"_a, "up_stride"_a, "dgate"_a, "dup"_a,
        "rows"_a, "cols"_a, "dtype"_a, more..., "dgate and dup of SwiGLU; see csrc/arguments.h.");
}

template <typename Function, typename... More>
void def_rotary(py::module_& m, const Function& f, const More&... more) {
  using namespace py::literals;
  m.def("rotary", f, "items"_a, "cos"_a, "cos_stride"_a, "sin"_a, "sin_stride"_a, "columns"_a, "tokens"_a, "head_dim"_a,
        "interleaved"_a, "backward"_a, "x_dtype"_a, "y_dtype"_a, "table_dtype"_a, more...,
        "Rotates every item (x, token_stride, head_stride, y, heads); see csrc/arguments.h.");
}

template <typename Function, typename... More>
void def_cross_entropy_fwd(py::module_& m, const Function& f, const More&... more) {
  using namespace py::literals;
  m.def("cross_entropy_fwd", f, "logits"_a, "logits_stride"_a, "labels"_a, "loss"_a, "lse"_a, "log_prob"_a, "entropy"_a,
        "correct"_a, "dloss"_a, "dlogits"_a, "rows"_a, "cols"_a, "ignore_index"_a, "label_smoothing"_a, "z_loss"_a,
        "softcap"_a, "dtype"_a, more...,
        "Loss of every row, with log_prob its stats, with dlogits its gradient; see csrc/arguments.h.");
}

template <typename Function, typename... More>
void def_cross_entropy_bwd(py::module_& m, const Function& f, const More&... more) {
  using namespace py::literals;
  m.def("cross_entropy_bwd", f, "dloss"_a, "logits"_a, "logits_stride"_a, "labels"_a, "lse"_a, "dlogits"_a, "rows"_a,
        "cols"_a, "ignore_index"_a, "label_smoothing"_a, "z_loss"_a, "softcap"_a, "dtype"_a, more...,
        "Gradient of every row from its lse; see csrc/arguments.h.");
}

}  // namespace lemur::bindings
