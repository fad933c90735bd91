// A kernel that proves that code compiled for this build runs on the GPU that is there: for bug reports.
#include "cuda/self_test.h"

#include <vector>

#include "cuda/check.h"
#include "cuda/launch.h"

namespace lemur::cuda {
namespace {

// The device code that runs was compiled for this architecture: 900 for sm_90.
#ifdef __CUDA_ARCH__
#define LEMUR_DEVICE_ARCH __CUDA_ARCH__
#else
#define LEMUR_DEVICE_ARCH 0
#endif

__global__ void self_test_kernel(int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = i == 0 ? LEMUR_DEVICE_ARCH : 3 * i + 1;
}

// Device memory, freed at the end of the scope.
struct Buffer {
  explicit Buffer(size_t bytes) { check(cudaMalloc(&data, bytes), "cudaMalloc"); }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data = nullptr;
};

}  // namespace

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

int self_test(int device) {
  const int count = device_count();
  if (device < 0 || device >= count) {
    throw std::runtime_error("CUDA: device " + std::to_string(device) + " asked for; there are " +
                             std::to_string(count));
  }
  const OnDevice guard(device);
  check(guard.status(), "cudaSetDevice");

  constexpr int n = 1000, threads = 128;
  std::vector<int> host(n);
  {
    Buffer out(n * sizeof(int));
    self_test_kernel<<<(n + threads - 1) / threads, threads>>>(static_cast<int*>(out.data), n);
    check(cudaGetLastError(), "launch of self_test_kernel");
    check(cudaMemcpy(host.data(), out.data, n * sizeof(int), cudaMemcpyDeviceToHost), "run of self_test_kernel");
  }

  for (int i = 1; i < n; ++i) {
    if (host[i] != 3 * i + 1) {
      throw std::runtime_error("CUDA: self_test_kernel wrote " + std::to_string(host[i]) + " at " + std::to_string(i));
    }
  }
  return host[0] / 10;
}

}  // namespace lemur::cuda
