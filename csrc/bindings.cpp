// The Python module lemur_fast._C.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cpu/kernels.h"
#include "cpu/labels.h"
#include "cpu/parallel.h"
#include "dtype.h"
#include "packing.h"
#ifdef LEMUR_FAST_HAS_CUDA
#include "cuda/bind.h"
#endif

namespace py = pybind11;
using namespace py::literals;

namespace {

using lemur::DType;
using lemur::bindings::check_present;
using lemur::bindings::check_size;
using lemur::bindings::dtype_of;
using lemur::bindings::pointer;
using lemur::bindings::refuse;

std::vector<std::string> split(const std::string& names) {
  std::vector<std::string> parts;
  std::stringstream stream(names);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = LEMUR_FAST_VERSION;
  info["build_type"] = LEMUR_FAST_BUILD_TYPE;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["cpu_isas"] = split(LEMUR_FAST_CPU_ISAS);
#ifdef LEMUR_FAST_HAS_CUDA
  info["cuda"] = LEMUR_FAST_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
  info["cuda_archs"] = split(LEMUR_FAST_CUDA_ARCHS);
  info["cuda_missing"] = LEMUR_FAST_CUDA_MISSING;
  return info;
}

// Arguments are checked with the GIL held; the kernel runs without it.
template <typename Args, typename... Given>
auto on_cpu(Args (*checked)(Given...), void (*lemur::cpu::Kernels::*run)(const Args&)) {
  return [checked, run](Given... given) {
    const Args args = checked(given...);
    const auto& table = lemur::cpu::kernels();
    py::gil_scoped_release release;
    (table.*run)(args);
  };
}

// Here looking at them is cheap; on a GPU it would cost a sync.
void check_labels(const int64_t* labels, int64_t rows, int64_t vocab, int64_t ignore_index) {
  const int64_t row = lemur::cpu::first_wrong_label(labels, rows, vocab, ignore_index);
  if (row < 0) return;
  refuse("labels: got " + std::to_string(labels[row]) + " at position " + std::to_string(row) + "; takes 0 to " +
         std::to_string(vocab - 1) + ", or ignore_index " + std::to_string(ignore_index));
}

int64_t trained_rows(std::uintptr_t labels, int64_t rows, int64_t vocab, int64_t ignore_index, std::uintptr_t out) {
  check_size("rows", rows, 0);
  check_present("labels", labels, rows);
  check_labels(pointer<const int64_t>(labels), rows, vocab, ignore_index);
  return lemur::cpu::trained_rows(pointer<const int64_t>(labels), rows, ignore_index, pointer<int64_t>(out));
}

void sum_losses(std::uintptr_t loss, std::uintptr_t labels, int64_t rows, int64_t ignore_index, std::uintptr_t total,
                std::uintptr_t items) {
  check_size("rows", rows, 0);
  check_present("loss", loss, rows);
  check_present("labels", labels, rows);
  check_present("total", total, 1);
  lemur::cpu::sum_losses(pointer<const float>(loss), pointer<const int64_t>(labels), rows, ignore_index,
                         pointer<float>(total), pointer<float>(items));
}

// cross_entropy_fwd and sum_losses in one call, which keeps the losses to itself: of small inputs calls and tensors are
// the cost.
void cross_entropy_sum(std::uintptr_t logits, int64_t logits_stride, std::uintptr_t labels, std::uintptr_t total,
                       std::uintptr_t items, std::uintptr_t lse, std::uintptr_t log_prob, std::uintptr_t entropy,
                       std::uintptr_t correct, std::uintptr_t dlogits, int64_t rows, int64_t cols, int64_t ignore_index,
                       float label_smoothing, float z_loss, float softcap, int dtype) {
  check_size("rows", rows, 0);
  check_present("total", total, 1);
  std::vector<float> loss(static_cast<size_t>(std::max<int64_t>(rows, 1)));
  const auto args = lemur::bindings::cross_entropy_fwd(
      logits, logits_stride, labels, reinterpret_cast<std::uintptr_t>(loss.data()), lse, log_prob, entropy, correct, 0,
      dlogits, rows, cols, ignore_index, label_smoothing, z_loss, softcap, dtype);
  check_labels(args.labels, rows, cols, ignore_index);
  const auto& table = lemur::cpu::kernels();
  py::gil_scoped_release release;
  table.cross_entropy_fwd(args);
  lemur::cpu::sum_losses(loss.data(), args.labels, rows, ignore_index, pointer<float>(total), pointer<float>(items));
}

template <typename... Given>
auto with_labels(lemur::CrossEntropy (*checked)(Given...),
                 void (*lemur::cpu::Kernels::*run)(const lemur::CrossEntropy&)) {
  return [checked, run](Given... given) {
    const lemur::CrossEntropy args = checked(given...);
    check_labels(args.labels, args.rows, args.cols, args.ignore_index);
    const auto& table = lemur::cpu::kernels();
    py::gil_scoped_release release;
    (table.*run)(args);
  };
}

template <typename... Given>
auto rotary_on_cpu(lemur::bindings::RotaryArguments (*checked)(Given...)) {
  return [checked](Given... given) {
    const auto args = checked(given...);
    const auto& table = lemur::cpu::kernels();
    py::gil_scoped_release release;
    table.rotary(args.xs.data(), static_cast<int>(args.xs.size()), args.tables);
  };
}

void accumulate(std::uintptr_t total, int64_t total_stride, std::uintptr_t x, int64_t rows, int64_t cols, bool add,
                int dtype) {
  check_size("rows", rows, 0);
  check_size("cols", cols, 0);
  check_present("total", total, rows * cols);
  check_present("x", x, rows * cols);
  const lemur::cpu::Accumulate args{pointer<float>(total),   total_stride, pointer<void>(x), rows, cols, add,
                                    dtype_of("dtype", dtype)};
  const auto& table = lemur::cpu::kernels();
  py::gil_scoped_release release;
  table.accumulate(args);
}

void scale(std::uintptr_t x, bool transposed, std::uintptr_t y, int64_t rows, int64_t cols, float factor, int x_dtype,
           int y_dtype) {
  check_size("rows", rows, 0);
  check_size("cols", cols, 1);
  check_present("x", x, rows);
  check_present("y", y, rows);
  const lemur::cpu::Scale args{pointer<void>(x),
                               transposed,
                               pointer<void>(y),
                               rows,
                               cols,
                               factor,
                               dtype_of("x_dtype", x_dtype),
                               dtype_of("y_dtype", y_dtype)};
  const auto& table = lemur::cpu::kernels();
  py::gil_scoped_release release;
  table.scale(args);
}

// Documents with the dearest first; those without queries and keys are left out.
std::vector<lemur::cpu::AttentionDocument> documents_of(std::uintptr_t cu_seqlens, std::uintptr_t cu_seqlens_k,
                                                        int64_t num_documents) {
  const auto* q = pointer<const int32_t>(cu_seqlens);
  const auto* k = pointer<const int32_t>(cu_seqlens_k);
  std::vector<lemur::cpu::AttentionDocument> documents;
  for (int64_t i = 0; i < num_documents; ++i) {
    if (q[i + 1] > q[i] || k[i + 1] > k[i]) documents.push_back({q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i]});
  }
  std::stable_sort(documents.begin(), documents.end(),
                   [](const auto& a, const auto& b) { return a.queries * a.keys > b.queries * b.keys; });
  return documents;
}

