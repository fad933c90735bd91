// Attention over packed documents, forward and backward, without scores in memory: Dao et al., "FlashAttention", 2022,
// arXiv 2205.14135, in blocks of kBlock queries by kBlock keys that stay near in the caches.
//
//   s_ij = scale * q_i . k_j          (softcap c: c * tanh(s_ij / c)), -inf where query i may not see key j
//   lse_i = log sum_j exp(s_ij),      p_ij = exp(s_ij - lse_i),      o_i = sum_j p_ij v_j
//
//   delta_i = o_i . do_i - dlse_i,    ds_ij = p_ij (do_i . v_j - delta_i)    (softcap: times 1 - tanh^2)
//   dv_j = sum_i p_ij do_i,           dk_j = scale * sum_i ds_ij q_i,        dq_i = scale * sum_j ds_ij k_j
//
// Scores are held transposed, a key's row of queries, so that the statistics of a query live in a lane: largest and sum
// are then plain vector arithmetic, with nothing to add across a register. Exponentials are taken in base 2. A task is
// a document's key head with all its query heads: its results are its own, so they have the same bits whichever thread
// computes them.
#include <cfloat>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/matmul.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace lemur::cpu::LEMUR_ISA {
namespace {

constexpr float kLn2 = 0.693147181f;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t blocks_of(int64_t tokens) { return (tokens + kBlock - 1) / kBlock; }

// ---- which query sees which key, in tokens of their document ----

struct Visibility {
  bool causal;
  int64_t window;  // 0: all keys
  int64_t offset;  // keys less queries: query i stands at the position of key i + offset
  int64_t queries;
  int64_t keys;

  // The range of key blocks that some query of [first, past) sees.
  int64_t first_key_block(int64_t first) const { return window ? most(0, first + offset - window + 1) / kBlock : 0; }
  int64_t past_key_block(int64_t past) const { return blocks_of(causal ? most(0, least(keys, past + offset)) : keys); }
};

// A block of keys against a block of queries, the queries in lanes.
struct BlockMask {
  bool diagonal;  // some key comes after the block's first query
  bool needed;
  int64_t lowest;  // the first query lane that sees the block's first key; a lane more for every key after it
  int64_t window;

  BlockMask(const Visibility& v, int64_t key, int64_t keys, int64_t query, int64_t queries)
      : diagonal(false), needed(false), lowest(key - v.offset - query), window(v.window) {
    if (!v.causal) return;
    diagonal = lowest + keys - 1 > 0;
    needed = diagonal || (window && lowest + window < queries);
  }

  // `seen` in the lanes from `lane` on that see key row `row`, `other` elsewhere.
  Reg operator()(Reg seen, Reg other, int64_t row, int64_t lane) const {
    static const float kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Reg index = load_reg(kIndex);
    const int64_t begin = lowest + row - lane, end = begin + window;
    Reg kept = select(less(index, broadcast_reg(static_cast<float>(begin))), other, seen);
    if (window) kept = select(less(index, broadcast_reg(static_cast<float>(end))), kept, other);
    return kept;
  }
};

// The keys of a block in bands of rows. A band's queries begin with the first lanes that see one of its keys, so that
// most of the upper half of a block on the diagonal is neither computed nor read. Off the diagonal there is one band.
// Where a register of queries reaches over the edge of a band, its lanes there are masked, or have no query.
template <typename Policy>
struct Bands {
  static constexpr int64_t kRows = most(Policy::kWidth, Policy::kStep);
  const BlockMask& mask;
  int64_t keys;  // with their padding
  int64_t queries;
  int64_t lanes;  // the queries with their padding

  int64_t first_lane(int64_t row) const {
    return mask.diagonal ? most(0, mask.lowest + row / kRows * kRows) / Policy::kWidth * Policy::kWidth : 0;
  }
  // The first register of the band of a row.
  int64_t first_register(int64_t row) const { return first_lane(row) / kRegLanes * kRegLanes; }
  // Past the last of `rows` keys whose band has a lane of the register (of tiles: of the two) at `lane`.
  int64_t past_row(int64_t lane, int64_t rows) const {
    if (!mask.diagonal) return rows;
    constexpr int64_t kReach = most(Policy::kWidth, kRegLanes);
    return least(rows, round_up(most(0, lane / kReach * kReach + kReach - mask.lowest), kRows));
  }
  // The first query that sees one of the keys from `row` on, and past the last key that one before `query` sees.
  int64_t first_query(int64_t row) const { return mask.diagonal ? most(0, mask.lowest + row) : 0; }
  int64_t past_key(int64_t query) const { return mask.diagonal ? least(keys, most(0, query - mask.lowest)) : keys; }
  // Calls body(row, rows, lane) for every band that has queries.
  template <typename Body>
  void each(Body&& body) const {
    const int64_t step = mask.diagonal ? kRows : keys;
    for (int64_t row = 0; row < keys; row += step) {
      const int64_t lane = first_lane(row);
      if (lane >= lanes) return;
      body(row, least(step, keys - row), lane);
    }
  }
};

// ---- scores ----

// Scores in base 2 from products, and the factor of a score's gradient.
template <bool kSoftcap>
struct Scores {
  Reg factor;  // of the product, to the exponent in base 2; with a softcap to the argument of tanh
  Reg cap;

