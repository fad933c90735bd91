// Products of small matrices in scratch memory, for attention: c[m, n] = a[m, k] b[k, n], or c += a b.
//
// Three policies, so that a kernel is written once, but for the sums over keys of tiles (KeySums):
//
//   Fma     float operands, on any instruction set
//   Dots    bfloat16 operands with AVX-512's product of pairs, float results
//   Tiles   bfloat16 operands on AMX tiles, float results
//
// c is float, row by row. a is row by row. b is row by row for Fma; for the others two rows lie side by side, element
// by element ("paired"), as their products want them. Operands are blocks of kBlock tokens by the head dimension,
// padded with zeros. n must be a multiple of kWidth, m of kStep, k of kDepth, and the head dimension of kHeadWidth.
//
// A result [rows, kBlock] that is an operand of the next product is written over itself as such, two rows at a time. As
// an a, a row of bfloat16 begins where its row of floats did; as a b, a pair of rows takes the place of the even one.
// So from row to row there are kResultStride elements.
#pragma once

#include <type_traits>

#include "cpu/vec.h"

namespace lemur::cpu::LEMUR_ISA {

constexpr int64_t kBlock = 96;
constexpr int64_t kMaxWidth = 256;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// `count` rows of `width` elements in memory, `stride` apart.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t count;
  int64_t width;
};

// c[m, n] = a[m, k] b[k, n], or with `accumulate` c += a b.
struct Product {
  int64_t m, n, k;
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  bool accumulate;
};

// Where a product's sums go: to c.
struct ToC {};

// Rows of a result, `width` elements each, `stride` apart. `streamed` as for_lanes has it.
template <typename T>
struct Result {
  T* data;
  int64_t stride;
  int64_t width;
  bool streamed;

  T* operator[](int64_t row) const { return data + row * stride; }
};

// To rows of a result, from `first` on and before `past`, row i times factor(i); c stays as it is.
template <typename Policy, typename T, typename Factor>
struct ToRows {
  Result<T> result;
  Factor factor;
  int64_t past;
  int64_t first = 0;

  ToRows from(int64_t row) const { return {result, factor, past, row}; }
  void operator()(int64_t row, int64_t column, const Reg* sums) const {
    row += first;
    if (row < past) Policy::write_sums(sums, broadcast_reg(factor(row)), result[row] + column, result.streamed);
  }
};

// A product in registers, of units of four bytes: a float, or a pair of bfloat16, two of k. Operand::multiply(left,
// right, sum) is the sum with the units' products added. Strides are in units.
template <typename Operand>
struct Registers {
  static constexpr int64_t kStep = 4;
  static constexpr int64_t kWidth = kRegLanes / kHalves;

 private:
  // Registers across.
#if defined(LEMUR_ISA_AVX512)
  static constexpr int kPanel = 4;
#else
  static constexpr int kPanel = 2;
#endif

 public:
  // Columns of the sums that ToRows gets at once.
  static constexpr int64_t kPanelWidth = kPanel * kRegLanes;

  // With `kTurned`, a is given as its transpose [k, m]. ToRows takes an n that is a multiple of kPanelWidth.
  template <bool kTurned, typename To>
  static void product(const Product& x, const To& to) {
    int64_t column = 0;
    for (; column + kPanelWidth <= x.n; column += kPanelWidth) panel<kPanel * kHalves, kTurned>(x, column, to);
    if constexpr (std::is_same_v<To, ToC>) rest<kPanel * kHalves - 1, kTurned>(x, column);
  }

 private:
  // Less than a panel, in units of kWidth columns.
  template <int kUnits, bool kTurned>
  static void rest(const Product& x, int64_t column) {
    if constexpr (kUnits > 0) {
      if (x.n - column == kUnits * kWidth) return panel<kUnits, kTurned>(x, column, ToC{});
      rest<kUnits - 1, kTurned>(x, column);
    }
  }

  // Eight rows where four have less than eight registers of sums, which is what hides the latency of an fma. No more,
  // for a row's address needs a register, too.
  template <int kUnits, bool kTurned, typename To>
  static void panel(const Product& x, int64_t column, const To& to) {
    constexpr int kTall = kUnits < 2 * kHalves ? 2 * kStep : kStep;
    int64_t row = 0;
    for (; row + kTall <= x.m; row += kTall) tile<kTall, kUnits, kTurned>(x, row, column, to);
    for (; row < x.m; row += kStep) tile<kStep, kUnits, kTurned>(x, row, column, to);
  }

