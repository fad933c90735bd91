// Sums and products with a change of dtype on the way, which torch takes through a temporary.
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace lemur::cpu::LEMUR_ISA {

void accumulate(const Accumulate& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_pieces(a.n, [&](int64_t begin, int64_t count) {
      const T* x = static_cast<const T*>(a.x) + begin;
      float* total = a.total + begin;
      for_lanes(count, [&](int64_t i, auto lanes) {
        const Vec v = load(x + i, lanes);
        store(total + i, a.add ? add(v, load(static_cast<const float*>(total) + i, lanes)) : v, lanes);
      });
    });
  });
}

void scale(const Scale& a) {
  with_type(a.x_dtype, [&](auto x_type) {
    with_type(a.y_dtype, [&](auto y_type) {
      using X = typename decltype(x_type)::type;
      using Y = typename decltype(y_type)::type;
      const Vec factor = broadcast(a.factor);
      parallel_pieces(a.n, [&](int64_t begin, int64_t count) {
        const X* x = static_cast<const X*>(a.x) + begin;
        Y* y = static_cast<Y*>(a.y) + begin;
        for_lanes(count, [&](int64_t i, auto lanes) { store(y + i, mul(load(x + i, lanes), factor), lanes); });
      });
    });
  });
}

}  // namespace lemur::cpu::LEMUR_ISA