  explicit Scores(const Attention& a)
      : factor(broadcast_reg(kSoftcap ? a.scale / a.softcap : a.scale * kLog2E)),
        cap(broadcast_reg(a.softcap * kLog2E)) {}

  Reg operator()(Reg product) const {
    if constexpr (kSoftcap) return mul(cap, tanh(mul(product, factor)));
    return mul(product, factor);
  }
  // With the derivative of the softcap in `slope`.
  Reg operator()(Reg product, Reg& slope) const {
    if constexpr (kSoftcap) {
      const Reg t = tanh(mul(product, factor));
      slope = sub(broadcast_reg(1.f), mul(t, t));
      return mul(cap, t);
    }
    return mul(product, factor);
  }
};

// ---- memory of a thread ----

// Hands out pieces of one allocation.
template <typename Policy>
struct Arena {
  float* next;

  float* floats(int64_t count) {
    float* piece = next;
    next += round_up(count, 16);
    return piece;
  }
  typename Policy::Element* packs(int64_t floats_each, int64_t count) {
    return reinterpret_cast<typename Policy::Element*>(floats(floats_each * count));
  }
};

// Packs of consecutive blocks.
template <typename Policy>
struct Packs {
  typename Policy::Element* data;
  int64_t step;  // elements from block to block

  Packs(Arena<Policy>& arena, int64_t floats_each, int64_t count)
      : data(arena.packs(floats_each, count)),
        step(floats_each * static_cast<int64_t>(sizeof(float) / sizeof(typename Policy::Element))) {}
  typename Policy::Element* operator[](int64_t block) const { return data + block * step; }
};

template <typename T>
Rows<T> block_rows(const Strided& x, int64_t head, int64_t start, int64_t length, int64_t block, int64_t head_dim) {
  const int64_t first = block * kBlock;
  return {static_cast<const T*>(x.data) + (start + first) * x.token_stride + head * x.head_stride, x.token_stride,
          least(kBlock, length - first), head_dim};
}

// A head's rows of a contiguous result, from `token` on.
template <typename T>
Result<T> rows_of(void* x, int64_t token, int64_t heads, int64_t head, int64_t head_dim, bool streamed) {
  return {static_cast<T*>(x) + (token * heads + head) * head_dim, heads * head_dim, head_dim, streamed};
}

// A document's key head, with all its query heads.
struct Task {
  const AttentionDocument* document = nullptr;
  int64_t kv_head = 0;
};

// A block of queries, and the first block of its document's keys that is not packed yet.
struct Place {
  Task task;
  int64_t head;
  int64_t block;
  int64_t key_block;

  // The one that a thread comes to after it, with keys packed up to `packed`; without a document where `next` is not
  // known.
  Place after(const Task& next, int64_t group, int64_t packed) const {
    if (block + 1 < blocks_of(task.document->queries)) return {task, head, block + 1, packed};
    if (head + 1 < (task.kv_head + 1) * group) return {task, head + 1, 0, packed};
    return {next, next.kv_head * group, 0, 0};
  }
};

// Rows that are read soon. Every call of ask() asks for those of the next tensor, between pieces of arithmetic that the
// memory can work beside. Short documents would else wait for their rows a fifth of the time: those of a head are too
// few, and lie too far apart, for the CPU to foresee them. (A function that did nothing else GCC would take for pure,
// and leave its calls out; this one counts.)
class Ahead {
 public:
  template <typename T>
  void add(const Rows<T>& rows) {
    constexpr auto kSize = static_cast<int64_t>(sizeof(T));
    pieces_[count_++] = {reinterpret_cast<const char*>(rows.data), rows.stride * kSize, rows.count, rows.width * kSize};
  }
  void ask() {
    if (asked_ == count_) return;
    const Rows<char>& rows = pieces_[asked_++];
    for (int64_t row = 0; row < rows.count; ++row) {
      const char *from = rows.data + row * rows.stride, *past = from + rows.width;
      for (from -= reinterpret_cast<uintptr_t>(from) % kLine; from < past; from += kLine) {
        __builtin_prefetch(from, 0, kSecondCache);
      }
    }
  }

