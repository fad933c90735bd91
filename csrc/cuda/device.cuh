// What the kernels share on the device: packs of elements, sums over a block, sigmoid, tanh.
//
// A pack is what a thread loads and stores at once: 16 bytes of the widest of an op's tensors, or one element where
// alignment does not allow more. Arithmetic is float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lemur::cuda {

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T values[kSize];
};

// Elements of a pack.
template <typename Widest>
constexpr int kWhole = 16 / sizeof(Widest);

// As many bytes at once as a pack has.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <int kSize, typename T>
__device__ __forceinline__ Pack<T, kSize> load_pack(const T* p) {
  const auto word = *reinterpret_cast<const typename Word<sizeof(Pack<T, kSize>)>::type*>(p);
  Pack<T, kSize> pack;
  memcpy(&pack, &word, sizeof(pack));
  return pack;
}

// To global memory. In assembly, because the compiler takes some stores of 16 bytes apart again. It does not know what
// they write: nothing that a kernel stores by them may be read by the same launch.
__device__ __forceinline__ void store_word(void* p, const uint4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w));
}
__device__ __forceinline__ void store_word(void* p, const uint2& v) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y));
}
template <typename T>
__device__ __forceinline__ void store_word(void* p, const T& v) {
  *static_cast<T*>(p) = v;
}

template <typename T, int kSize>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kSize>& pack) {
  typename Word<sizeof(pack)>::type word;
  memcpy(&word, &pack, sizeof(pack));
  store_word(p, word);
}

template <typename T, int kSize>
__device__ __forceinline__ Pack<T, kSize> zeros() {
  Pack<T, kSize> pack;
#pragma unroll
  for (int i = 0; i < kSize; ++i) pack.values[i] = T(0.f);
  return pack;
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

__device__ __forceinline__ __nv_bfloat162 pair_from(float a, float b, __nv_bfloat16) {
  return __floats2bfloat162_rn(a, b);
}
__device__ __forceinline__ __half2 pair_from(float a, float b, __half) { return __floats2half2_rn(a, b); }

// Rounds to T: two at a time, in one instruction.
template <typename T, int kSize>
__device__ __forceinline__ Pack<T, kSize> pack_of(const float (&v)[kSize]) {
  Pack<T, kSize> pack;
  if constexpr (sizeof(T) == 2 && kSize > 1) {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      const auto pair = pair_from(v[i], v[i + 1], T());
      memcpy(&pack.values[i], &pair, sizeof(pair));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) pack.values[i] = from_float<T>(v[i]);
  }
  return pack;
}

template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

// Sum, or maximum, of all lanes, with the same bits in each.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int apart = 16; apart; apart /= 2) v += __shfl_xor_sync(0xffffffffu, v, apart);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int apart = 16; apart; apart /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, apart));
  return v;
}

// Sum over the blockDim.x threads of a row, whole warps, with the same bits in each. All threads of the block call it.
// `scratch` has a float for each warp; between two uses of it every thread must have passed a barrier.
__device__ __forceinline__ float row_sum(float v, float* scratch) {
  v = warp_sum(v);
  const int warps = blockDim.x / 32;
  if (warps == 1) return v;  // the same in all threads
  const int first = threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) scratch[first + threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.f;
  for (int i = 0; i < warps; ++i) v += scratch[first + i];
  return v;
}

constexpr float kLog2e = 1.4426950408889634f;

// 2^x in one instruction, to 2 roundings; 0 below the normal numbers.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / (1 + exp(-x)), to a few roundings; 0 and 1 far out.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + exp2_of(x * -kLog2e)); }

// To a few roundings, for small arguments too. Coefficients: Moshier's Cephes library, tanhf.
__device__ __forceinline__ float tanh_of(float x) {
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = fmaf(p, z, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  const float near_zero = fmaf(p * z, x, x);
  return z < 0.390625f ? near_zero : 1.f - 2.f * sigmoid(-2.f * x);
}

}  // namespace lemur::cuda
