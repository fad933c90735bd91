# Defines the library lemur_cuda when nvcc is found and wanted.
#
# Sets CUDA_VERSION_FOUND (empty when CUDA is not built), CUDA_ARCH_NAMES (sm_80,...) and CUDA_MISSING (why it is not).
set(CUDA_KERNELS csrc/cuda/cross_entropy.cu csrc/cuda/rms_norm.cu csrc/cuda/rotary.cu csrc/cuda/self_test.cu
                 csrc/cuda/swiglu.cu)
# What we support; those that the installed nvcc does not know are left out.
set(CUDA_ARCHS_WANTED 80 86 89 90 100 120)

set(CUDA_VERSION_FOUND "")
set(CUDA_ARCH_NAMES "")
set(CUDA_MISSING "")

if(LEMUR_FAST_CUDA STREQUAL "0")
  set(CUDA_MISSING "switched off by LEMUR_FAST_CUDA=0")
else()
  find_program(
    LEMUR_NVCC nvcc
    HINTS $ENV{CUDACXX} ENV CUDA_HOME ENV CUDA_PATH
    PATHS /usr/local/cuda /opt/cuda
    PATH_SUFFIXES bin
    NO_CACHE)
  if(DEFINED ENV{CUDACXX} AND NOT "$ENV{CUDACXX}" STREQUAL "")
    set(LEMUR_NVCC "$ENV{CUDACXX}")
  endif()
  if(NOT LEMUR_NVCC)
    set(CUDA_MISSING "nvcc was not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)")
  else()
    execute_process(
      COMMAND ${LEMUR_NVCC} --list-gpu-code
      OUTPUT_VARIABLE known
      ERROR_VARIABLE nvcc_error
      RESULT_VARIABLE nvcc_status)
    if(NOT nvcc_status EQUAL 0)
      set(CUDA_MISSING "${LEMUR_NVCC} does not run")
      message(STATUS "${LEMUR_NVCC} --list-gpu-code: ${nvcc_status} ${nvcc_error}")
    endif()
  endif()

  if(NOT CUDA_MISSING)
    string(REGEX MATCHALL "sm_[0-9]+[a-z]?" known "${known}")
    list(TRANSFORM known REPLACE "^sm_" "")
    set(archs "")
    if(LEMUR_FAST_CUDA_ARCHS STREQUAL "")
      foreach(arch IN LISTS CUDA_ARCHS_WANTED)
        if(arch IN_LIST known)
          list(APPEND archs ${arch})
        endif()
      endforeach()
      if(NOT archs)
        set(CUDA_MISSING "${LEMUR_NVCC} knows none of the architectures ${CUDA_ARCHS_WANTED}")
      endif()
    else()
      string(REGEX REPLACE "[ ,]+" ";" archs "${LEMUR_FAST_CUDA_ARCHS}")
      foreach(arch IN LISTS archs)
        # nvcc lists 90, and takes its variants 90a and 100f without listing them.
        string(REGEX REPLACE "[af]$" "" plain "${arch}")
        if(NOT plain IN_LIST known)
          message(FATAL_ERROR "LEMUR_FAST_CUDA_ARCHS: got ${arch}; this nvcc takes ${known}")
        endif()
      endforeach()
    endif()
  endif()

  if(NOT CUDA_MISSING)
    set(CMAKE_CUDA_COMPILER "${LEMUR_NVCC}")
    set(CMAKE_CUDA_ARCHITECTURES OFF) # set on the target below; CMake's own default is not wanted
    include(CheckLanguage)
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      set(CUDA_MISSING "${LEMUR_NVCC} cannot compile with this host compiler (see build/cmake-*/CMakeFiles/*.yaml)")
    endif()
  endif()
endif()

if(CUDA_MISSING)
  if(LEMUR_FAST_CUDA STREQUAL "1")
    message(FATAL_ERROR "LEMUR_FAST_CUDA=1, but ${CUDA_MISSING}")
  endif()
  message(STATUS "lemur_fast: building without CUDA: ${CUDA_MISSING}")
else()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(in_order ${archs})
  list(SORT in_order COMPARE NATURAL)
  list(GET in_order -1 newest)
  set(targets ${archs})
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
  list(TRANSFORM archs PREPEND "sm_" OUTPUT_VARIABLE names)
  list(APPEND names compute_${newest})
  list(JOIN names "," CUDA_ARCH_NAMES)
  message(STATUS "lemur_fast: building with CUDA ${CUDA_VERSION_FOUND} for ${CUDA_ARCH_NAMES}")
endif()
