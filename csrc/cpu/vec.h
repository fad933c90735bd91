// Vectors of floats, in the width of the instruction set that a file is compiled for.
//
//   Vec                                  kLanes floats
//   load(p, lanes)                       from float, bfloat16 or float16 memory, no alignment needed
//   store(p, v, lanes)                   to them, rounded to nearest even
//   load_scratch, store_scratch          memory of the kernel's own: the cheapest order of elements
//   load_unordered, store_unordered      the order of elements that is cheapest for their type; stream_unordered
//   round_to<T>(v)                       what a store to T and a load back would give, for a v computed from Ts
//   prefetch(p)                          asks for the cache lines of a vector at p
//   broadcast, add, sub, mul, fma, maximum, minimum, exp, tanh, sigmoid, select(less(a, b), x, y), sum, largest, first
//
// `lanes` is Full, or Tail{n} for the first n lanes: a load then fills the others with zeros, a store leaves what lies
// behind untouched; or Streamed, which is Full but for stores, which go past the caches. for_lanes, sum_lanes and
// max_lanes walk a row with them, so that a kernel's body is written once for every dtype, instruction set and width.
//
// A Vec is two registers: one has the elements 0, 2, 4, ..., the other 1, 3, 5, ... So a register full of bfloat16
// splits by one shift and one mask and is put together by one shift and one blend, where widening and narrowing in
// order would take three times the instructions, and those decide the speed of a kernel whose data lies in a cache.
// Floats and halves are shuffled into this order, one instruction a register.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"

#if defined(LEMUR_ISA_AVX512) || defined(LEMUR_ISA_AVX2)
#include <immintrin.h>
#endif

