// AVX-512 and AMX for a CPU that has AVX2 alone, slowly: in place of the compiler's header, every intrinsic of them
// that csrc/cpu uses, after Intel's Intrinsics Guide. `make test-emulated` runs the tests of the kernels on it.
//
// An estimated reciprocal is as far off as the instruction's may be, and a tile that is used without a configuration
// ends the process. What is not here does not compile, so nothing is passed over.
#pragma once
#include_next <immintrin.h>

#if defined(LEMUR_ISA_AVX512)

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated_registers {  // apart, so that a call of csrc/cpu's own `add` does not find the one below, too

struct alignas(64) Floats {
  float at[16];
};
struct alignas(64) Ints {
  uint32_t at[16];
};

}  // namespace emulated_registers

namespace emulated {

using emulated_registers::Floats;
using emulated_registers::Ints;

template <typename To, typename From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <typename Register>
inline Register load(const void* p) {
  Register r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
template <typename Register>
inline void store(void* p, const Register& r) {
  std::memcpy(p, &r, sizeof r);
}
inline void stream(void* p, const Ints& r) {
  if (reinterpret_cast<uintptr_t>(p) % 64) std::abort();  // a fault, on such an address
  store(p, r);
}
template <typename F>
inline Floats floats(F&& f) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.at[i] = f(i);
  return r;
}
template <typename F>
inline Ints ints(F&& f) {
  Ints r;
  for (int i = 0; i < 16; ++i) r.at[i] = f(i);
  return r;
}
template <typename F>
inline uint16_t mask(F&& f) {
  unsigned r = 0;
  for (int i = 0; i < 16; ++i) r |= (f(i) ? 1u : 0u) << i;
  return static_cast<uint16_t>(r);
}
inline bool has(unsigned mask, int i) { return (mask >> i) & 1u; }

// ---- floats ----

inline Floats set1(float v) {
  return floats([&](int) { return v; });
}
inline Floats add(const Floats& a, const Floats& b) {
  return floats([&](int i) { return a.at[i] + b.at[i]; });
}
inline Floats sub(const Floats& a, const Floats& b) {
  return floats([&](int i) { return a.at[i] - b.at[i]; });
}
inline Floats mul(const Floats& a, const Floats& b) {
  return floats([&](int i) { return a.at[i] * b.at[i]; });
}
inline Floats fmadd(const Floats& a, const Floats& b, const Floats& c) {
  return floats([&](int i) { return __builtin_fmaf(a.at[i], b.at[i], c.at[i]); });
}
inline Floats fnmadd(const Floats& a, const Floats& b, const Floats& c) {
  return floats([&](int i) { return __builtin_fmaf(-a.at[i], b.at[i], c.at[i]); });
}
// The second operand where one is NaN.
inline Floats max(const Floats& a, const Floats& b) {
  return floats([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
inline Floats min(const Floats& a, const Floats& b) {
  return floats([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
}
inline Floats blend(unsigned mask, const Floats& no, const Floats& yes) {
  return floats([&](int i) { return has(mask, i) ? yes.at[i] : no.at[i]; });
}
// Cut off after 14 bits: too small by up to 2^-14 of it.
inline Floats rcp14(const Floats& a) {
  return floats([&](int i) { return as<float>(as<uint32_t>(1.f / a.at[i]) & ~0x1ffu); });
}
// a - floor(a); 0 for infinities.
inline Floats reduce(const Floats& a) {
  return floats([&](int i) { return std::isinf(a.at[i]) ? 0.f : a.at[i] - std::floor(a.at[i]); });
}
inline Floats scalef(const Floats& a, const Floats& b) {
  return floats([&](int i) {
    const float power = std::floor(b.at[i]);
    if (std::isnan(power) || std::isinf(power)) return a.at[i] * std::exp2(power);
    return std::ldexp(a.at[i], static_cast<int>(std::fmin(std::fmax(power, -1000.f), 1000.f)));
  });
}
inline float reduce_add(Floats a) {
  for (int width = 8; width; width /= 2) {
    for (int i = 0; i < width; ++i) a.at[i] += a.at[i + width];
  }
  return a.at[0];
}
inline float reduce_max(const Floats& a) {
  float r = a.at[0];
  for (float v : a.at) r = v > r ? v : r;
  return r;
}
template <int kPredicate>
inline uint16_t compare(const Floats& a, const Floats& b) {
  static_assert(kPredicate == _CMP_LT_OQ || kPredicate == _CMP_ORD_Q, "the two that are used");
  return mask([&](int i) {
    return kPredicate == _CMP_LT_OQ ? a.at[i] < b.at[i] : !std::isnan(a.at[i]) && !std::isnan(b.at[i]);
  });
}
template <int kClasses>
inline uint16_t classify(const Floats& a) {
  static_assert(kClasses == 0x20, "subnormal, the one that is used");
  return mask([&](int i) { return std::fpclassify(a.at[i]) == FP_SUBNORMAL; });
}
// Bits 0 to 3 of an index choose the element, bit 4 the operand.
inline Floats permutex2var(const Floats& a, const Ints& index, const Floats& b) {
  return floats([&](int i) { return (index.at[i] & 16 ? b : a).at[index.at[i] & 15]; });
}
inline Floats from_halves(__m256i halves) {
  Floats r;
  _mm256_storeu_ps(r.at, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
  _mm256_storeu_ps(r.at + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
  return r;
}
inline __m256i to_halves(const Floats& a) {
  const __m128i low = _mm256_cvtps_ph(_mm256_loadu_ps(a.at), _MM_FROUND_TO_NEAREST_INT);
  return _mm256_set_m128i(_mm256_cvtps_ph(_mm256_loadu_ps(a.at + 8), _MM_FROUND_TO_NEAREST_INT), low);
}

// ---- integers ----

inline Ints set1(int v) {
  return ints([&](int) { return static_cast<uint32_t>(v); });
}
template <typename... Values>
inline Ints setr(Values... values) {
  return {{static_cast<uint32_t>(values)...}};
}
inline Ints add(const Ints& a, const Ints& b) {
  return ints([&](int i) { return a.at[i] + b.at[i]; });
}
inline Ints mask_add(const Ints& other, unsigned mask, const Ints& a, const Ints& b) {
  return ints([&](int i) { return has(mask, i) ? a.at[i] + b.at[i] : other.at[i]; });
}
inline Ints bit_and(const Ints& a, const Ints& b) {
  return ints([&](int i) { return a.at[i] & b.at[i]; });
}
inline Ints slli(const Ints& a, int count) {
  return ints([&](int i) { return a.at[i] << count; });
}
inline Ints srli(const Ints& a, int count) {
  return ints([&](int i) { return a.at[i] >> count; });
}
inline uint16_t mask_test(unsigned mask_in, const Ints& a, const Ints& b) {
  return mask([&](int i) { return has(mask_in, i) && (a.at[i] & b.at[i]); });
}
inline Ints blend_epi16(uint32_t mask, const Ints& no, const Ints& yes) {
  return ints([&](int i) {
    const uint32_t low = has(mask, 2 * i) ? yes.at[i] : no.at[i], high = has(mask, 2 * i + 1) ? yes.at[i] : no.at[i];
    return (high & 0xffff0000u) | (low & 0xffffu);
  });
}
// Within each quarter of four: elements 0 and 1 (low) or 2 and 3 (high) of a and b in turns, one or two at a time.
template <bool kHigh, int kSize>
inline Ints unpack(const Ints& a, const Ints& b) {
  return ints([&](int i) {
    const int place = i % 4, from = i / 4 * 4 + (kHigh ? 2 : 0);
    if (kSize == 1) return (place % 2 ? b : a).at[from + place / 2];
    return (place / 2 ? b : a).at[from + place % 2];
  });
}
// Quarters: two of a, then two of b, chosen by two bits each.
inline Ints shuffle_quarters(const Ints& a, const Ints& b, int control) {
  return ints([&](int i) { return (i < 8 ? a : b).at[(control >> (i / 4 * 2) & 3) * 4 + i % 4]; });
}

// Which elements of 16 bits have no bit of b's.
inline uint32_t none_of_shorts(const Ints& a, const Ints& b) {
  const auto x = as<std::array<uint16_t, 32>>(a), y = as<std::array<uint16_t, 32>>(b);
  uint32_t r = 0;
  for (size_t i = 0; i < 32; ++i) r |= static_cast<uint32_t>((x[i] & y[i]) == 0) << i;
  return r;
}

// Elements by the five lowest bits of an index each.
inline Ints permute_shorts(const Ints& index, const Ints& a) {
  const auto places = as<std::array<uint16_t, 32>>(index), from = as<std::array<uint16_t, 32>>(a);
  std::array<uint16_t, 32> r;
  for (size_t i = 0; i < 32; ++i) r[i] = from[places[i] & 31u];
  return as<Ints>(r);
}

// The same of two operands, which the sixth bit chooses.
inline Ints permute_shorts(const Ints& a, const Ints& index, const Ints& b) {
  const auto places = as<std::array<uint16_t, 32>>(index), low = as<std::array<uint16_t, 32>>(a),
             high = as<std::array<uint16_t, 32>>(b);
  std::array<uint16_t, 32> r;
  for (size_t i = 0; i < 32; ++i) r[i] = (places[i] & 32u ? high : low)[places[i] & 31u];
  return as<Ints>(r);
}

// ---- bfloat16 ----

template <int kCount>
struct Shorts {
  uint16_t at[kCount];
};
// To the nearest, subnormal numbers as zeros, NaNs quiet.
inline uint16_t round_short(float v) {
  const uint32_t bits = as<uint32_t>(v);
  const bool subnormal = (bits & 0x7f800000u) == 0;
  const uint32_t rounded = std::isnan(v) ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
  return static_cast<uint16_t>((subnormal ? bits & 0x80000000u : rounded) >> 16);
}
inline Shorts<16> to_bfloat16(const Floats& a) {
  Shorts<16> r;
  for (int i = 0; i < 16; ++i) r.at[i] = round_short(a.at[i]);
  return r;
}
// The elements of `low`, then those of `high`.
inline Shorts<32> to_bfloat16(const Floats& high, const Floats& low) {
  Shorts<32> r;
  for (int i = 0; i < 32; ++i) r.at[i] = round_short((i < 16 ? low : high).at[i % 16]);
  return r;
}
// An operand of a product: a subnormal number counts as zero.
inline float operand(uint16_t bits) { return (bits & 0x7f80u) ? as<float>(static_cast<uint32_t>(bits) << 16) : 0.f; }
// The odd elements' product is added first, each sum rounded, and a subnormal one becomes zero.
template <typename Register, int kCount>
inline Register dot_pairs(const Register& sum, const Shorts<kCount>& a, const Shorts<kCount>& b) {
  const auto flushed = [](float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.f, v) : v; };
  auto r = as<std::array<float, kCount / 2>>(sum);
  for (int i = 0; i < kCount / 2; ++i) {
    const float odd = __builtin_fmaf(operand(a.at[2 * i + 1]), operand(b.at[2 * i + 1]), flushed(r[i]));
    r[i] = flushed(__builtin_fmaf(operand(a.at[2 * i]), operand(b.at[2 * i]), flushed(odd)));
  }
  return as<Register>(r);
}

// ---- tiles ----

struct Tiles {
  uint8_t config[64];
  uint8_t rows[8][16][64];
};
inline thread_local Tiles tiles{};

inline int rows_of(int tile) {
  if (tiles.config[0] != 1) std::abort();
  return tiles.config[48 + tile];
}
inline int bytes_of(int tile) { return tiles.config[16 + 2 * tile]; }

inline void tile_zero(int tile) {
  for (int row = 0; row < rows_of(tile); ++row) std::memset(tiles.rows[tile][row], 0, 64);
}
inline void tile_load(int tile, const void* p, int64_t stride) {
  tile_zero(tile);
  for (int row = 0; row < rows_of(tile); ++row) {
    std::memcpy(tiles.rows[tile][row], static_cast<const char*>(p) + row * stride, static_cast<size_t>(bytes_of(tile)));
  }
}
inline void tile_store(int tile, void* p, int64_t stride) {
  for (int row = 0; row < rows_of(tile); ++row) {
    std::memcpy(static_cast<char*>(p) + row * stride, tiles.rows[tile][row], static_cast<size_t>(bytes_of(tile)));
  }
}
// c[m, n] += a[m, 2k] b[k, 2n] + a[m, 2k + 1] b[k, 2n + 1], of bfloat16, whose subnormals count as zero. The
// instruction adds even and odd products apart, so its last bits are others.
inline void tile_dpbf16(int c, int a, int b) {
  const auto value = [](const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return operand(bits);
  };
  for (int m = 0; m < rows_of(c); ++m) {
    for (int n = 0; n < bytes_of(c) / 4; ++n) {
      float sum = load<float>(tiles.rows[c][m] + 4 * n);
      for (int k = 0; k < bytes_of(a) / 4; ++k) {
        for (int half = 0; half < 4; half += 2) {
          sum += value(tiles.rows[a][m] + 4 * k + half) * value(tiles.rows[b][k] + 4 * n + half);
        }
      }
      store(tiles.rows[c][m] + 4 * n, sum);
    }
  }
}

}  // namespace emulated

#define __m512 emulated::Floats
#define __m512i emulated::Ints
#define _mm512_set1_ps(v) emulated::set1(static_cast<float>(v))
#define _mm512_loadu_ps(p) emulated::load<emulated::Floats>(p)
#define _mm512_storeu_ps(p, v) emulated::store(p, v)
#define _mm512_add_ps emulated::add
#define _mm512_sub_ps emulated::sub
#define _mm512_mul_ps emulated::mul
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_fnmadd_ps emulated::fnmadd
#define _mm512_max_ps emulated::max
#define _mm512_min_ps emulated::min
#define _mm512_mask_blend_ps emulated::blend
#define _mm512_rcp14_ps emulated::rcp14
#define _mm512_reduce_ps(v, control) emulated::reduce(v)
#define _mm512_scalef_ps emulated::scalef
#define _mm512_reduce_add_ps emulated::reduce_add
#define _mm512_reduce_max_ps emulated::reduce_max
#define _mm512_cvtss_f32(v) (v).at[0]
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::compare<predicate>(a, b)
#define _mm512_fpclass_ps_mask(v, classes) emulated::classify<classes>(v)
#define _kortestz_mask16_u8(a, b) (((a) | (b)) == 0)
#define _mm512_permutex2var_ps emulated::permutex2var
#define _mm512_cvtph_ps emulated::from_halves
#define _mm512_cvtps_ph(v, rounding) emulated::to_halves(v)
#define __m256bh emulated::Shorts<16>
#define __m512bh emulated::Shorts<32>
#define _mm512_cvtneps_pbh(v) emulated::to_bfloat16(v)
#define _mm512_cvtne2ps_pbh(high, low) emulated::to_bfloat16(high, low)
#define _mm512_dpbf16_ps emulated::dot_pairs
#define _mm256_dpbf16_ps emulated::dot_pairs
#define _mm512_permutexvar_epi16 emulated::permute_shorts
#define _mm512_permutex2var_epi16 emulated::permute_shorts
#define _mm512_castps512_ps256(v) emulated::load<__m256>(&(v))
#define _mm512_castps_si512 emulated::as<emulated::Ints>
#define _mm512_castsi512_ps emulated::as<emulated::Floats>
#define _mm512_set1_epi32(v) emulated::set1(static_cast<int>(v))
#define _mm512_setr_epi32 emulated::setr
#define _mm512_loadu_si512(p) emulated::load<emulated::Ints>(p)
#define _mm512_storeu_si512(p, v) emulated::store(p, v)
#define _mm512_stream_si512(p, v) emulated::stream(p, v)
#define _mm512_add_epi32 emulated::add
#define _mm512_mask_add_epi32 emulated::mask_add
#define _mm512_and_si512 emulated::bit_and
#define _mm512_slli_epi32 emulated::slli
#define _mm512_srli_epi32 emulated::srli
#define _mm512_test_epi32_mask(a, b) emulated::mask_test(0xffff, a, b)
#define _mm512_mask_test_epi32_mask emulated::mask_test
#define _mm512_testn_epi16_mask emulated::none_of_shorts
#define _mm512_mask_blend_epi16 emulated::blend_epi16
#define _mm512_unpacklo_epi32 emulated::unpack<false, 1>
#define _mm512_unpackhi_epi32 emulated::unpack<true, 1>
#define _mm512_unpacklo_epi64 emulated::unpack<false, 2>
#define _mm512_unpackhi_epi64 emulated::unpack<true, 2>
#define _mm512_shuffle_i32x4 emulated::shuffle_quarters
#define _tile_loadconfig(p) (emulated::tiles = {}, std::memcpy(emulated::tiles.config, p, 64))
#define _tile_release() std::memset(emulated::tiles.config, 0, 64)
#define _tile_loadd emulated::tile_load
#define _tile_stored emulated::tile_store
#define _tile_zero emulated::tile_zero
#define _tile_dpbf16ps emulated::tile_dpbf16

#endif
