// What the losses ask of labels: which tokens train, and how much they lose together.
#pragma once

#include <cstdint>

namespace lemur::cpu {

// Position of the first label that is neither ignored nor in [0, vocab); -1 when there is none.
int64_t first_wrong_label(const int64_t* labels, int64_t n, int64_t vocab, int64_t ignore_index);

// Writes the positions of the labels that are not ignored, in order, and returns their number. `rows` has room for n;
// null: they are only counted.
int64_t trained_rows(const int64_t* labels, int64_t n, int64_t ignore_index, int64_t* rows);

// Writes the sum of n losses; or, unless `items` is null, their mean over the labels that are not ignored, and into
// `items` the number of those, but at least 1: nothing trained is then a mean of 0. Always in the same order.
void sum_losses(const float* loss, const int64_t* labels, int64_t n, int64_t ignore_index, float* total, float* items);

}  // namespace lemur::cpu
