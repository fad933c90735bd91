// Vectors of floats, in the width of the instruction set that a file is compiled for.
//
//   Vec                  kLanes floats
//   load(p, lanes)       from float, bfloat16 or float16 memory, no alignment needed
//   store(p, v, lanes)   to them, rounded to nearest even
//   round_to<T>(v)       what a store to T and a load back would give
//   broadcast, add, mul, fma, sum
//
// `lanes` is Full, or Tail{n} for the first n lanes: a load then fills the others with zeros, a store leaves what lies
// behind untouched. for_lanes and sum_lanes walk a row with them, so that a kernel's body is written once for every
// dtype, instruction set and width.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtype.h"

#if defined(LEMUR_ISA_AVX512) || defined(LEMUR_ISA_AVX2)
#include <immintrin.h>
#endif

namespace lemur::cpu::LEMUR_ISA {

struct Full {};
struct Tail {
  int count;  // 0 < count < kLanes
};

// ---- vectors ----

#if defined(LEMUR_ISA_AVX512)

using Vec = __m512;
constexpr int kLanes = 16;

inline Vec broadcast(float value) { return _mm512_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }

inline Vec widen(bfloat16, __m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec widen(float16, __m256i bits) { return _mm512_cvtph_ps(bits); }

// A bfloat16 in the upper half of every lane, with something in the lower half. Not vcvtneps2bf16: that one flushes
// subnormals to zero.
inline __m512i round_upper(Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
inline __m256i narrow(bfloat16, Vec v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_upper(v), 16)); }
inline __m256i narrow(float16, Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline __mmask16 mask_of(Tail tail) { return static_cast<__mmask16>((1u << tail.count) - 1u); }

inline Vec load(const float* p, Full) { return _mm512_loadu_ps(p); }
inline Vec load(const float* p, Tail tail) { return _mm512_maskz_loadu_ps(mask_of(tail), p); }
inline void store(float* p, Vec v, Full) { _mm512_storeu_ps(p, v); }
inline void store(float* p, Vec v, Tail tail) { _mm512_mask_storeu_ps(p, mask_of(tail), v); }

template <typename T>
inline Vec load(const T* p, Full) {
  return widen(T{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <typename T>
inline Vec load(const T* p, Tail tail) {
  return widen(T{}, _mm256_maskz_loadu_epi16(mask_of(tail), p));
}
template <typename T>
inline void store(T* p, Vec v, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(T{}, v));
}
template <typename T>
inline void store(T* p, Vec v, Tail tail) {
  _mm256_mask_storeu_epi16(p, mask_of(tail), narrow(T{}, v));
}

#elif defined(LEMUR_ISA_AVX2)

using Vec = __m256;
constexpr int kLanes = 8;

inline Vec broadcast(float value) { return _mm256_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vec v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline Vec widen(bfloat16, __m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec widen(float16, __m128i bits) { return _mm256_cvtph_ps(bits); }

// A bfloat16 in the upper half of every lane, with something in the lower half.
inline __m256i round_upper(Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
inline __m128i narrow(bfloat16, Vec v) {
  const __m256i upper = _mm256_srli_epi32(round_upper(v), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}
inline __m128i narrow(float16, Vec v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline Vec load(const float* p, Full) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v, Full) { _mm256_storeu_ps(p, v); }
template <typename T>
inline Vec load(const T* p, Full) {
  return widen(T{}, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <typename T>
inline void store(T* p, Vec v, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(T{}, v));
}

#else  // generic: what the compiler makes of four floats (SSE2, NEON, ...)

typedef float Vec __attribute__((vector_size(16)));
constexpr int kLanes = 4;

inline Vec broadcast(float value) { return Vec{value, value, value, value}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

typedef uint32_t Bits __attribute__((vector_size(16)));
typedef uint16_t HalfBits __attribute__((vector_size(8)));

// A bfloat16 in the upper half of every lane, with something in the lower half.
inline Bits round_upper(Vec v) {
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits nan = reinterpret_cast<Bits>(v != v);
  return (nan & 0x7fc00000u) | (~nan & rounded);
}

// Halves one by one: SSE2 has nothing for them.
#if defined(__aarch64__)
inline float to_float(float16 value) {
  __fp16 half;
  std::memcpy(&half, &value, sizeof half);
  return half;
}
inline float16 to_float16(float value) {
  const __fp16 half = value;
  float16 result;
  std::memcpy(&result, &half, sizeof result);
  return result;
}
#else
inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x007fffffu));  // inf, nan
  // The exponent's bias is 112 less. The product is exact, and right for subnormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));
}
inline float16 to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2**-14, where half's steps are 2**-24: in 0.5 + |value| a float's step is just that, so the sum rounds.
    const uint32_t steps = float_to_bits(0.5f + bits_to_float(magnitude)) - float_to_bits(0.5f);
    return {static_cast<uint16_t>(sign | steps)};
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u) >> 13))};
}
#endif

inline Vec load(const float* p, Full) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const bfloat16* p, Full) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof bits);
  return reinterpret_cast<Vec>(__builtin_convertvector(bits, Bits) << 16);
}
inline Vec load(const float16* p, Full) { return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }

