// Bin packing of document lengths.
#pragma once

#include <cstdint>

namespace lemur {

// Best-fit-decreasing: items from the longest down (equal ones in the order given), each into the bin whose free room
// it fills best; among bins with equally much room, into the one that was touched last. Bins are numbered as they open.
// O(n log n). Lengths must lie in [1, capacity]. Writes the bin of every item and returns the number of bins.
int64_t best_fit_decreasing(const int64_t* lengths, int64_t n, int64_t capacity, int64_t* bins);

}  // namespace lemur