 private:
  static constexpr int kLine = 64, kSecondCache = 2;
  Rows<char> pieces_[6];
  int count_ = 0, asked_ = 0;
};

// What is read first at a place.
template <typename T, bool kBackward>
Ahead rows_at(const Attention& a, const Place& place) {
  Ahead ahead;
  if (!place.task.document || place.task.document->queries == 0) return ahead;
  const AttentionDocument& doc = *place.task.document;
  const auto of_queries = [&](const Strided& x) {
    ahead.add(block_rows<T>(x, place.head, doc.query_start, doc.queries, place.block, a.head_dim));
  };
  const auto of_keys = [&](const Strided& x) {
    ahead.add(block_rows<T>(x, place.task.kv_head, doc.key_start, doc.keys, place.key_block, a.head_dim));
  };
  of_queries(a.q);
  if constexpr (kBackward) {
    of_queries(a.dout);
    of_queries(a.o);
    const int64_t first = place.block * kBlock, count = least(kBlock, doc.queries - first);
    ahead.add(Rows<float>{a.lse + place.head * a.query_tokens + doc.query_start + first, 0, 1, count});
  }
  if (place.key_block < blocks_of(doc.keys)) {
    of_keys(a.k);
    of_keys(a.v);
  }
  return ahead;
}

// Whether a result is written past the caches. It pays much earlier than elsewhere: the rows of a
// head lie far apart, and an ordinary store waits for each of their lines to be read first. Below, who reads the result
// next loses more than that.
template <typename T>
bool streams(const T* result, int64_t tokens, int64_t heads, int64_t head_dim) {
  constexpr int64_t kLeastBytes = 1 << 20;
  return can_stream(result, tokens * heads, head_dim, kLeastBytes);
}

// ---- sums over keys and over queries ----

// Whether a product's sums are written as rows of a result from registers: where two lines of the cache or more fill at
// once, for with one line it is slower than by way of a buffer. Their width must be a multiple of kPanelWidth.
template <typename Policy, typename T>
constexpr bool kFromRegisters = Policy::kPanelWidth > 0 && Policy::kPanelWidth * sizeof(T) % 128 == 0;

// out_i = sum_j w_ij x_j for the queries i of a block, keys j block by block; w [keys, kBlock], a result as a b. The
// sums lie row by row, and where the diagonal passes four queries at a time have the keys that one of them sees.
template <typename Policy>
struct KeySums {
  using Element = typename Policy::Element;
  float* out;  // [kBlock, width]
  int64_t width;

  template <typename T>
  static void pack(const Rows<T>& x, int64_t width, Element* packed) {
    Policy::pack_b(x, width, packed);
  }
  void clear(int64_t lanes) const { std::memset(out, 0, sizeof(float) * static_cast<size_t>(lanes * width)); }
  // Adds those of a block of keys, or with `first` sets them.
  void add(const Policy&, const Bands<Policy>& bands, const Element* w, const Element* x, bool first) const {
    add_to(bands, w, x, first, [](int64_t) { return ToC{}; });
  }
  // The same for the last block of keys, and writes them, as write() does.
  template <typename T, typename Factor>
  void finish(const Policy& policy, const Bands<Policy>& bands, const Element* w, const Element* x, bool first,
              const Factor& factor, const Result<T>& result) const {
    if constexpr (kFromRegisters<Policy, T>) {
      if (result.width % Policy::kPanelWidth == 0) {
        const ToRows<Policy, T, Factor> rows{result, factor, bands.queries};
        return add_to(bands, w, x, first, [&](int64_t query) { return rows.from(query); });
      }
    }
    add(policy, bands, w, x, first);
    write(bands.queries, factor, result);
  }
  // Queries `lane` to `lane + count`, each by its factor.
  void scale(int64_t lane, int64_t count, const float* factors) const {
    for (int64_t i = 0; i < count; ++i) {
      const Reg by = broadcast_reg(factors[i]);
      float* row = out + (lane + i) * width;
      for (int64_t d = 0; d < width; d += kRegLanes) store_reg(row + d, mul(load_reg(row + d), by));
    }
  }
  // Row i times factor(i), of the first `count`.
  template <typename T, typename Factor>
  void write(int64_t count, const Factor& factor, const Result<T>& result) const {
    for (int64_t i = 0; i < count; ++i) {
      Policy::write_row(out + i * width, result.width, factor(i), result[i], result.streamed);
    }
  }

 private:
  // to_at(query) is where the sums go of the queries from there on.
  template <typename ToAt>
  void add_to(const Bands<Policy>& bands, const Element* w, const Element* x, bool first, const ToAt& to_at) const {
    const int64_t past = round_up(bands.queries, Policy::kStep), step = bands.mask.diagonal ? Policy::kStep : past;
    for (int64_t query = 0; query < past; query += step) {
      const int64_t keys = round_up(bands.past_key(query + step), Policy::kDepth);
      Policy::template product<true>(step, width, keys, w + Policy::column(query), Policy::kResultStride, x, width,
                                     out + query * width, width, !first, to_at(query));
    }
  }
};

#if defined(LEMUR_ISA_AMX)
// Those of tiles, which take no transposed left operand, are transposed themselves.
template <>
struct KeySums<Tiles> {
  float* out;  // [width, kBlock]
  int64_t width;

