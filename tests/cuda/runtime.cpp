// A CUDA runtime without a GPU, for tests: a launch calls back to Python, with the kernel's name and its arguments.
//
// The launchers of csrc/cuda are linked against this in place of cudart. It has what they call, and what nvcc's own
// registration code calls.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "cuda/bind.h"

namespace {

using OnLaunch = int (*)(const char* name, const unsigned* grid_and_block, void** arguments, size_t shared,
                         void* stream, int device);

std::map<const void*, std::string> names;
OnLaunch on_launch = nullptr;
int current = 0;

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNoDevice; }

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  const unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  const auto found = names.find(function);
  if (found == names.end() || on_launch == nullptr) return cudaErrorInvalidDeviceFunction;
  return static_cast<cudaError_t>(on_launch(found->second.c_str(), sizes, arguments, shared, stream, current));
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "the error's name"; }
const char* cudaGetErrorString(cudaError_t) { return "the error in words"; }

// The self test's.
cudaError_t cudaMalloc(void**, size_t) { return cudaErrorNoDevice; }
cudaError_t cudaFree(void*) { return cudaErrorNoDevice; }
cudaError_t cudaMemcpy(void*, const void*, size_t, cudaMemcpyKind) { return cudaErrorNoDevice; }

}  // extern "C"

PYBIND11_MODULE(_simulated, m) {
  lemur::cuda::bind(m);
  m.def("set_on_launch", [](std::uintptr_t f) { on_launch = reinterpret_cast<OnLaunch>(f); });
  m.def("current_device", [] { return current; });
  m.def("set_device", [](int device) { current = device; });
}