void check_boundaries(const char* name, std::uintptr_t cu_seqlens, int64_t num_documents, int64_t tokens) {
  check_present(name, cu_seqlens, 1);
  const auto* bounds = pointer<const int32_t>(cu_seqlens);
  bool valid = bounds[0] == 0 && bounds[num_documents] <= tokens;
  for (int64_t i = 0; i < num_documents; ++i) valid = valid && bounds[i] <= bounds[i + 1];
  if (!valid) refuse(std::string(name) + ": must rise from 0 to at most " + std::to_string(tokens));
}

// (data, token_stride, head_stride)
using StridedItem = std::tuple<std::uintptr_t, int64_t, int64_t>;

lemur::cpu::Strided strided(const char* name, const StridedItem& item, int64_t tokens) {
  check_present(name, std::get<0>(item), tokens);
  return {pointer<void>(std::get<0>(item)), std::get<1>(item), std::get<2>(item)};
}

struct AttentionShape {
  std::vector<lemur::cpu::AttentionDocument> documents;
  lemur::cpu::Attention args{};

  AttentionShape(std::uintptr_t cu_seqlens, std::uintptr_t cu_seqlens_k, int64_t num_documents, const StridedItem& q,
                 const StridedItem& k, const StridedItem& v, std::uintptr_t lse, int64_t query_tokens,
                 int64_t key_tokens, int64_t q_heads, int64_t kv_heads, int64_t head_dim, bool causal, int64_t window,
                 float softcap, float scale, int dtype) {
    check_size("num_documents", num_documents, 0);
    check_size("query_tokens", query_tokens, 0);
    check_size("key_tokens", key_tokens, 0);
    check_size("kv_heads", kv_heads, 1);
    check_size("head_dim", head_dim, 1);
    check_size("window", window, 0);
    if (head_dim > 256) refuse("head_dim: got " + std::to_string(head_dim) + "; must be at most 256");
    if (q_heads < 0 || q_heads % kv_heads) {
      refuse("q_heads: got " + std::to_string(q_heads) + "; must be a multiple of kv_heads, " +
             std::to_string(kv_heads));
    }
    check_boundaries("cu_seqlens", cu_seqlens, num_documents, query_tokens);
    check_boundaries("cu_seqlens_k", cu_seqlens_k, num_documents, key_tokens);
    check_present("lse", lse, query_tokens * q_heads);
    documents = documents_of(cu_seqlens, cu_seqlens_k, num_documents);
    args.documents = documents.data();
    args.num_documents = static_cast<int64_t>(documents.size());
    args.q = strided("q", q, query_tokens * q_heads);
    args.k = strided("k", k, key_tokens);
    args.v = strided("v", v, key_tokens);
    args.lse = pointer<float>(lse);
    args.query_tokens = query_tokens;
    args.key_tokens = key_tokens;
    args.past_query = pointer<const int32_t>(cu_seqlens)[num_documents];
    args.past_key = pointer<const int32_t>(cu_seqlens_k)[num_documents];
    args.q_heads = q_heads;
    args.kv_heads = kv_heads;
    args.head_dim = head_dim;
    args.causal = causal;
    args.window = causal ? window : 0;
    args.softcap = softcap;
    args.scale = scale;
    args.dtype = dtype_of("dtype", dtype);
  }
};