  template <int kRows, int kUnits, bool kTurned, typename To>
  static void tile(const Product& x, int64_t row, int64_t column, const To& to) {
    constexpr int kColumns = kUnits / kHalves;
    constexpr bool kHalf = kUnits % kHalves > 0;
    const int64_t k = x.k, a_stride = x.a_stride, b_stride = x.b_stride, c_stride = x.c_stride;
    const float *a = x.a + row * (kTurned ? 1 : a_stride), *b = x.b + column;
    float* c = x.c + row * c_stride + column;
    // Unrolled, because GCC would keep the sums in memory before and after the steps: a tenth of the time. One more
    // than is used, for there may be none.
    Reg sums[kRows][kColumns + 1];
    HalfReg halves[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        sums[i][j] = x.accumulate ? load_reg(c + i * c_stride + j * kRegLanes) : broadcast_reg(0.f);
      }
      if (kHalf) {
        halves[i] = x.accumulate ? load_half(c + i * c_stride + kColumns * kRegLanes) : lower_half(broadcast_reg(0.f));
      }
    }
    for (int64_t step = 0; step < k; ++step) {
      Reg right[kColumns + 1];
      HalfReg right_half;
      for (int j = 0; j < kColumns; ++j) right[j] = load_reg(b + step * b_stride + j * kRegLanes);
      if (kHalf) right_half = load_half(b + step * b_stride + kColumns * kRegLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const float unit = kTurned ? a[step * a_stride + i] : a[i * a_stride + step];
        const Reg left = broadcast_reg(unit);
        for (int j = 0; j < kColumns; ++j) sums[i][j] = Operand::multiply(left, right[j], sums[i][j]);
        const HalfReg left_half = kColumns > 0 ? lower_half(left) : broadcast_half(unit);
        if (kHalf) halves[i] = Operand::multiply(left_half, right_half, halves[i]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      if constexpr (std::is_same_v<To, ToC>) {
        for (int j = 0; j < kColumns; ++j) store_reg(c + i * c_stride + j * kRegLanes, sums[i][j]);
        if (kHalf) store_half(c + i * c_stride + kColumns * kRegLanes, halves[i]);
      } else {
        to(row + i, column, sums[i]);
      }
    }
  }
};

struct Fma {
  using Element = float;
  static constexpr int64_t kWidth = Registers<Fma>::kWidth;
  static constexpr int64_t kHeadWidth = kRegLanes;
  static constexpr int64_t kStep = Registers<Fma>::kStep;
  static constexpr int64_t kDepth = 1;
  static constexpr int64_t kPanelWidth = Registers<Fma>::kPanelWidth;
  static constexpr int64_t kResultStride = kBlock;
  static constexpr bool kPaired = false;

  template <typename R>
  static R multiply(R left, R right, R sum) {
    return fma(left, right, sum);
  }

  // Floats of scratch memory that a pack of one block takes.
  static int64_t pack_size(int64_t width) { return kBlock * width; }

  // From the start of a row of a b to its column n.
  static int64_t column(int64_t n) { return n; }

  // As an a, or a b: [kBlock, width], of which the rows are written that x has, and rows of zeros up to a multiple
  // of 16.
  template <typename T>
  static void pack_a(const Rows<T>& x, int64_t width, float* out) {
    const int64_t written = x.width < width ? 0 : x.count;
    std::memset(out + written * width, 0, sizeof(float) * static_cast<size_t>((padded_rows(x) - written) * width));
    for (int64_t row = 0; row < x.count; ++row) {
      const T* from = x.data + row * x.stride;
      float* to = out + row * width;
      for_lanes(x.width, [&](int64_t i, auto lanes) { pack(from + i, to + i, lanes); });
    }
  }

  // Writes x, `width` elements in the order of a pack's row, times `factor`; `streamed` as for_lanes has it.
  template <typename T>
  static void write_row(const float* x, int64_t width, float factor, T* out, bool streamed) {
    const Vec by = broadcast(factor);
    for_lanes(width, streamed, [&](int64_t i, auto lanes) { unpack(x + i, by, out + i, lanes); });
  }

  // The same for kPanelWidth sums of a product.
  template <typename T>
  static void write_sums(const Reg* sums, Reg factor, T* out, bool streamed) {
    for (int64_t i = 0; i < kPanelWidth; i += kLanes, sums += 2) {
      const Vec v{mul(sums[0], factor), mul(sums[1], factor)};
      streamed ? stream_unordered(out + i, v) : store_unordered(out + i, v);
    }
  }

  // Sum of the products of two rows.
  template <typename T>
  static float dot(const T* x, const T* y, int64_t width) {
    return sum_lanes(width, [&](int64_t i, auto lanes, Vec partial) {
      return fma(load(x + i, lanes), load(y + i, lanes), partial);
    });
  }

