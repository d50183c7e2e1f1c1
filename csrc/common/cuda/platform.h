// CUDA, or its emulation on the CPU, and what a *cuda*.cu says differently for the two.
#pragma once

#ifdef STAR_EMULATE_CUDA

#include "emulator.h"

#define STAR_LEVEL emulated
#include "../scalar.h"

// The emulation takes the place of the CPU's own operators in the process that loads it.
#define STAR_REGISTER_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m)
#define STAR_SHARED_AT_LAUNCH(T, name) T* name = reinterpret_cast<T*>(::star::emulator::block.shared.data())

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define STAR_ON_CUDA  // for ../tensor.h: tensors are on a GPU
#define STAR_REGISTER_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(star_kernels, CUDA, m)
// The shared memory whose size the launch says, as an array of T.
#define STAR_SHARED_AT_LAUNCH(T, name)                            \
  extern __shared__ __align__(16) unsigned char star_shared_[];   \
  T* name = reinterpret_cast<T*>(star_shared_)

#endif