namespace lemur::cpu::LEMUR_ISA {

struct Full {};
struct Tail {
  int count;  // 0 < count < kLanes
};

struct Streamed : Full {};

// Bytes written by one call from which on stores go past the caches: what is written then is not found there again
// anyway, and a line that is not cached need not be read before it is written. It gains where there is little
// arithmetic (RMSNorm, rotary), and not where there is more (SwiGLU, cross-entropy: up to 1.7 times slower).
constexpr int64_t kStreamedBytes = 16 << 20;

// ---- registers: all that an instruction set has to bring ----
//
// maximum and minimum return the second operand where one is NaN. fraction(t) is t - floor(t), in [0, 1); and
// scale_by_power(v, t) is v * 2^floor(t), for v in [1, 2]: 0 for t = -inf, and subnormals are right. split and join
// turn memory order into Vec order and back. Where kHalves is 2, a HalfReg is half a register, for half the work;
// elsewhere a register.

#if defined(LEMUR_ISA_AVX512)

using Reg = __m512;
using Bits = __m512i;
using Mask = __mmask16;
using HalfReg = __m256;
constexpr int kRegLanes = 16;
constexpr int kHalves = 2;

inline Reg broadcast_reg(float value) { return _mm512_set1_ps(value); }
inline Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
inline Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
inline Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
inline Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
inline Reg maximum(Reg a, Reg b) { return _mm512_max_ps(a, b); }
inline Reg minimum(Reg a, Reg b) { return _mm512_min_ps(a, b); }
inline Reg fraction(Reg t) { return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline Reg scale_by_power(Reg v, Reg t) { return _mm512_scalef_ps(v, t); }
inline Mask less(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Reg select(Mask mask, Reg yes, Reg no) { return _mm512_mask_blend_ps(mask, no, yes); }
inline float sum(Reg v) { return _mm512_reduce_add_ps(v); }
inline float largest(Reg v) { return _mm512_reduce_max_ps(v); }
inline float first(Reg v) { return _mm512_cvtss_f32(v); }
// For finite d; 1 / d to a rounding or two. A division takes four times as long.
inline Reg reciprocal(Reg d) {
  const Reg r = _mm512_rcp14_ps(d);
  return mul(r, _mm512_fnmadd_ps(d, r, broadcast_reg(2.f)));
}

// A bfloat16 in the upper half of every lane, with something in the lower half. A NaN stays one as long as arithmetic
// made it. Not vcvtneps2bf16: that one flushes subnormals to zero.
inline Bits round_upper(Reg v) {
  const Bits bits = _mm512_castps_si512(v);
  const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
  const Bits raised = _mm512_mask_add_epi32(bits, number, bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(raised, odd, raised, _mm512_set1_epi32(1));
}
// The same where NaNs have nothing in the lower half.
inline Bits round_upper_short(Reg v) {
  const Bits bits = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const Bits raised = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(raised, odd, raised, _mm512_set1_epi32(1));
}
inline Reg upper_as_float(Bits bits) {
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline Reg lower_as_float(Bits bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)); }
inline Bits join_upper(Bits even, Bits odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even, 16), odd);
}
inline Bits load_bits(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bits(void* p, Bits bits) { _mm512_storeu_si512(p, bits); }
inline void stream_bits(void* p, Bits bits) { _mm512_stream_si512(static_cast<Bits*>(p), bits); }
#if defined(LEMUR_ISA_AVX512_BF16)
// Rounding to bfloat16 for its products, which take subnormal numbers for zeros: so they become zeros.
inline void store_rounded(bfloat16* p, Reg v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  std::memcpy(p, &rounded, sizeof rounded);
}
inline bool none_subnormal(Reg a, Reg b) {
  constexpr int kSubnormal = 0x20;
  return _kortestz_mask16_u8(_mm512_fpclass_ps_mask(a, kSubnormal), _mm512_fpclass_ps_mask(b, kSubnormal));
}
// Of elements of 16 bits.
inline bool none_zero(Bits bits) { return _mm512_testn_epi16_mask(bits, _mm512_set1_epi32(0x7fff7fff)) == 0; }
// The elements of a, then those of b.
inline Bits round_both(Reg a, Reg b) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(b, a);
  Bits bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}
// The elements of a and b in turns.
inline Bits round_pairs(Reg a, Reg b) {
  const Bits in_turns =
      _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                        0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
  return _mm512_permutexvar_epi16(in_turns, round_both(a, b));
}
// Writes the elements of a and b in turns, 2 kLanes of them.
inline void store_pairs(Bits a, Bits b, bfloat16* p) {
  const auto place = [](int i) { return 0x200000 + 0x10001 * i; };
  const Bits low =
      _mm512_setr_epi32(place(0), place(1), place(2), place(3), place(4), place(5), place(6), place(7), place(8),
                        place(9), place(10), place(11), place(12), place(13), place(14), place(15));
  const Bits high = _mm512_add_epi32(low, _mm512_set1_epi32(0x100010));
  store_bits(p, _mm512_permutex2var_epi16(a, low, b));
  store_bits(p + kRegLanes * 2, _mm512_permutex2var_epi16(a, high, b));
}
// sum, with the products of a's and b's pairs of bfloat16 added.
inline Reg dot_pairs(Reg a, Reg b, Reg sum) {
  __m512bh left, right;
  std::memcpy(&left, &a, sizeof left);
  std::memcpy(&right, &b, sizeof right);
  return _mm512_dpbf16_ps(sum, left, right);
}
inline HalfReg dot_pairs(HalfReg a, HalfReg b, HalfReg sum) {
  __m256bh left, right;
  std::memcpy(&left, &a, sizeof left);
  std::memcpy(&right, &b, sizeof right);
  return _mm256_dpbf16_ps(sum, left, right);
}
#endif
inline void finish_streams() { _mm_sfence(); }

inline HalfReg fma(HalfReg a, HalfReg b, HalfReg c) { return _mm256_fmadd_ps(a, b, c); }
inline HalfReg load_half(const float* p) { return _mm256_loadu_ps(p); }
inline void store_half(float* p, HalfReg v) { _mm256_storeu_ps(p, v); }
inline HalfReg lower_half(Reg v) { return _mm512_castps512_ps256(v); }
inline HalfReg broadcast_half(float value) { return _mm256_set1_ps(value); }

inline Reg load_reg(const float* p) { return _mm512_loadu_ps(p); }
inline void store_reg(float* p, Reg v) { _mm512_storeu_ps(p, v); }
inline Reg load_reg(const float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_reg(float16* p, Reg v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Reg round_half(Reg v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
inline void split(Reg& a, Reg& b) {
  const Bits even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Bits odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  const Reg evens = _mm512_permutex2var_ps(a, even, b);
  b = _mm512_permutex2var_ps(a, odd, b);
  a = evens;
}
inline void join(Reg& a, Reg& b) {
  const Bits low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Bits high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const Reg lows = _mm512_permutex2var_ps(a, low, b);
  b = _mm512_permutex2var_ps(a, high, b);
  a = lows;
}

#elif defined(LEMUR_ISA_AVX2)

using Reg = __m256;
using Bits = __m256i;
using Mask = __m256;
constexpr int kRegLanes = 8;

inline Reg broadcast_reg(float value) { return _mm256_set1_ps(value); }
inline Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
inline Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
inline Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
inline Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
inline Reg maximum(Reg a, Reg b) { return _mm256_max_ps(a, b); }
inline Reg minimum(Reg a, Reg b) { return _mm256_min_ps(a, b); }
inline Reg in_range(Reg t) { return minimum(broadcast_reg(129.f), maximum(broadcast_reg(-151.f), t)); }
inline Reg fraction(Reg t) {
  t = in_range(t);
  return sub(t, _mm256_floor_ps(t));
}
// In two steps, because 2^n itself may not be a normal float.
inline Reg scale_by_power(Reg v, Reg t) {
  const Bits whole = _mm256_cvtps_epi32(_mm256_floor_ps(in_range(t))), half = _mm256_srai_epi32(whole, 1);
  const auto power = [](Bits n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  };
  return mul(mul(v, power(half)), power(_mm256_sub_epi32(whole, half)));
}
inline Mask less(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Reg select(Mask mask, Reg yes, Reg no) { return _mm256_blendv_ps(no, yes, mask); }
inline float sum(Reg v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(Reg v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline float first(Reg v) { return _mm256_cvtss_f32(v); }
inline Reg reciprocal(Reg d) { return _mm256_div_ps(broadcast_reg(1.f), d); }

// A bfloat16 in the upper half of every lane, with something in the lower half.
inline Bits round_upper(Reg v) {
  const Bits bits = _mm256_castps_si256(v);
  const Bits odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const Bits number = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q));
  const Bits raise = _mm256_and_si256(_mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)), number);
  return _mm256_add_epi32(bits, raise);
}
// The same where NaNs have nothing in the lower half.
inline Bits round_upper_short(Reg v) {
  const Bits bits = _mm256_castps_si256(v);
  const Bits odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
inline Reg upper_as_float(Bits bits) {
  return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline Reg lower_as_float(Bits bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)); }
inline Bits join_upper(Bits even, Bits odd) { return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa); }
inline Bits load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bits(void* p, Bits bits) { _mm256_storeu_si256(static_cast<__m256i*>(p), bits); }
inline void stream_bits(void* p, Bits bits) { _mm256_stream_si256(static_cast<__m256i*>(p), bits); }
inline void finish_streams() { _mm_sfence(); }

inline Reg load_reg(const float* p) { return _mm256_loadu_ps(p); }
inline void store_reg(float* p, Reg v) { _mm256_storeu_ps(p, v); }
inline Reg load_reg(const float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_reg(float16* p, Reg v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Reg round_half(Reg v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
inline void split(Reg& a, Reg& b) {
  const auto in_order = [](Reg v) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), _MM_SHUFFLE(3, 1, 2, 0)));
  };
  const Reg evens = in_order(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)));
  b = in_order(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
  a = evens;
}
inline void join(Reg& a, Reg& b) {
  const Reg low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
  a = _mm256_permute2f128_ps(low, high, 0x20);
  b = _mm256_permute2f128_ps(low, high, 0x31);
}