  template <typename T>
  static void pack_b(const Rows<T>& x, int64_t width, float* out) {
    pack_a(x, width, out);
  }

  // The transpose, as a b: [width, kBlock], as many columns as a pack has rows.
  template <typename T>
  static void pack_transposed_b(const Rows<T>& x, int64_t width, float* out) {
    alignas(64) float rows[kBlock * kMaxWidth];
    pack_a(x, round_up(width, 16), rows);
    turn(rows, padded_rows(x), width, out);
  }

  // Both, from one reading of x where the width is a multiple of 16.
  template <typename T>
  static void pack_both_b(const Rows<T>& x, int64_t width, float* out, float* transposed) {
    if (width % 16) {
      pack_transposed_b(x, width, transposed);
      return pack_a(x, width, out);
    }
    pack_a(x, width, out);
    turn(out, padded_rows(x), width, transposed);
  }

  static const float* operand(const float* result) { return result; }
  // Rows `row` and `row + 1` of a result at a register of lanes, as an a, and as a b.
  static void store_as_a(float* result, int64_t row, int64_t lane, Reg first, Reg second) {
    store_reg(result + row * kBlock + lane, first);
    store_reg(result + (row + 1) * kBlock + lane, second);
  }
  static void store_as_b(float* result, int64_t row, int64_t lane, Reg first, Reg second) {
    store_as_a(result, row, lane, first, second);
  }

  template <bool kTurned = false, typename To = ToC>
  static void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b,
                      int64_t b_stride, float* c, int64_t c_stride, bool accumulate, const To& to = {}) {
    Registers<Fma>::product<kTurned>({m, n, k, a, a_stride, b, b_stride, c, c_stride, accumulate}, to);
  }

 private:
  // Whole vectors lie in the order that is cheapest for T, the same in all packs, so that products of them are right.
  template <typename T>
  static void pack(const T* from, float* to, Full) {
    store_scratch(to, load_unordered(from));
  }
  template <typename T>
  static void pack(const T* from, float* to, Tail tail) {
    store(to, load(from, tail), tail);
  }
  template <typename T>
  static void unpack(const float* from, Vec factor, T* to, Full) {
    store_unordered(to, mul(load_scratch(from), factor));
  }
  template <typename T>
  static void unpack(const float* from, Vec factor, T* to, Streamed) {
    stream_unordered(to, mul(load_scratch(from), factor));
  }
  template <typename T>
  static void unpack(const float* from, Vec factor, T* to, Tail tail) {
    store(to, mul(load(from, tail), factor), tail);
  }

  template <typename T>
  static int64_t padded_rows(const Rows<T>& x) {
    return round_up(x.count, 16);
  }

  // out [width, kBlock] of `count` rows of x, which has round_up(width, 16) columns.
  static void turn(const float* x, int64_t count, int64_t width, float* out) {
    const int64_t padded = round_up(width, 16);
    for (int64_t column = 0; column < padded; column += 16) {
      if (column + 16 <= width) {
        for (int64_t row = 0; row < count; row += 16) {
          transpose_16x16(x + row * padded + column, padded, out + column * kBlock + row, kBlock);
        }
        continue;
      }
      for (int64_t i = column; i < width; ++i) {
        for (int64_t row = 0; row < count; ++row) out[i * kBlock + row] = x[row * padded + i];
      }
    }
  }
};

#if defined(LEMUR_ISA_AVX512_BF16)

// Packs of bfloat16.
template <int64_t kTokens>
struct Pairs {
  using Element = bfloat16;
  static constexpr int64_t kHeadWidth = 32;
  static constexpr int64_t kResultStride = 2 * kBlock;
  static constexpr bool kPaired = true;

  static int64_t pack_size(int64_t width) { return kBlock * width / 2; }
  static int64_t column(int64_t n) { return 2 * n; }

  // [kBlock, width], of which, as of all packs, the tokens are written that x has, and zeros up to a multiple of
  // kTokens.
  static void pack_a(const Rows<bfloat16>& x, int64_t width, bfloat16* out) {
    const int64_t written = x.width < width ? 0 : x.count;
    std::memset(out + written * width, 0, sizeof(bfloat16) * static_cast<size_t>((padded_rows(x) - written) * width));
    for (int64_t row = 0; row < x.count; ++row) copy_row(x.data + row * x.stride, x.width, out + row * width);
  }

  // [kBlock / 2, width] pairs (row, row + 1).
  static void pack_b(const Rows<bfloat16>& x, int64_t width, bfloat16* out) {
    alignas(64) bfloat16 padded[kBlock * kMaxWidth];
    pair_rows(wide(x, width, padded), out);
  }

