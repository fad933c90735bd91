// The kernels of one instruction set, one declaration for each entry of Kernels.
#pragma once

#include "cpu/kernels.h"

namespace lemur::cpu::LEMUR_ISA {

void rms_norm_fwd(const RmsNormFwd& args);
void rms_norm_bwd(const RmsNormBwd& args);
void swiglu_fwd(const SwigluFwd& args);
void swiglu_bwd(const SwigluBwd& args);
void rotary(const Rotary* xs, int count, const RotaryTables& tables);
void cross_entropy_fwd(const CrossEntropy& args);
void cross_entropy_bwd(const CrossEntropy& args);
void accumulate(const Accumulate& args);
void scale(const Scale& args);
void attention_fwd(const Attention& args);
void attention_bwd(const Attention& args);

}  // namespace lemur::cpu::LEMUR_ISA