inline void store(float* p, Vec v, Full) { std::memcpy(p, &v, sizeof v); }
inline void store(bfloat16* p, Vec v, Full) {
  const HalfBits bits = __builtin_convertvector(round_upper(v) >> 16, HalfBits);
  std::memcpy(p, &bits, sizeof bits);
}
inline void store(float16* p, Vec v, Full) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_float16(v[i]);
}

#endif

#if !defined(LEMUR_ISA_AVX512)
// No masks for every dtype: the tail goes through a buffer, once a row.
template <typename T>
inline Vec load(const T* p, Tail tail) {
  T memory[kLanes] = {};
  std::memcpy(memory, p, sizeof(T) * static_cast<size_t>(tail.count));
  return load(static_cast<const T*>(memory), Full{});
}
template <typename T>
inline void store(T* p, Vec v, Tail tail) {
  T memory[kLanes];
  store(static_cast<T*>(memory), v, Full{});
  std::memcpy(p, memory, sizeof(T) * static_cast<size_t>(tail.count));
}
#endif

// ---- rounding ----

template <typename T>
struct Rounder {
  static Vec round(Vec v) {
    T memory[kLanes];
    store(static_cast<T*>(memory), v, Full{});
    return load(static_cast<const T*>(memory), Full{});
  }
};
template <>
struct Rounder<float> {
  static Vec round(Vec v) { return v; }
};
#if defined(LEMUR_ISA_AVX512)
template <>
struct Rounder<bfloat16> {
  static Vec round(Vec v) {
    return _mm512_castsi512_ps(_mm512_and_si512(round_upper(v), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};
template <>
struct Rounder<float16> {
  static Vec round(Vec v) { return _mm512_cvtph_ps(narrow(float16{}, v)); }
};
#elif defined(LEMUR_ISA_AVX2)
template <>
struct Rounder<bfloat16> {
  static Vec round(Vec v) {
    return _mm256_castsi256_ps(_mm256_and_si256(round_upper(v), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};
template <>
struct Rounder<float16> {
  static Vec round(Vec v) { return _mm256_cvtph_ps(narrow(float16{}, v)); }
};
#else
template <>
struct Rounder<bfloat16> {
  static Vec round(Vec v) { return reinterpret_cast<Vec>(round_upper(v) & 0xffff0000u); }
};
#endif

template <typename T>
inline Vec round_to(Vec v) {
  return Rounder<T>::round(v);
}

// ---- walking a row ----

// Calls body(i, lanes) for i = 0, kLanes, 2 kLanes, ... up to n.
template <typename Body>
inline void for_lanes(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Full{});
  if (i < n) body(i, Tail{static_cast<int>(n - i)});
}

// Sum over a row: body(i, lanes, partial) returns `partial` with the terms at i added. Lanes past a tail must add zero.
//
// Four partial sums run side by side, because one alone would wait for its own latency, and are added up every 32
// steps, so that the error grows with the width about as slowly as in a pairwise sum.
template <typename Body>
inline float sum_lanes(int64_t n, Body&& body) {
  constexpr int64_t kStep = 4 * kLanes;
  const Vec zero = broadcast(0.f);
  Vec total = zero;
  int64_t i = 0;
  while (i + kStep <= n) {
    const int64_t past = i + 32 * kStep <= n ? i + 32 * kStep : n;
    Vec a = zero, b = zero, c = zero, d = zero;
    for (; i + kStep <= past; i += kStep) {
      a = body(i, Full{}, a);
      b = body(i + kLanes, Full{}, b);
      c = body(i + 2 * kLanes, Full{}, c);
      d = body(i + 3 * kLanes, Full{}, d);
    }
    total = add(total, add(add(a, b), add(c, d)));
  }
  Vec rest = zero;
  for (; i + kLanes <= n; i += kLanes) rest = body(i, Full{}, rest);
  if (i < n) rest = body(i, Tail{static_cast<int>(n - i)}, rest);
  return sum(add(total, rest));
}

// ---- dtypes ----

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) for the storage type of a dtype code. Codes are checked where Python comes in.
template <typename Body>
inline void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>{});
    case DType::kBFloat16:
      return body(Type<bfloat16>{});
    case DType::kFloat16:
      return body(Type<float16>{});
  }
}

// The type that torch.promote_types gives: the same for equals, float for everything mixed.
template <typename A, typename B>
struct Promote {
  using type = float;
};
template <typename A>
struct Promote<A, A> {
  using type = A;
};

}  // namespace lemur::cpu::LEMUR_ISA