  static void pack(const Rows<bfloat16>& x, int64_t width, bfloat16* packed) {
    Tiles::pack_transposed_a(x, width, packed);
  }
  void clear(int64_t) const { std::memset(out, 0, sizeof(float) * static_cast<size_t>(kBlock * width)); }
  void add(const Tiles& tiles, const Bands<Tiles>& bands, const bfloat16* w, const bfloat16* x, bool first) const {
    // Bands have fewer lanes, the lower they lie: the first one sets all, unless it begins later itself.
    const bool sets = first && bands.first_lane(0) == 0;
    if (first && !sets) clear(bands.lanes);
    bands.each([&](int64_t row, int64_t many, int64_t lane) {
      tiles.product(width, bands.lanes - lane, many, x + row, kBlock,
                    w + row * Tiles::kResultStride + Tiles::column(lane), Tiles::kResultStride, out + lane, kBlock,
                    !sets || row > 0);
    });
  }
  void scale(int64_t lane, int64_t, const float* factors) const {
    const Reg by = load_reg(factors);
    for (int64_t d = 0; d < width; ++d) {
      float* o = out + d * kBlock + lane;
      store_reg(o, mul(load_reg(o), by));
    }
  }
  template <typename T, typename Factor>
  void finish(const Tiles& tiles, const Bands<Tiles>& bands, const bfloat16* w, const bfloat16* x, bool first,
              const Factor& factor, const Result<T>& result) const {
    add(tiles, bands, w, x, first);
    write(bands.queries, factor, result);
  }
  template <typename T, typename Factor>
  void write(int64_t count, const Factor& factor, const Result<T>& result) const {
    alignas(64) float rows[16 * kMaxWidth];
    for (int64_t first = 0; first < count; first += 16) {
      for (int64_t d = 0; d < width; d += 16) {
        transpose_16x16(out + d * kBlock + first, kBlock, rows + d, kMaxWidth);
      }
      for (int64_t i = first; i < least(first + 16, count); ++i) {
        Tiles::write_row(rows + (i - first) * kMaxWidth, result.width, factor(i), result[i], result.streamed);
      }
    }
  }
};
#endif

// out_j = sum_i w_ij x_i for the keys j of a block, queries i block by block; w a result as an a.
template <typename Policy>
struct QuerySums {
  using Element = typename Policy::Element;
  float* out;  // [kBlock, width]
  int64_t width;

  // Adds those of a block of queries, or with `first` sets them.
  void add(const Policy& policy, const Bands<Policy>& bands, const Element* w, const Element* x, bool first) const {
    add_to(policy, bands, w, x, first, [](int64_t) { return ToC{}; });
  }
  // The same for the last block of queries, and writes `count` rows of them, as write() does.
  template <typename T>
  void finish(const Policy& policy, const Bands<Policy>& bands, const Element* w, const Element* x, bool first,
              int64_t count, float factor, const Result<T>& result) const {
    if constexpr (kFromRegisters<Policy, T>) {
      if (result.width % Policy::kPanelWidth == 0) {
        const auto factor_of = [factor](int64_t) { return factor; };
        const ToRows<Policy, T, decltype(factor_of)> rows{result, factor_of, count};
        return add_to(policy, bands, w, x, first, [&](int64_t row) { return rows.from(row); });
      }
    }
    add(policy, bands, w, x, first);
    write(count, factor, result);
  }
  void clear() const { std::memset(out, 0, sizeof(float) * static_cast<size_t>(kBlock * width)); }
  template <typename T>
  void write(int64_t count, float factor, const Result<T>& result) const {
    for (int64_t row = 0; row < count; ++row) {
      Policy::write_row(out + row * width, result.width, factor, result[row], result.streamed);
    }
  }

