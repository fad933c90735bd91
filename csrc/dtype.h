// The dtypes that kernels take, and the codes by which Python names them (lemur_fast._C.DType).
#pragma once

#include <cstdint>

namespace lemur {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Storage only: the arithmetic is fp32 everywhere.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace lemur