  // The transpose: [width / 2, kBlock] pairs (column, column + 1). Rows of pairs, turned.
  static void pack_transposed_b(const Rows<bfloat16>& x, int64_t width, bfloat16* out) {
    alignas(64) bfloat16 padded[kBlock * kMaxWidth];
    turn_rows(wide(x, width, padded), out);
  }

  static void pack_both_b(const Rows<bfloat16>& x, int64_t width, bfloat16* out, bfloat16* transposed) {
    alignas(64) bfloat16 padded[kBlock * kMaxWidth];
    const Rows<bfloat16> rows = wide(x, width, padded);
    pair_rows(rows, out);
    turn_rows(rows, transposed);
  }

  // Writes x, `width` elements and those up to a multiple of kHeadWidth, times `factor`; `streamed` as for_lanes has
  // it. Subnormal numbers become zeros, as in the products.
  static void write_row(const float* x, int64_t width, float factor, bfloat16* out, bool streamed) {
    const Reg by = broadcast_reg(factor);
    for_lanes(width, streamed, [&](int64_t i, auto lanes) { write(x + i, by, out + i, lanes); });
  }

  // Sum of the products of two rows.
  static float dot(const bfloat16* x, const bfloat16* y, int64_t width) {
    Reg a = broadcast_reg(0.f), b = a;
    int64_t i = 0;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
      a = dot_pairs(load_pairs(x + i, Full{}), load_pairs(y + i, Full{}), a);
      b = dot_pairs(load_pairs(x + i + kLanes, Full{}), load_pairs(y + i + kLanes, Full{}), b);
    }
    for_lanes(width - i, [&](int64_t rest, auto lanes) {
      a = dot_pairs(load_pairs(x + i + rest, lanes), load_pairs(y + i + rest, lanes), a);
    });
    return sum(add(a, b));
  }

  static bfloat16* operand(float* result) { return reinterpret_cast<bfloat16*>(result); }
  // Rows `row` and `row + 1` of a result at a register of lanes, as an a, and as a b.
  static void store_as_a(float* result, int64_t row, int64_t lane, Reg first, Reg second) {
    store_rounded(operand(result) + row * kResultStride + lane, first);
    store_rounded(operand(result) + (row + 1) * kResultStride + lane, second);
  }
  static void store_as_b(float* result, int64_t row, int64_t lane, Reg first, Reg second) {
    store_bits(operand(result) + row * kResultStride + 2 * lane, round_pairs(first, second));
  }

 private:
  static void write(const float* x, Reg factor, bfloat16* out, Full) { store_bits(out, rounded(x, factor)); }
  static void write(const float* x, Reg factor, bfloat16* out, Streamed) { stream_bits(out, rounded(x, factor)); }
  static void write(const float* x, Reg factor, bfloat16* out, Tail tail) {
    const Bits bits = rounded(x, factor);
    std::memcpy(out, &bits, sizeof(bfloat16) * static_cast<size_t>(tail.count));
  }
  static Bits rounded(const float* x, Reg factor) {
    return round_both(mul(load_reg(x), factor), mul(load_reg(x + kRegLanes), factor));
  }
  static Reg load_pairs(const bfloat16* p, Full) { return load_reg(reinterpret_cast<const float*>(p)); }
  static Reg load_pairs(const bfloat16* p, Tail tail) {
    alignas(64) bfloat16 memory[kLanes] = {};
    std::memcpy(memory, p, sizeof(bfloat16) * static_cast<size_t>(tail.count));
    return load_pairs(memory, Full{});
  }

 protected:
  static void copy_row(const bfloat16* from, int64_t count, bfloat16* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_bits(to + i, load_bits(from + i));
    if (i < count) std::memcpy(to + i, from + i, sizeof(bfloat16) * static_cast<size_t>(count - i));
  }

  static int64_t padded_rows(const Rows<bfloat16>& x) { return round_up(x.count, kTokens); }

  // Rows of `width`: x itself, or a copy padded with zeros.
  static Rows<bfloat16> wide(const Rows<bfloat16>& x, int64_t width, bfloat16* padded) {
    if (x.width == width) return x;
    pack_a(x, width, padded);
    return {padded, width, x.count, width};
  }

  static void pair_rows(const Rows<bfloat16>& x, bfloat16* out) {
    const Bits none{};
    for (int64_t row = 0; row < padded_rows(x); row += 2) {
      const bfloat16* from = x.data + row * x.stride;
      for (int64_t i = 0; i < x.width; i += kLanes) {
        store_pairs(row < x.count ? load_bits(from + i) : none,
                    row + 1 < x.count ? load_bits(from + x.stride + i) : none, out + row * x.width + 2 * i);
      }
    }
  }

  // Sixteen rows at a time; the last, padded with zeros, by way of a copy.
  static void turn_rows(const Rows<bfloat16>& x, bfloat16* out) {
    const int64_t rows = x.count / 16 * 16;
    turn(x.data, x.stride, rows, x.width / 2, out, kBlock);
    if (rows == padded_rows(x)) return;
    alignas(64) bfloat16 last[kTokens * kMaxWidth];
    const int64_t rest = x.count - rows, padded = padded_rows(x) - rows;
    for (int64_t row = 0; row < rest; ++row) copy_row(x.data + (rows + row) * x.stride, x.width, last + row * x.width);
    std::memset(last + rest * x.width, 0, sizeof(bfloat16) * static_cast<size_t>((padded - rest) * x.width));
    turn(last, x.width, padded, x.width / 2, out + 2 * rows, kBlock);
  }

  // out[column, row] = x[row, column] of pairs; x_stride in elements, the rest in pairs, rows and columns multiples of
  // 16.
  static void turn(const bfloat16* x, int64_t x_stride, int64_t rows, int64_t columns, bfloat16* out,
                   int64_t out_stride) {
    for (int64_t row = 0; row < rows; row += 16) {
      for (int64_t column = 0; column < columns; column += 16) {
        transpose_16x16(x + row * x_stride + 2 * column, 2 * x_stride,
                        reinterpret_cast<uint32_t*>(out) + column * out_stride + row, out_stride);
      }
    }
  }
};