 private:
  template <typename ToAt>
  void add_to(const Policy& policy, const Bands<Policy>& bands, const Element* w, const Element* x, bool first,
              const ToAt& to_at) const {
    const int64_t past = round_up(bands.queries, Policy::kDepth);
    const int64_t step = bands.mask.diagonal ? Policy::kStep : bands.keys;
    for (int64_t row = 0; row < bands.keys; row += step) {
      const int64_t query = least(past, bands.first_query(row) / Policy::kDepth * Policy::kDepth);
      policy.product(step, width, past - query, w + row * Policy::kResultStride + query, Policy::kResultStride,
                     x + query * width, width, out + row * width, width, !first, to_at(row));
    }
  }
};

// ---- forward ----

// Turns products [rows, kBlock] into exp(s - largest), as a b, and brings the statistics of the lanes up to date; the
// output so far is rescaled to them.
template <typename Policy, bool kSoftcap>
void softmax_block(const Scores<kSoftcap>& score, const Bands<Policy>& bands, float* s, int64_t keys, float* largest,
                   float* total, const KeySums<Policy>& output, bool first) {
  const BlockMask& mask = bands.mask;
  const Reg none = broadcast_reg(-INFINITY), zero = broadcast_reg(0.f);
  for (int64_t lane = 0; lane < bands.lanes; lane += kRegLanes) {
    const int64_t rows = bands.past_row(lane, keys);
    const Reg before = load_reg(largest + lane);
    Reg high = before;
    for (int64_t row = 0; row < rows; ++row) {
      float* p = s + row * kBlock + lane;
      Reg t = score(load_reg(p));
      if (mask.needed) t = mask(t, none, row, lane);
      store_reg(p, t);
      high = maximum(high, t);
    }
    // A lane that has seen nothing stays at zero: -inf - 0, not -inf + inf.
    const Reg base = select(less(high, broadcast_reg(-FLT_MAX)), zero, high);
    const Reg shrink = exp2(sub(before, base));
    Reg sum = zero;
    const auto weight_at = [&](int64_t row) { return exp2(sub(load_reg(s + row * kBlock + lane), base)); };
    for (int64_t row = 0; row < rows; row += 2) {
      const Reg weight = weight_at(row), next = row + 1 < rows ? weight_at(row + 1) : zero;
      Policy::store_as_b(s, row, lane, weight, next);
      sum = add(add(sum, weight), next);
    }
    store_reg(largest + lane, high);
    store_reg(total + lane, fma(load_reg(total + lane), shrink, sum));
    if (first) continue;
    float factors[kRegLanes];
    store_reg(factors, shrink);
    output.scale(lane, least(kRegLanes, bands.queries - lane), factors);
  }
}

template <typename T, typename Policy, bool kSoftcap>
struct Forward {
  const Attention& a;
  const Policy policy{};
  const Scores<kSoftcap> score{a};
  const int64_t width = round_up(a.head_dim, Policy::kHeadWidth), group = a.q_heads / a.kv_heads;
  const bool streamed = streams(static_cast<const T*>(a.out), a.query_tokens, a.q_heads, a.head_dim);

  static int64_t scratch_floats(const Attention& a, int64_t longest) {
    const int64_t width = round_up(a.head_dim, Policy::kHeadWidth), pack = round_up(Policy::pack_size(width), 16);
    return 2 * blocks_of(longest) * pack + pack + kBlock * width + kBlock * kBlock + 2 * kBlock;
  }

  // `next` is the thread's next task, if that is known.
  void task(const Task& task, const Task& next, float* memory) const {
    const AttentionDocument& doc = *task.document;
    const int64_t kv_head = task.kv_head;
    Arena<Policy> arena{memory};
    const int64_t pack = round_up(Policy::pack_size(width), 16), key_blocks = blocks_of(doc.keys);
    const Packs<Policy> keys(arena, pack, key_blocks), values(arena, pack, key_blocks), query(arena, pack, 1);
    const KeySums<Policy> output{arena.floats(kBlock * width), width};
    float* s = arena.floats(kBlock * kBlock);
    float* largest = arena.floats(kBlock);
    float* total = arena.floats(kBlock);
    const Visibility visible{a.causal, a.window, doc.keys - doc.queries, doc.queries, doc.keys};
    int64_t packed = visible.first_key_block(0);  // past the last block of keys that is packed
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t block = 0; block < blocks_of(doc.queries); ++block) {
        const int64_t first = block * kBlock, count = least(kBlock, doc.queries - first);
        const int64_t lanes = round_up(count, Policy::kWidth);
        Policy::pack_transposed_b(block_rows<T>(a.q, head, doc.query_start, doc.queries, block, a.head_dim), width,
                                  query[0]);
        for (int64_t i = 0; i < lanes; ++i) {
          largest[i] = -INFINITY;
          total[i] = 0.f;
        }
        const int64_t begin = visible.first_key_block(first), end = visible.past_key_block(first + count);
        for (; packed < end; ++packed) {
          const auto k = block_rows<T>(a.k, kv_head, doc.key_start, doc.keys, packed, a.head_dim);
          const auto v = block_rows<T>(a.v, kv_head, doc.key_start, doc.keys, packed, a.head_dim);
          Policy::pack_a(k, width, keys[packed]);
          KeySums<Policy>::pack(v, width, values[packed]);
        }
        const int64_t token = doc.query_start + first;
        const auto out = rows_of<T>(a.out, token, a.q_heads, head, a.head_dim, streamed);
        float* lse = a.lse + head * a.query_tokens + token;
        const auto inverse = [&](int64_t i) { return total[i] == 0.f ? 0.f : 1.f / total[i]; };
        if (begin >= end) {
          output.clear(lanes);
          output.write(count, inverse, out);
        }
        Ahead ahead = rows_at<T, false>(a, Place{task, head, block, 0}.after(next, group, packed));
        for (int64_t key_block = begin; key_block < end; ++key_block) {
          const int64_t rows = least(kBlock, doc.keys - key_block * kBlock), padded = round_up(rows, Policy::kStep);
          const BlockMask mask(visible, key_block * kBlock, rows, first, count);
          const Bands<Policy> bands{mask, padded, count, lanes};
          ahead.ask();
          bands.each([&](int64_t row, int64_t many, int64_t lane) {
            policy.product(many, lanes - lane, width, keys[key_block] + row * width, width,
                           query[0] + Policy::column(lane), kBlock, s + row * kBlock + lane, kBlock, false);
          });
          ahead.ask();
          softmax_block(score, bands, s, rows, largest, total, output, key_block == begin);
          std::memset(s + rows * kBlock, 0, sizeof(float) * static_cast<size_t>((padded - rows) * kBlock));
          ahead.ask();
          const auto* weights = Policy::operand(s);
          if (key_block + 1 < end) {
            output.add(policy, bands, weights, values[key_block], key_block == begin);
          } else {
            output.finish(policy, bands, weights, values[key_block], key_block == begin, inverse, out);
          }
        }
        for (int64_t i = 0; i < count; ++i) lse[i] = total[i] == 0.f ? -INFINITY : largest[i] * kLn2 + logf(total[i]);
      }
    }
  }
};

