#include "cpu/labels.h"

namespace lemur::cpu {

int64_t first_wrong_label(const int64_t* labels, int64_t n, int64_t vocab, int64_t ignore_index) {
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] != ignore_index && (labels[i] < 0 || labels[i] >= vocab)) return i;
  }
  return -1;
}

int64_t trained_rows(const int64_t* labels, int64_t n, int64_t ignore_index, int64_t* rows) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] == ignore_index) continue;
    if (rows) rows[count] = i;
    ++count;
  }
  return count;
}

void sum_losses(const float* loss, const int64_t* labels, int64_t n, int64_t ignore_index, float* total, float* items) {
  double sum = 0;
  int64_t trained = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += loss[i];
    trained += labels[i] != ignore_index;
  }
  if (items) {
    if (trained < 1) trained = 1;
    sum /= static_cast<double>(trained);
    *items = static_cast<float>(trained);
  }
  *total = static_cast<float>(sum);
}

}  // namespace lemur::cpu