struct Dots : Pairs<kRegLanes> {
  static constexpr int64_t kWidth = Registers<Dots>::kWidth;
  static constexpr int64_t kStep = Registers<Dots>::kStep;
  static constexpr int64_t kDepth = 2;
  static constexpr int64_t kPanelWidth = Registers<Dots>::kPanelWidth;

  template <typename R>
  static R multiply(R left, R right, R sum) {
    return dot_pairs(left, right, sum);
  }

  // As write_row, for kPanelWidth sums of a product.
  static void write_sums(const Reg* sums, Reg factor, bfloat16* out, bool streamed) {
    for (int64_t i = 0; i < kPanelWidth; i += kLanes, sums += 2) {
      const Bits bits = round_both(mul(sums[0], factor), mul(sums[1], factor));
      streamed ? stream_bits(out + i, bits) : store_bits(out + i, bits);
    }
  }

  // With `kTurned`, a is given as its transpose [k, m], paired.
  template <bool kTurned = false, typename To = ToC>
  static void product(int64_t m, int64_t n, int64_t k, const bfloat16* a, int64_t a_stride, const bfloat16* b,
                      int64_t b_stride, float* c, int64_t c_stride, bool accumulate, const To& to = {}) {
    const auto* left = reinterpret_cast<const float*>(a);
    const auto* right = reinterpret_cast<const float*>(b);
    Registers<Dots>::product<kTurned>(
        {m, n, k / 2, left, kTurned ? a_stride : a_stride / 2, right, b_stride, c, c_stride, accumulate}, to);
  }
};

#endif

#if defined(LEMUR_ISA_AMX)

// Holds the tile registers of this thread while it lives. oneDNN configures its own before each of its kernels.
struct Tiles : Pairs<32> {
  static constexpr int64_t kWidth = 32;
  static constexpr int64_t kStep = 32;
  static constexpr int64_t kDepth = 32;
  static constexpr int64_t kPanelWidth = 0;  // its sums go through memory

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

  // The transpose: [width, kBlock]. Pairs of rows, turned.
  static void pack_transposed_a(const Rows<bfloat16>& x, int64_t width, bfloat16* out) {
    alignas(64) bfloat16 pairs[kBlock * kMaxWidth];
    pack_b(x, width, pairs);
    turn(pairs, 2 * width, padded_rows(x) / 2, width, out, kBlock / 2);
  }

  // Tiles 0 to 3 hold two by two results, 4 and 5 two tiles of a, 6 and 7 two of b.
  void product(int64_t m, int64_t n, int64_t k, const bfloat16* a, int64_t a_stride, const bfloat16* b,
               int64_t b_stride, float* c, int64_t c_stride, bool accumulate, ToC = {}) const {
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
};

#endif

// How bfloat16 is multiplied.
#if defined(LEMUR_ISA_AMX)
using BFloat16Policy = Tiles;
#elif defined(LEMUR_ISA_AVX512_BF16)
using BFloat16Policy = Dots;
#else
using BFloat16Policy = Fma;
#endif

}  // namespace lemur::cpu::LEMUR_ISA