// ---- backward ----

template <typename T, typename Policy, bool kSoftcap>
struct Backward {
  const Attention& a;
  const Policy policy{};
  const Scores<kSoftcap> score{a};
  const int64_t width = round_up(a.head_dim, Policy::kHeadWidth), group = a.q_heads / a.kv_heads;
  const bool streamed = streams(static_cast<const T*>(a.dq), a.query_tokens, a.q_heads, a.head_dim) &&
                        streams(static_cast<const T*>(a.dk), a.key_tokens, a.kv_heads, a.head_dim) &&
                        streams(static_cast<const T*>(a.dv), a.key_tokens, a.kv_heads, a.head_dim);

  static int64_t scratch_floats(const Attention& a, int64_t longest) {
    const int64_t width = round_up(a.head_dim, Policy::kHeadWidth), pack = round_up(Policy::pack_size(width), 16);
    return blocks_of(longest) * ((2 + Policy::kPaired) * pack + 2 * kBlock * width) + 4 * pack + kBlock * width +
           2 * kBlock + (2 + Policy::kPaired) * kBlock * kBlock;
  }

  // `next` is the thread's next task, if that is known.
  void task(const Task& task, const Task& next, float* memory) const {
    const AttentionDocument& doc = *task.document;
    const int64_t kv_head = task.kv_head;
    Arena<Policy> arena{memory};
    const int64_t pack = round_up(Policy::pack_size(width), 16), block_size = kBlock * width;
    const int64_t key_blocks = blocks_of(doc.keys);
    const Packs<Policy> keys(arena, pack, key_blocks), values(arena, pack, key_blocks);
    const Packs<Policy> keys_summed = Policy::kPaired ? Packs<Policy>(arena, pack, key_blocks) : keys;
    auto *query = arena.packs(pack, 1), *query_turned = arena.packs(pack, 1);
    auto *dout = arena.packs(pack, 1), *dout_turned = arena.packs(pack, 1);
    float* dk_sums = arena.floats(key_blocks * block_size);
    float* dv_sums = arena.floats(key_blocks * block_size);
    const auto dk = [&](int64_t key_block) { return QuerySums<Policy>{dk_sums + key_block * block_size, width}; };
    const auto dv = [&](int64_t key_block) { return QuerySums<Policy>{dv_sums + key_block * block_size, width}; };
    const KeySums<Policy> dq{arena.floats(block_size), width};
    float* lse = arena.floats(kBlock);
    float* delta = arena.floats(kBlock);
    float* p = arena.floats(kBlock * kBlock);
    float* ds = arena.floats(kBlock * kBlock);
    float* ds_paired = Policy::kPaired ? arena.floats(kBlock * kBlock) : ds;

    const auto result_at = [&](void* x, int64_t key_block) {
      return rows_of<T>(x, doc.key_start + key_block * kBlock, a.kv_heads, kv_head, a.head_dim, streamed);
    };

    const Visibility visible{a.causal, a.window, doc.keys - doc.queries, doc.queries, doc.keys};
    const int64_t first_packed = visible.first_key_block(0);
    int64_t packed = first_packed;       // past the last block of keys that is packed
    int64_t first_written = key_blocks;  // dk and dv from there on are written by the last block of queries
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t block = 0; block < blocks_of(doc.queries); ++block) {
        const int64_t first = block * kBlock, count = least(kBlock, doc.queries - first);
        const int64_t lanes = round_up(count, Policy::kWidth);
        const int64_t begin = visible.first_key_block(first), end = visible.past_key_block(first + count);
        const bool last = head + 1 == (kv_head + 1) * group && block + 1 == blocks_of(doc.queries);
        if (last) first_written = begin;
        const auto out = rows_of<T>(a.dq, doc.query_start + first, a.q_heads, head, a.head_dim, streamed);
        const auto scale = [&](int64_t) { return a.scale; };
        if (begin >= end) {
          dq.clear(lanes);
          dq.write(count, scale, out);
        }
        const auto q = block_rows<T>(a.q, head, doc.query_start, doc.queries, block, a.head_dim);
        const auto grad = block_rows<T>(a.dout, head, doc.query_start, doc.queries, block, a.head_dim);
        Policy::pack_both_b(q, width, query, query_turned);
        Policy::pack_both_b(grad, width, dout, dout_turned);
        statistics(doc, head, block, grad, lanes, lse, delta);
        const int64_t past_summed = packed;  // the blocks of keys before it have sums already
        for (; packed < end; ++packed) {
          const auto k = block_rows<T>(a.k, kv_head, doc.key_start, doc.keys, packed, a.head_dim);
          const auto v = block_rows<T>(a.v, kv_head, doc.key_start, doc.keys, packed, a.head_dim);
          Policy::pack_a(k, width, keys[packed]);
          if constexpr (Policy::kPaired) KeySums<Policy>::pack(k, width, keys_summed[packed]);
          Policy::pack_a(v, width, values[packed]);
        }
        Ahead ahead = rows_at<T, true>(a, Place{task, head, block, 0}.after(next, group, packed));
        ahead.ask();
        for (int64_t key_block = begin; key_block < end; ++key_block) {
          const int64_t rows = least(kBlock, doc.keys - key_block * kBlock), padded = round_up(rows, Policy::kStep);
          const BlockMask mask(visible, key_block * kBlock, rows, first, count);
          const Bands<Policy> bands{mask, padded, count, lanes};
          ahead.ask();
          bands.each([&](int64_t row, int64_t many, int64_t lane) {
            const int64_t left = row * width, right = Policy::column(lane), at = row * kBlock + lane;
            policy.product(many, lanes - lane, width, keys[key_block] + left, width, query_turned + right, kBlock,
                           p + at, kBlock, false);
            policy.product(many, lanes - lane, width, values[key_block] + left, width, dout_turned + right, kBlock,
                           ds + at, kBlock, false);
          });
          ahead.ask();
          gradients_of_scores(bands, p, ds, ds_paired, rows, lse, delta);
          const auto sum = [&](QuerySums<Policy> sums, float* w, auto* x, float factor, void* to) {
            const bool sets = key_block >= past_summed;
            if (!last) return sums.add(policy, bands, Policy::operand(w), x, sets);
            sums.finish(policy, bands, Policy::operand(w), x, sets, rows, factor, result_at(to, key_block));
          };
          ahead.ask();
          sum(dv(key_block), p, dout, 1.f, a.dv);
          ahead.ask();
          sum(dk(key_block), ds, query, a.scale, a.dk);
          ahead.ask();
          const auto* weights = Policy::operand(ds_paired);
          if (key_block + 1 < end) {
            dq.add(policy, bands, weights, keys_summed[key_block], key_block == begin);
          } else {
            dq.finish(policy, bands, weights, keys_summed[key_block], key_block == begin, scale, out);
          }
        }
      }
    }
    // Keys before the window of the last block of queries, which sees the last key; or all, without queries. What no
    // block of queries sees are zeros.
    for (int64_t key_block = 0; key_block < first_written; ++key_block) {
      if (key_block < first_packed || key_block >= packed) {
        dk(key_block).clear();
        dv(key_block).clear();
      }
      const int64_t rows = least(kBlock, doc.keys - key_block * kBlock);
      dk(key_block).write(rows, a.scale, result_at(a.dk, key_block));
      dv(key_block).write(rows, 1.f, result_at(a.dv, key_block));
    }
  }

  // lse in base 2, +inf where a query sees nothing, so that its probabilities are 0; and delta.
  void statistics(const AttentionDocument& doc, int64_t head, int64_t block, const Rows<T>& grad, int64_t lanes,
                  float* lse, float* delta) const {
    const auto out = block_rows<T>(a.o, head, doc.query_start, doc.queries, block, a.head_dim);
    const int64_t at = head * a.query_tokens + doc.query_start + block * kBlock;
    for (int64_t i = 0; i < lanes; ++i) {
      lse[i] = INFINITY;
      delta[i] = 0.f;
      if (i >= grad.count) continue;
      const float natural = a.lse[at + i];
      if (natural == -INFINITY) continue;  // its dlse may be NaN: that is what merging two such rows sends back
      lse[i] = natural * kLog2E;
      delta[i] = Policy::dot(out.data + i * out.stride, grad.data + i * grad.stride, a.head_dim);
      if (a.dlse) delta[i] -= a.dlse[at + i];
    }
  }

  // From products to probabilities (p) and gradients of products (ds), but for the scale: each as an a, and ds as a b,
  // too.
  void gradients_of_scores(const Bands<Policy>& bands, float* p, float* ds, float* ds_paired, int64_t rows,
                           const float* lse, const float* delta) const {
    const Reg zero = broadcast_reg(0.f);
    for (int64_t row = 0; row < rows; row += 2) {
      for (int64_t lane = bands.first_register(row); lane < bands.lanes; lane += kRegLanes) {
        const auto of_row = [&](int64_t of, Reg& weight, Reg& gradient) {
          const int64_t at = of * kBlock + lane;
          Reg slope = zero;
          weight = exp2(sub(score(load_reg(p + at), slope), load_reg(lse + lane)));
          gradient = mul(weight, sub(load_reg(ds + at), load_reg(delta + lane)));
          if constexpr (kSoftcap) gradient = mul(gradient, slope);
          if (bands.mask.needed) {
            weight = bands.mask(weight, zero, of, lane);
            gradient = bands.mask(gradient, zero, of, lane);
          }
        };
        Reg weight, gradient, next_weight = zero, next_gradient = zero;
        of_row(row, weight, gradient);
        if (row + 1 < rows) of_row(row + 1, next_weight, next_gradient);
        Policy::store_as_a(p, row, lane, weight, next_weight);
        Policy::store_as_a(ds, row, lane, gradient, next_gradient);
        if constexpr (Policy::kPaired) Policy::store_as_b(ds_paired, row, lane, gradient, next_gradient);
      }
    }
    const auto rest = sizeof(float) * static_cast<size_t>((bands.keys - rows) * kBlock);
    std::memset(p + rows * kBlock, 0, rest);
    std::memset(ds + rows * kBlock, 0, rest);
    if constexpr (Policy::kPaired) std::memset(ds_paired + rows * kBlock, 0, rest);
  }
};