#else  // generic: what the compiler makes of four floats (SSE2, NEON, ...)

typedef float Reg __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
constexpr int kRegLanes = 4;

inline Reg broadcast_reg(float value) { return Reg{value, value, value, value}; }
inline Reg add(Reg a, Reg b) { return a + b; }
inline Reg sub(Reg a, Reg b) { return a - b; }
inline Reg mul(Reg a, Reg b) { return a * b; }
inline Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
inline Mask less(Reg a, Reg b) { return a < b; }
inline Reg select(Mask mask, Reg yes, Reg no) {
  return reinterpret_cast<Reg>((mask & reinterpret_cast<Mask>(yes)) | (~mask & reinterpret_cast<Mask>(no)));
}
inline Reg maximum(Reg a, Reg b) { return select(b < a, a, b); }
inline Reg minimum(Reg a, Reg b) { return select(a < b, a, b); }
inline Reg in_range(Reg t) { return minimum(broadcast_reg(129.f), maximum(broadcast_reg(-151.f), t)); }
inline Reg floor(Reg t) {
  const Reg toward_zero = __builtin_convertvector(__builtin_convertvector(t, Mask), Reg);
  return toward_zero - select(t < toward_zero, broadcast_reg(1.f), broadcast_reg(0.f));
}
inline Reg fraction(Reg t) {
  t = in_range(t);
  return t - floor(t);
}
// In two steps, because 2^n itself may not be a normal float.
inline Reg scale_by_power(Reg v, Reg t) {
  const Mask whole = __builtin_convertvector(floor(in_range(t)), Mask), half = whole >> 1, rest = whole - half;
  return v * reinterpret_cast<Reg>((half + 127) << 23) * reinterpret_cast<Reg>((rest + 127) << 23);
}
inline float sum(Reg v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float largest(Reg v) {
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
inline float first(Reg v) { return v[0]; }
inline Reg reciprocal(Reg d) { return 1.f / d; }

// A bfloat16 in the upper half of every lane, with something in the lower half.
inline Bits round_upper(Reg v) {
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits number = reinterpret_cast<Bits>(v == v);
  return bits + (number & (0x7fffu + ((bits >> 16) & 1u)));
}
// The same where NaNs have nothing in the lower half.
inline Bits round_upper_short(Reg v) {
  const Bits bits = reinterpret_cast<Bits>(v);
  return bits + (0x7fffu + ((bits >> 16) & 1u));
}
inline Reg upper_as_float(Bits bits) { return reinterpret_cast<Reg>(bits & 0xffff0000u); }
inline Reg lower_as_float(Bits bits) { return reinterpret_cast<Reg>(bits << 16); }
inline Bits join_upper(Bits even, Bits odd) { return (even >> 16) | (odd & 0xffff0000u); }
inline Bits load_bits(const void* p) {
  Bits bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}
inline void store_bits(void* p, Bits bits) { std::memcpy(p, &bits, sizeof bits); }
inline void stream_bits(void* p, Bits bits) { store_bits(p, bits); }
inline void finish_streams() {}

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

inline Reg load_reg(const float* p) {
  Reg v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_reg(float* p, Reg v) { std::memcpy(p, &v, sizeof v); }
inline Reg load_reg(const float16* p) { return Reg{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline void store_reg(float16* p, Reg v) {
  for (int i = 0; i < kRegLanes; ++i) p[i] = to_float16(v[i]);
}
inline Reg round_half(Reg v) {
  for (int i = 0; i < kRegLanes; ++i) v[i] = to_float(to_float16(v[i]));
  return v;
}
inline void split(Reg& a, Reg& b) {
  const Reg evens = Reg{a[0], a[2], b[0], b[2]};
  b = Reg{a[1], a[3], b[1], b[3]};
  a = evens;
}
inline void join(Reg& a, Reg& b) {
  const Reg lows = Reg{a[0], b[0], a[1], b[1]};
  b = Reg{a[2], b[2], a[3], b[3]};
  a = lows;
}

#endif

#if !defined(LEMUR_ISA_AVX512)
using HalfReg = Reg;
constexpr int kHalves = 1;
inline HalfReg load_half(const float* p) { return load_reg(p); }
inline void store_half(float* p, HalfReg v) { store_reg(p, v); }
inline HalfReg lower_half(Reg v) { return v; }
inline HalfReg broadcast_half(float value) { return broadcast_reg(value); }
#endif

// 2^t to two roundings, over the whole range: subnormal results, infinities and NaN included. The polynomial is the one
// of degree 5 with p(0) = 1 whose largest relative error on [0, 1] is least (8e-8), found by Remez's algorithm.
inline Reg exp2(Reg t) {
  const auto c = [](float value) { return broadcast_reg(value); };
  const Reg f = fraction(t);
  Reg p = fma(c(1.86713e-3f), f, c(9.017031e-3f));
  p = fma(p, f, c(5.5799913e-2f));
  p = fma(p, f, c(2.4016444e-1f));
  p = fma(p, f, c(6.931513e-1f));
  return scale_by_power(fma(p, f, c(1.f)), t);
}

constexpr float kLog2E = 1.44269504f;

// e^x to about 1 + |x| / 2 roundings: what the product in the exponent leaves.
inline Reg exp(Reg x) { return exp2(mul(x, broadcast_reg(kLog2E))); }

// 1 / (1 + exp(-x)); 0 below -87, where the exponential has no reciprocal.
inline Reg sigmoid(Reg x) {
  const Reg most = broadcast_reg(126.f), t = mul(x, broadcast_reg(-kLog2E));
  const Reg s = reciprocal(add(broadcast_reg(1.f), exp2(minimum(most, t))));
  return select(less(most, t), broadcast_reg(0.f), s);
}

// tanh to a few roundings, for small arguments too. Coefficients: Moshier's Cephes library, tanhf.
inline Reg tanh(Reg x) {
  const auto c = [](float value) { return broadcast_reg(value); };
  const Reg z = mul(x, x);
  Reg p = fma(c(-5.70498872745e-3f), z, c(2.06390887954e-2f));
  p = fma(p, z, c(-5.37397155531e-2f));
  p = fma(p, z, c(1.33314422036e-1f));
  p = fma(p, z, c(-3.33332819422e-1f));
  const Reg near_zero = fma(mul(p, z), x, x);
  const Reg beyond = sub(c(1.f), mul(c(2.f), sigmoid(mul(c(-2.f), x))));
  return select(less(z, c(0.625f * 0.625f)), near_zero, beyond);
}

// ---- vectors ----

struct Vec {
  Reg even, odd;
};
struct VecMask {
  Mask even, odd;
};
constexpr int kLanes = 2 * kRegLanes;

inline Vec broadcast(float value) { return {broadcast_reg(value), broadcast_reg(value)}; }
inline Vec add(Vec a, Vec b) { return {add(a.even, b.even), add(a.odd, b.odd)}; }
inline Vec sub(Vec a, Vec b) { return {sub(a.even, b.even), sub(a.odd, b.odd)}; }
inline Vec mul(Vec a, Vec b) { return {mul(a.even, b.even), mul(a.odd, b.odd)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {fma(a.even, b.even, c.even), fma(a.odd, b.odd, c.odd)}; }
inline Vec maximum(Vec a, Vec b) { return {maximum(a.even, b.even), maximum(a.odd, b.odd)}; }
inline Vec minimum(Vec a, Vec b) { return {minimum(a.even, b.even), minimum(a.odd, b.odd)}; }
inline Vec exp(Vec v) { return {exp(v.even), exp(v.odd)}; }
inline Vec tanh(Vec v) { return {tanh(v.even), tanh(v.odd)}; }
inline Vec sigmoid(Vec v) { return {sigmoid(v.even), sigmoid(v.odd)}; }
inline VecMask less(Vec a, Vec b) { return {less(a.even, b.even), less(a.odd, b.odd)}; }
inline Vec select(VecMask mask, Vec yes, Vec no) {
  return {select(mask.even, yes.even, no.even), select(mask.odd, yes.odd, no.odd)};
}
inline float sum(Vec v) { return sum(add(v.even, v.odd)); }
inline float largest(Vec v) { return largest(maximum(v.even, v.odd)); }
inline float first(Vec v) { return first(v.even); }

template <typename T>
inline void prefetch(const T* p) {
  constexpr int kLine = 64 / sizeof(T);
  for (int i = 0; i < kLanes; i += kLine) __builtin_prefetch(p + i);
}

template <typename T>
inline Vec load(const T* p, Full) {
  Vec v{load_reg(p), load_reg(p + kRegLanes)};
  split(v.even, v.odd);
  return v;
}
inline Vec load(const bfloat16* p, Full) {
  const Bits bits = load_bits(p);
  return {lower_as_float(bits), upper_as_float(bits)};
}
template <typename T>
inline void store(T* p, Vec v, Full) {
  join(v.even, v.odd);
  store_reg(p, v.even);
  store_reg(p + kRegLanes, v.odd);
}
// In memory order, to nearest even. The conversion of the instruction set takes subnormal numbers for zeros, so its
// result stands where no element of it is zero, which one test of all tells, or where none was subnormal.
inline Bits round_elements(Vec v) {
#if defined(LEMUR_ISA_AVX512_BF16)
  const Bits rounded = round_pairs(v.even, v.odd);
  if (__builtin_expect(none_zero(rounded), true)) return rounded;
  if (none_subnormal(v.even, v.odd)) return rounded;
#endif
  return join_upper(round_upper(v.even), round_upper(v.odd));
}
inline void store(bfloat16* p, Vec v, Full) { store_bits(p, round_elements(v)); }
inline void store(bfloat16* p, Vec v, Streamed) { stream_bits(p, round_elements(v)); }
// From a buffer in the first cache, so that lines go out whole.
template <typename T>
inline void stream_lines(T* p, const T* memory) {
  constexpr int64_t kStep = sizeof(Bits) / sizeof(T);
  for (int64_t i = 0; i < kLanes; i += kStep) stream_bits(p + i, load_bits(memory + i));
}
template <typename T>
inline void store(T* p, Vec v, Streamed) {
  alignas(64) T memory[kLanes];
  store(static_cast<T*>(memory), v, Full{});
  stream_lines(p, memory);
}

// Tails go through a buffer, once a row.
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

inline Vec load_scratch(const float* p) { return {load_reg(p), load_reg(p + kRegLanes)}; }
inline void store_scratch(float* p, Vec v) {
  store_reg(p, v.even);
  store_reg(p + kRegLanes, v.odd);
}

template <typename T>
inline Vec load_unordered(const T* p) {
  return {load_reg(p), load_reg(p + kRegLanes)};
}
inline Vec load_unordered(const bfloat16* p) { return load(p, Full{}); }
template <typename T>
inline void store_unordered(T* p, Vec v) {
  store_reg(p, v.even);
  store_reg(p + kRegLanes, v.odd);
}
inline void store_unordered(bfloat16* p, Vec v) { store(p, v, Full{}); }
template <typename T>
inline void stream_unordered(T* p, Vec v) {
  alignas(64) T memory[kLanes];
  store_unordered(static_cast<T*>(memory), v);
  stream_lines(p, memory);
}
inline void stream_unordered(bfloat16* p, Vec v) { store(p, v, Streamed{}); }

// Floats of scratch memory that hold n elements: whole vectors.
inline int64_t scratch_size(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// `v` where lanes are in use, `other` in the lanes past a tail.
inline Vec keep(Vec v, Vec, Full) { return v; }
inline Vec keep(Vec v, Vec other, Tail tail) {
  float memory[kLanes];
  for (int i = 0; i < kLanes; ++i) memory[i] = i < tail.count ? -1.f : 1.f;
  return select(less(load(static_cast<const float*>(memory), Full{}), broadcast(0.f)), v, other);
}

// One number from memory, and to it.
template <typename T>
inline float load_one(const T* p) {
  return first(load(p, Tail{1}));
}
template <typename T>
inline void store_one(T* p, float value) {
  store(p, broadcast(value), Tail{1});
}

// ---- transposition ----

#if defined(LEMUR_ISA_AVX2)
inline void transpose_8x8(const char* x, int64_t x_bytes, uint32_t* out, int64_t out_stride) {
  // Register i has the first halves of the rows i and i + 4, and register i + 4 their second halves.
  Bits r[8], t[8];
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      const auto* low = reinterpret_cast<const __m128i*>(x + i * x_bytes + 16 * half);
      const auto* high = reinterpret_cast<const __m128i*>(x + (i + 4) * x_bytes + 16 * half);
      r[4 * half + i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)), _mm_loadu_si128(high), 1);
    }
  }
  for (int half = 0; half < 8; half += 4) {
    t[half] = _mm256_unpacklo_epi32(r[half], r[half + 1]);
    t[half + 1] = _mm256_unpackhi_epi32(r[half], r[half + 1]);
    t[half + 2] = _mm256_unpacklo_epi32(r[half + 2], r[half + 3]);
    t[half + 3] = _mm256_unpackhi_epi32(r[half + 2], r[half + 3]);
    store_bits(out + half * out_stride, _mm256_unpacklo_epi64(t[half], t[half + 2]));
    store_bits(out + (half + 1) * out_stride, _mm256_unpackhi_epi64(t[half], t[half + 2]));
    store_bits(out + (half + 2) * out_stride, _mm256_unpacklo_epi64(t[half + 1], t[half + 3]));
    store_bits(out + (half + 3) * out_stride, _mm256_unpackhi_epi64(t[half + 1], t[half + 3]));
  }
}
#endif

// out[column, row] = x[row, column] of 32-bit elements, 16 rows, x_bytes apart, and 16 columns of them.
inline void transpose_16x16(const void* from, int64_t x_bytes, uint32_t* out, int64_t out_stride) {
  const auto* x = static_cast<const char*>(from);
#if defined(LEMUR_ISA_AVX512)
  Bits r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = load_bits(x + i * x_bytes);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Now the quarter q of r[4 g + c] holds column 4 q + c of the rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const Bits even_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    const Bits even_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const Bits odd_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const Bits odd_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    store_bits(out + c * out_stride, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    store_bits(out + (4 + c) * out_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    store_bits(out + (8 + c) * out_stride, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    store_bits(out + (12 + c) * out_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
#elif defined(LEMUR_ISA_AVX2)
  for (int row = 0; row < 16; row += 8) {
    for (int column = 0; column < 16; column += 8) {
      transpose_8x8(x + row * x_bytes + 4 * column, x_bytes, out + column * out_stride + row, out_stride);
    }
  }
#else
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      std::memcpy(out + column * out_stride + row, x + row * x_bytes + 4 * column, sizeof *out);
    }
  }
#endif
}

inline void transpose_16x16(const float* x, int64_t x_stride, float* out, int64_t out_stride) {
  transpose_16x16(x, 4 * x_stride, reinterpret_cast<uint32_t*>(out), out_stride);
}

// ---- rounding ----

template <typename T>
struct Rounder;
template <>
struct Rounder<float> {
  static Reg round(Reg v) { return v; }
};
template <>
struct Rounder<bfloat16> {
  static Reg round(Reg v) { return upper_as_float(round_upper_short(v)); }
};
template <>
struct Rounder<float16> {
  static Reg round(Reg v) { return round_half(v); }
};

template <typename T>
inline Vec round_to(Vec v) {
#if defined(LEMUR_ISA_AVX512_BF16)
  if constexpr (std::is_same_v<T, bfloat16>) {
    const Bits bits = round_elements(v);
    return {lower_as_float(bits), upper_as_float(bits)};
  }
#endif
  return {Rounder<T>::round(v.even), Rounder<T>::round(v.odd)};
}

// ---- walking a row ----

// Calls body(i, lanes) for i = 0, kLanes, 2 kLanes, ... up to n.
template <typename Body>
inline void for_lanes(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Full{});
  if (i < n) body(i, Tail{static_cast<int>(n - i)});
}

// Whether an output, `rows` runs of `cols` elements, is large enough to stream and lies as that needs.
template <typename T>
inline bool can_stream(const T* output, int64_t rows, int64_t cols, int64_t least_bytes = kStreamedBytes) {
  const int64_t run = cols * static_cast<int64_t>(sizeof(T));
  return rows * run >= least_bytes && reinterpret_cast<uintptr_t>(output) % 64 == 0 && run % 64 == 0;
}

// for_lanes with Streamed in place of Full, where `streamed` says so. finish_streams must follow on the same thread.
template <typename Body>
inline void for_lanes(int64_t n, bool streamed, Body&& body) {
  if (!streamed) return for_lanes(n, body);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Streamed{});
  if (i < n) body(i, Tail{static_cast<int>(n - i)});
}

// Sum over a row: body(i, lanes, partial) returns `partial` with the terms at i added. Lanes past a tail must add zero.
//
// Two vectors of partial sums run side by side, because one alone would wait for its own latency, and are added up
// every 32 steps, so that the error grows with the width about as slowly as in a pairwise sum.
template <typename Body>
inline float sum_lanes(int64_t n, Body&& body) {
  constexpr int64_t kStep = 2 * kLanes;
  const Vec zero = broadcast(0.f);
  Vec total = zero;
  int64_t i = 0;
  while (i + kStep <= n) {
    const int64_t past = i + 32 * kStep <= n ? i + 32 * kStep : n;
    Vec a = zero, b = zero;
    for (; i + kStep <= past; i += kStep) {
      a = body(i, Full{}, a);
      b = body(i + kLanes, Full{}, b);
    }
    total = add(total, add(a, b));
  }
  Vec rest = zero;
  if (i + kLanes <= n) {
    rest = body(i, Full{}, rest);
    i += kLanes;
  }
  if (i < n) rest = body(i, Tail{static_cast<int>(n - i)}, rest);
  return sum(add(total, rest));
}

// Largest of a row, -inf for an empty one: body(i, lanes) returns the elements at i. A NaN may or may not be noticed.
template <typename Body>
inline float max_lanes(int64_t n, Body&& body) {
  const Vec none = broadcast(-INFINITY);
  Vec a = none, b = none;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    a = maximum(a, body(i, Full{}));
    b = maximum(b, body(i + kLanes, Full{}));
  }
  if (i + kLanes <= n) {
    a = maximum(a, body(i, Full{}));
    i += kLanes;
  }
  if (i < n) {
    const Tail tail{static_cast<int>(n - i)};
    b = maximum(b, keep(body(i, tail), none, tail));
  }
  return largest(maximum(a, b));
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