void attention_fwd(std::uintptr_t cu_seqlens, std::uintptr_t cu_seqlens_k, int64_t num_documents, const StridedItem& q,
                   const StridedItem& k, const StridedItem& v, std::uintptr_t out, std::uintptr_t lse,
                   int64_t query_tokens, int64_t key_tokens, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                   bool causal, int64_t window, float softcap, float scale, int dtype) {
  AttentionShape shape(cu_seqlens, cu_seqlens_k, num_documents, q, k, v, lse, query_tokens, key_tokens, q_heads,
                       kv_heads, head_dim, causal, window, softcap, scale, dtype);
  check_present("out", out, query_tokens * q_heads);
  shape.args.out = pointer<void>(out);
  const auto& table = lemur::cpu::kernels();
  py::gil_scoped_release release;
  table.attention_fwd(shape.args);
}

void attention_bwd(std::uintptr_t cu_seqlens, std::uintptr_t cu_seqlens_k, int64_t num_documents,
                   const StridedItem& dout, std::uintptr_t dlse, const StridedItem& q, const StridedItem& k,
                   const StridedItem& v, const StridedItem& out, std::uintptr_t lse, std::uintptr_t dq,
                   std::uintptr_t dk, std::uintptr_t dv, int64_t query_tokens, int64_t key_tokens, int64_t q_heads,
                   int64_t kv_heads, int64_t head_dim, bool causal, int64_t window, float softcap, float scale,
                   int dtype) {
  AttentionShape shape(cu_seqlens, cu_seqlens_k, num_documents, q, k, v, lse, query_tokens, key_tokens, q_heads,
                       kv_heads, head_dim, causal, window, softcap, scale, dtype);
  shape.args.dout = strided("dout", dout, query_tokens * q_heads);
  shape.args.o = strided("out", out, query_tokens * q_heads);
  shape.args.dlse = pointer<float>(dlse);
  check_present("dq", dq, query_tokens * q_heads);
  check_present("dk", dk, key_tokens);
  check_present("dv", dv, key_tokens);
  shape.args.dq = pointer<void>(dq);
  shape.args.dk = pointer<void>(dk);
  shape.args.dv = pointer<void>(dv);
  const auto& table = lemur::cpu::kernels();
  py::gil_scoped_release release;
  table.attention_bwd(shape.args);
}

using Lengths = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

