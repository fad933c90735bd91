#include "packing.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <vector>

namespace lemur {

int64_t best_fit_decreasing(const int64_t* lengths, int64_t n, int64_t capacity, int64_t* bins) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  // Bins with the same room form a stack, linked through `below`. There are never more stacks than different rooms, so
  // the tree stays small and in the cache however many bins there are.
  constexpr int64_t kNone = -1;
  std::map<int64_t, int64_t> top_by_room;
  std::vector<int64_t> below;
  for (const int64_t item : order) {
    const auto tightest = top_by_room.lower_bound(lengths[item]);
    int64_t room, bin;
    if (tightest == top_by_room.end()) {
      room = capacity;
      bin = static_cast<int64_t>(below.size());
      below.push_back(kNone);
    } else {
      room = tightest->first;
      bin = tightest->second;
      const int64_t next = below[static_cast<size_t>(bin)];
      if (next == kNone) {
        top_by_room.erase(tightest);
      } else {
        tightest->second = next;
      }
    }
    bins[item] = bin;
    if (room > lengths[item]) {
      const auto [stack, is_new] = top_by_room.try_emplace(room - lengths[item], kNone);
      below[static_cast<size_t>(bin)] = is_new ? kNone : stack->second;
      stack->second = bin;
    }
  }
  return static_cast<int64_t>(below.size());
}

}  // namespace lemur