// ---- all documents ----

template <typename Run>
void run_tasks(const Attention& a) {
  int64_t longest = 0;
  for (int64_t i = 0; i < a.num_documents; ++i) {
    longest = most(longest, most(a.documents[i].queries, a.documents[i].keys));
  }
  // Documents come with the dearest first; a thread takes the next tasks when it is done with some: where there are
  // many, heads of a document at once, for their rows lie side by side. Of short documents it takes them one task
  // early, to know whose rows to ask for.
  const int64_t tasks = a.num_documents * a.kv_heads, floats = Run::scratch_floats(a, longest);
  const auto task_at = [&](int64_t i) {
    return i < tasks ? Task{&a.documents[i / a.kv_heads], i % a.kv_heads} : Task{};
  };
  int64_t next = 0;
  parallel_for(least(max_threads(), tasks), 1, [&](int64_t, int64_t) {
    const ThreadScratch scratch(floats);
    const Run run{a};
    const int64_t share = tasks / (32 * max_threads()), at_once = most(1, least(a.kv_heads, share));
    const auto take = [&] { return __atomic_fetch_add(&next, at_once, __ATOMIC_RELAXED); };
    for (int64_t i = take(), past = i + at_once; i < tasks;) {
      const Task task = task_at(i);
      const bool last = i + 1 == past, early = last && share > 0 && task.document->queries <= kBlock;
      int64_t then = i + 1;
      if (last) then = early ? take() : tasks;
      run.task(task, task_at(then), scratch.data());
      if (last) {
        if (!early) then = take();
        past = then + at_once;
      }
      i = then;
    }
    finish_streams();
  });
}

