// The kernels of one instruction set, one declaration for each entry of Kernels.
#pragma once

#include "cpu/kernels.h"

namespace lemur::cpu::LEMUR_ISA {

void rms_norm_fwd(const RmsNormFwd& args);
void rms_norm_bwd(const RmsNormBwd& args);

}  // namespace lemur::cpu::LEMUR_ISA
