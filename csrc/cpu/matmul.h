// Products of small matrices in scratch memory, for attention: c[m, n] = a[m, k] b[k, n], or c += a b.
//
// Two policies with one interface, so that a kernel is written once:
//
//   Fma     float operands, on any instruction set
//   Tiles   bfloat16 operands on AMX tiles, float results
//
// c is float, row by row. a is row by row. b is row by row for Fma; for Tiles two rows lie side by side, element by
// element ("paired"), as the tile product wants them. Operands are blocks of kBlock tokens by the head dimension,
// padded with zeros. n, and every head dimension, must be a multiple of kWidth; m and k of kStep.
#pragma once

#include "cpu/vec.h"

namespace lemur::cpu::LEMUR_ISA {

constexpr int64_t kBlock = 64;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// `count` rows of `width` elements in memory, `stride` apart.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t count;
  int64_t width;
};

struct Fma {
  using Element = float;
  static constexpr int64_t kWidth = kRegLanes;
  static constexpr int64_t kStep = 4;

  // Floats of scratch memory that a pack of one block takes.
  static int64_t pack_size(int64_t width) { return kBlock * width; }

  // As an a, and as a b: [kBlock, width].
  template <typename T>
  static void pack(const Rows<T>& x, int64_t width, float* out) {
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(kBlock * width));
    for (int64_t row = 0; row < x.count; ++row) {
      const T* from = x.data + row * x.stride;
      float* to = out + row * width;
      for_lanes(x.width, [&](int64_t i, auto lanes) { store(to + i, load(from + i, lanes), lanes); });
    }
  }
  template <typename T>
  static void pack_a(const Rows<T>& x, int64_t width, float* out) {
    pack(x, width, out);
  }
  template <typename T>
  static void pack_b(const Rows<T>& x, int64_t width, float* out) {
    pack(x, width, out);
  }

  // The transpose, as an a, and as a b: [width, kBlock].
  template <typename T>
  static void pack_transposed(const Rows<T>& x, int64_t width, float* out) {
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(kBlock * width));
    float natural[256];
    for (int64_t row = 0; row < x.count; ++row) {
      const T* from = x.data + row * x.stride;
      for_lanes(x.width, [&](int64_t i, auto lanes) { store(natural + i, load(from + i, lanes), lanes); });
      for (int64_t i = 0; i < x.width; ++i) out[i * kBlock + row] = natural[i];
    }
  }
  template <typename T>
  static void pack_transposed_a(const Rows<T>& x, int64_t width, float* out) {
    pack_transposed(x, width, out);
  }
  template <typename T>
  static void pack_transposed_b(const Rows<T>& x, int64_t width, float* out) {
    pack_transposed(x, width, out);
  }

  // A result [rows, kBlock] as an operand of the next product: it is one already.
  static const float* as_a(const float* x, int64_t, float*) { return x; }
  static const float* as_b(const float* x, int64_t, float*) { return x; }

  // The memory that as_a and as_b may use.
  static int64_t result_size() { return 0; }

  void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
               float* c, int64_t c_stride, bool accumulate) const {
    int64_t column = 0;
    for (; column + kPanel * kRegLanes <= n; column += kPanel * kRegLanes) {
      panel<kPanel>(m, k, a, a_stride, b + column, b_stride, c + column, c_stride, accumulate);
    }
    for (; column < n; column += kRegLanes) {
      panel<1>(m, k, a, a_stride, b + column, b_stride, c + column, c_stride, accumulate);
    }
  }

 private:
  // Registers across: with kStep down, as many sums as hide the latency of an fma and still fit the register file.
#if defined(LEMUR_ISA_AVX512)
  static constexpr int kPanel = 4;
#else
  static constexpr int kPanel = 2;
#endif

  template <int kColumns>
  static void panel(int64_t m, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                    int64_t c_stride, bool accumulate) {
    for (int64_t row = 0; row < m; row += kStep, a += kStep * a_stride, c += kStep * c_stride) {
      Reg sums[kStep][kColumns];
      for (int i = 0; i < kStep; ++i) {
        for (int j = 0; j < kColumns; ++j) {
          sums[i][j] = accumulate ? load_reg(c + i * c_stride + j * kRegLanes) : broadcast_reg(0.f);
        }
      }
      for (int64_t step = 0; step < k; ++step) {
        Reg right[kColumns];
        for (int j = 0; j < kColumns; ++j) right[j] = load_reg(b + step * b_stride + j * kRegLanes);
        for (int i = 0; i < kStep; ++i) {
          const Reg left = broadcast_reg(a[i * a_stride + step]);
          for (int j = 0; j < kColumns; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
        }
      }
      for (int i = 0; i < kStep; ++i) {
        for (int j = 0; j < kColumns; ++j) store_reg(c + i * c_stride + j * kRegLanes, sums[i][j]);
      }
    }
  }
};

#if defined(LEMUR_ISA_AMX)

// Holds the tile registers of this thread while it lives. oneDNN configures its own before each of its kernels.
struct Tiles {
  using Element = bfloat16;
  static constexpr int64_t kWidth = 32;
  static constexpr int64_t kStep = 32;