template <template <typename, typename, bool> class Run>
void run(const Attention& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Policy = std::conditional_t<std::is_same_v<T, bfloat16>, BFloat16Policy, Fma>;
    a.softcap != 0.f ? run_tasks<Run<T, Policy, true>>(a) : run_tasks<Run<T, Policy, false>>(a);
  });
}

// Tokens that no document has: rows of zeros.
void zero_tail(void* out, DType dtype, int64_t tokens, int64_t from, int64_t row) {
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  if (from < tokens) {
    std::memset(static_cast<char*>(out) + from * row * size, 0, static_cast<size_t>((tokens - from) * row * size));
  }
}

}  // namespace

void attention_fwd(const Attention& a) {
  run<Forward>(a);
  zero_tail(a.out, a.dtype, a.query_tokens, a.past_query, a.q_heads * a.head_dim);
  for (int64_t head = 0; head < a.q_heads; ++head) {
    for (int64_t token = a.past_query; token < a.query_tokens; ++token)
      a.lse[head * a.query_tokens + token] = -INFINITY;
  }
}

void attention_bwd(const Attention& a) {
  run<Backward>(a);
  zero_tail(a.dq, a.dtype, a.query_tokens, a.past_query, a.q_heads * a.head_dim);
  zero_tail(a.dk, a.dtype, a.key_tokens, a.past_key, a.kv_heads * a.head_dim);
  zero_tail(a.dv, a.dtype, a.key_tokens, a.past_key, a.kv_heads * a.head_dim);
}

}  // namespace lemur::cpu::LEMUR_ISA
