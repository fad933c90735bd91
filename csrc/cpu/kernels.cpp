// Compiled once per instruction set: the table of that set's kernels.
#include "cpu/kernels.h"

#include "cpu/ops.h"

#define LEMUR_STRING_(name) #name
#define LEMUR_STRING(name) LEMUR_STRING_(name)

namespace lemur::cpu::LEMUR_ISA {

extern const Kernels kTable;
const Kernels kTable = {
    LEMUR_STRING(LEMUR_ISA), rms_norm_fwd,      rms_norm_bwd, swiglu_fwd, swiglu_bwd,    rotary,
    cross_entropy_fwd,       cross_entropy_bwd, accumulate,   scale,      attention_fwd, attention_bwd};

}  // namespace lemur::cpu::LEMUR_ISA