  Tiles() {
    alignas(64) uint8_t config[64] = {1};  // palette 1; then the bytes of a row, and the rows, of each tile
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  static int64_t pack_size(int64_t width) { return kBlock * width / 2; }
  static int64_t result_size() { return kBlock * kBlock / 2; }

  // [kBlock, width].
  static void pack_a(const Rows<bfloat16>& x, int64_t width, bfloat16* out) {
    std::memset(out, 0, sizeof(bfloat16) * static_cast<size_t>(kBlock * width));
    for (int64_t row = 0; row < x.count; ++row) {
      std::memcpy(out + row * width, x.data + row * x.stride, sizeof(bfloat16) * static_cast<size_t>(x.width));
    }
  }

  // [kBlock / 2, width] pairs (row, row + 1).
  static void pack_b(const Rows<bfloat16>& x, int64_t width, bfloat16* out) {
    pairs_of_rows(x, width, reinterpret_cast<uint32_t*>(out));
  }

  // The transpose: [width, kBlock].
  static void pack_transposed_a(const Rows<bfloat16>& x, int64_t width, bfloat16* out) {
    alignas(64) uint32_t pairs[kBlock / 2 * 256];
    pairs_of_rows(x, width, pairs);
    transpose(pairs, kBlock / 2, width, reinterpret_cast<uint32_t*>(out));
  }

  // The transpose: [width / 2, kBlock] pairs (column, column + 1).
  static void pack_transposed_b(const Rows<bfloat16>& x, int64_t width, bfloat16* out) {
    alignas(64) bfloat16 rows[kBlock * 256];
    pack_a(x, width, rows);
    transpose(reinterpret_cast<const uint32_t*>(rows), kBlock, width / 2, reinterpret_cast<uint32_t*>(out));
  }

  // [rows, kBlock] floats as [rows, kBlock] bfloat16.
  static const bfloat16* as_a(const float* x, int64_t rows, bfloat16* out) {
    for (int64_t i = 0; i < rows * kBlock; i += kLanes) store(out + i, load(x + i, Full{}), Full{});
    return out;
  }

  // The same as pairs (row, row + 1).
  static const bfloat16* as_b(const float* x, int64_t rows, bfloat16* out) {
    for (int64_t row = 0; row < rows; row += 2, x += 2 * kBlock, out += 2 * kBlock) {
      for (int64_t i = 0; i < kBlock; i += kRegLanes) {
        store_bits(out + 2 * i, join_upper(round_upper(load_reg(x + i)), round_upper(load_reg(x + kBlock + i))));
      }
    }
    return out - rows * kBlock;
  }

  // Tiles 0 to 3 hold two by two results, 4 and 5 two tiles of a, 6 and 7 two of b.
  void product(int64_t m, int64_t n, int64_t k, const bfloat16* a, int64_t a_stride, const bfloat16* b,
               int64_t b_stride, float* c, int64_t c_stride, bool accumulate) const {
    const int64_t a_bytes = 2 * a_stride, b_bytes = 4 * b_stride, c_bytes = 4 * c_stride;
    for (int64_t row = 0; row < m; row += 32) {
      const bool lower = row + 16 < m;
      for (int64_t column = 0; column < n; column += 32) {
        const bool right = column + 16 < n;
        float* c00 = c + row * c_stride + column;
        float* c10 = c00 + 16 * c_stride;
        if (accumulate) {
          _tile_loadd(0, c00, c_bytes);
          if (right) _tile_loadd(1, c00 + 16, c_bytes);
          if (lower) _tile_loadd(2, c10, c_bytes);
          if (lower && right) _tile_loadd(3, c10 + 16, c_bytes);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t step = 0; step < k; step += 32) {
          const bfloat16* left = a + row * a_stride + step;
          const bfloat16* over = b + step * b_stride + 2 * column;
          _tile_loadd(4, left, a_bytes);
          _tile_loadd(6, over, b_bytes);
          _tile_dpbf16ps(0, 4, 6);
          if (right) {
            _tile_loadd(7, over + 32, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
          }
          if (lower) {
            _tile_loadd(5, left + 16 * a_stride, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if (right) _tile_dpbf16ps(3, 5, 7);
          }
        }
        _tile_stored(0, c00, c_bytes);
        if (right) _tile_stored(1, c00 + 16, c_bytes);
        if (lower) _tile_stored(2, c10, c_bytes);
        if (lower && right) _tile_stored(3, c10 + 16, c_bytes);
      }
    }
  }

 private:
  // Pairs (row, row + 1) of every column.
  static void pairs_of_rows(const Rows<bfloat16>& x, int64_t width, uint32_t* out) {
    alignas(64) bfloat16 even[256 + 32] = {}, odd[256 + 32] = {};
    for (int64_t row = 0; row < kBlock; row += 2, out += width) {
      const auto bytes = sizeof(bfloat16) * static_cast<size_t>(x.width);
      row < x.count ? std::memcpy(even, x.data + row * x.stride, bytes) : std::memset(even, 0, bytes);
      row + 1 < x.count ? std::memcpy(odd, x.data + (row + 1) * x.stride, bytes) : std::memset(odd, 0, bytes);
      for (int64_t i = 0; i < width; i += kRegLanes) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + i)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + i)));
        store_bits(out + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }

  // out[column, row] = x[row, column]; both multiples of 16.
  static void transpose(const uint32_t* x, int64_t rows, int64_t columns, uint32_t* out) {
    for (int64_t row = 0; row < rows; row += 16) {
      for (int64_t column = 0; column < columns; column += 16) {
        __m512i r[16], t[16];
        for (int i = 0; i < 16; ++i) r[i] = load_bits(x + (row + i) * columns + column);
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
        // Lane q of r[4 g + c] holds column 4 q + c of the rows 4 g to 4 g + 3.
        for (int c = 0; c < 4; ++c) {
          const __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88),
                        low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
          const __m512i high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd),
                        high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
          t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);         // lane 0 of each
          t[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);     // lane 2
          t[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);   // lane 1
          t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);  // lane 3
        }
        for (int i = 0; i < 16; ++i) store_bits(out + (column + i) * rows + row, t[i]);
      }
    }
  }
};

#endif

}  // namespace lemur::cpu::LEMUR_ISA
