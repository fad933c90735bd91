// Host side of a launch: the device, the call, the error; and which variant of a kernel fits its tensors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/check.h"
#include "cuda/kernels.h"
#include "dtype.h"

namespace lemur::cuda {

// Makes a device the current one until the end of the scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    status_ = cudaGetDevice(&before_);
    if (status_ != cudaSuccess || device == before_) return;
    status_ = cudaSetDevice(device);
    changed_ = status_ == cudaSuccess;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

// Launches a kernel. `describe()` says for which op and shapes; it is called when CUDA refuses.
template <typename... Parameters, typename Describe, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, size_t shared, const Place& place,
            const Describe& describe, Arguments... arguments) {
  // Another number would be cut off in silence.
  if (blocks < 1 || blocks > INT32_MAX) {
    throw std::runtime_error("CUDA: " + describe() + ": got " + std::to_string(blocks) +
                             " blocks; takes 1 to 2^31 - 1");
  }
  const OnDevice guard(place.device);
  std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  const cudaError_t status =
      guard.status() != cudaSuccess
          ? guard.status()
          : std::apply(
                [&](auto&... value) {
                  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
                  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                          threads, pointers, shared, static_cast<cudaStream_t>(place.stream));
                },
                values);
  if (status != cudaSuccess) {
    cudaGetLastError();  // it was reported: the next launch must not be blamed for it
    // What an earlier kernel did wrong is told to whoever calls next.
    check(status, (describe() + " on device " + std::to_string(place.device) + ", or an earlier call").c_str());
  }
}

// What a kernel has as an int: widths and counts of heads. Half of what an int holds, so that a step past the end fits.
inline int narrow(const char* name, int64_t value) {
  if (value > INT32_MAX / 2) {
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) + "; takes fewer than 2^30");
  }
  return static_cast<int>(value);
}

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// n, rounded up to whole warps.
inline int whole_warps(int64_t n) { return static_cast<int>(ceil_div(n, 32) * 32); }

// Whether pointers and strides allow accesses of `bytes` bytes.
struct Alignment {
  std::size_t bytes;

  bool holds(const void* pointer) const { return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0; }
  bool holds(const void* pointer, int64_t stride, std::size_t element_bytes) const {
    return holds(pointer) && static_cast<std::size_t>(stride) * element_bytes % bytes == 0;
  }
};

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the type of a dtype.
template <typename Body>
void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>{});
    case DType::kBFloat16:
      return body(Type<__nv_bfloat16>{});
    case DType::kFloat16:
      return body(Type<__half>{});
  }
}

inline const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

inline std::string shape_of(int64_t rows, int64_t cols, DType dtype) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "] " + name_of(dtype);
}

}  // namespace lemur::cuda
