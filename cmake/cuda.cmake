# Defines the library lemur_cuda when setup.py has found an nvcc that can build it, and says so.
#
# Sets CUDA_VERSION_FOUND (empty when CUDA is not built) and CUDA_ARCH_NAMES (sm_80,...).
set(CUDA_KERNELS csrc/cuda/cross_entropy.cu csrc/cuda/rms_norm.cu csrc/cuda/rotary.cu csrc/cuda/self_test.cu
                 csrc/cuda/swiglu.cu)

set(CUDA_VERSION_FOUND "")
set(CUDA_ARCH_NAMES "")

if(LEMUR_FAST_NVCC)
  set(CMAKE_CUDA_COMPILER "${LEMUR_FAST_NVCC}")
  set(CMAKE_CUDA_ARCHITECTURES OFF) # set on the target below; CMake's own default is not wanted
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(in_order ${LEMUR_FAST_CUDA_ARCHS})
  list(SORT in_order COMPARE NATURAL)
  list(GET in_order -1 newest)
  set(targets ${LEMUR_FAST_CUDA_ARCHS})
  list(TRANSFORM targets APPEND "-real")
  # PTX of the newest, for the GPUs after it.
  list(APPEND targets ${newest}-virtual)

  add_library(lemur_cuda STATIC ${CUDA_KERNELS})
  target_include_directories(lemur_cuda PRIVATE csrc)
  # As on the CPU: fused multiply-adds are written out.
  target_compile_options(lemur_cuda PRIVATE --fmad=false)
  # cudart inside: the module then imports on a machine that has neither a driver nor a toolkit.
  set_target_properties(lemur_cuda PROPERTIES CUDA_ARCHITECTURES "${targets}" CUDA_RUNTIME_LIBRARY Static)

  set(CUDA_VERSION_FOUND "${CMAKE_CUDA_COMPILER_VERSION}")
  list(TRANSFORM LEMUR_FAST_CUDA_ARCHS PREPEND "sm_" OUTPUT_VARIABLE names)
  list(APPEND names compute_${newest})
  list(JOIN names "," CUDA_ARCH_NAMES)
  message(STATUS "lemur_fast: building with CUDA ${CUDA_VERSION_FOUND} for ${CUDA_ARCH_NAMES}")
endif()