py::tuple best_fit_decreasing(const Lengths& lengths, int64_t capacity) {
  if (lengths.ndim() != 1) refuse("lengths: got " + std::to_string(lengths.ndim()) + " dimensions; takes one");
  check_size("capacity", capacity, 1);
  const int64_t n = lengths.size();
  const int64_t* data = lengths.data();
  py::array_t<int64_t> bins(n);
  int64_t* out = bins.mutable_data();
  int64_t count = 0;
  {
    py::gil_scoped_release release;
    for (int64_t i = 0; i < n; ++i) {
      if (data[i] < 1 || data[i] > capacity) {
        refuse("lengths: got " + std::to_string(data[i]) + " at " + std::to_string(i) + "; must lie in [1, " +
               std::to_string(capacity) + "]");
      }
    }
    count = lemur::best_fit_decreasing(data, n, capacity, out);
  }
  return py::make_tuple(bins, count);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of lemur_fast: kernels on raw pointers, free of torch.";
  m.attr("__version__") = LEMUR_FAST_VERSION;

  py::enum_<DType>(m, "DType", "Codes of the dtypes that kernels take.")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);

  m.def("build_info", &build_info, "How this module was built: compiler, OpenMP, instruction sets, CUDA and why not.");
  m.def("best_fit_decreasing", &best_fit_decreasing, "lengths"_a, "capacity"_a,
        "Packs lengths into bins. Returns (bin of every length, number of bins).");

  auto cpu = m.def_submodule("cpu", "CPU kernels.");
  cpu.def(
      "isa", [] { return lemur::cpu::kernels().isa; },
      "Name of the instruction set in use: the best this CPU has, or LEMUR_FAST_CPU's.");
  cpu.def("bfloat16_at_full_rate", &lemur::cpu::bfloat16_at_full_rate,
          "Whether this CPU multiplies bfloat16 without AMX, and at twice the rate of float32.");
  cpu.def("isas", &lemur::cpu::usable_isas, "Instruction sets that were built and that this CPU has, best first.");
  cpu.def("features", &lemur::cpu::features, "Features of this CPU that matter here.");
  cpu.def("threads", &lemur::cpu::max_threads, "Threads that the next kernel may use.");
  namespace checked = lemur::bindings;
  using lemur::cpu::Kernels;
  checked::def_rms_norm_fwd(cpu, on_cpu(checked::rms_norm_fwd, &Kernels::rms_norm_fwd));
  checked::def_rms_norm_bwd(cpu, on_cpu(checked::rms_norm_bwd, &Kernels::rms_norm_bwd));
  checked::def_swiglu_fwd(cpu, on_cpu(checked::swiglu_fwd, &Kernels::swiglu_fwd));
  checked::def_swiglu_bwd(cpu, on_cpu(checked::swiglu_bwd, &Kernels::swiglu_bwd));
  checked::def_rotary(cpu, rotary_on_cpu(checked::rotary));
  checked::def_cross_entropy_fwd(cpu, with_labels(checked::cross_entropy_fwd, &Kernels::cross_entropy_fwd));
  checked::def_cross_entropy_bwd(cpu, with_labels(checked::cross_entropy_bwd, &Kernels::cross_entropy_bwd));
  cpu.def("trained_rows", &trained_rows, "labels"_a, "rows"_a, "vocab"_a, "ignore_index"_a, "out"_a,
          "Writes the positions of labels [rows] that are not ignored, unless out is 0, and returns their number.");
  cpu.def("cross_entropy_sum", &cross_entropy_sum, "logits"_a, "logits_stride"_a, "labels"_a, "total"_a, "items"_a,
          "lse"_a, "log_prob"_a, "entropy"_a, "correct"_a, "dlogits"_a, "rows"_a, "cols"_a, "ignore_index"_a,
          "label_smoothing"_a, "z_loss"_a, "softcap"_a, "dtype"_a,
          "cross_entropy_fwd, of which only the sum of the losses, or their mean, is kept, as sum_losses gives it.");
  cpu.def(
      "sum_losses", &sum_losses, "loss"_a, "labels"_a, "rows"_a, "ignore_index"_a, "total"_a, "items"_a,
      "Sum of losses [rows]; unless items is 0, their mean over the labels that are not ignored, and how many those "
      "are, at least 1.");
  cpu.def("attention_fwd", &attention_fwd, "cu_seqlens"_a, "cu_seqlens_k"_a, "num_documents"_a, "q"_a, "k"_a, "v"_a,
          "out"_a, "lse"_a, "query_tokens"_a, "key_tokens"_a, "q_heads"_a, "kv_heads"_a, "head_dim"_a, "causal"_a,
          "window"_a, "softcap"_a, "scale"_a, "dtype"_a,
          "out and lse of attention; q, k, v as (data, token_stride, head_stride); see csrc/cpu/kernels.h.");
  cpu.def("attention_bwd", &attention_bwd, "cu_seqlens"_a, "cu_seqlens_k"_a, "num_documents"_a, "dout"_a, "dlse"_a,
          "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dq"_a, "dk"_a, "dv"_a, "query_tokens"_a, "key_tokens"_a, "q_heads"_a,
          "kv_heads"_a, "head_dim"_a, "causal"_a, "window"_a, "softcap"_a, "scale"_a, "dtype"_a,
          "dq, dk and dv of attention; see csrc/cpu/kernels.h.");
  cpu.def("accumulate", &accumulate, "total"_a, "total_stride"_a, "x"_a, "rows"_a, "cols"_a, "add"_a, "dtype"_a,
          "total = x, or total + x; total is float32; see csrc/cpu/kernels.h.");
  cpu.def("scale", &scale, "x"_a, "transposed"_a, "y"_a, "rows"_a, "cols"_a, "factor"_a, "x_dtype"_a, "y_dtype"_a,
          "y = x * factor, rounded once; see csrc/cpu/kernels.h.");

#ifdef LEMUR_FAST_HAS_CUDA
  auto cuda = m.def_submodule("cuda", "CUDA kernels.");
  lemur::cuda::bind(cuda);
#endif
}
