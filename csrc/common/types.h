// Plain types shared by the torch side (cpu.cpp) and the torch-free kernels (kernels.cpp).
#pragma once

#include <cstdint>

// Functions for the CPU's code and, where nvcc compiles them, the GPU's too.
#ifdef __CUDACC__
#define STAR_ANYWHERE __host__ __device__
#else
#define STAR_ANYWHERE
#endif

namespace star {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

enum class Dtype : int { float32, bfloat16, float16 };

// A (batch, length, width) tensor whose last dimension is contiguous; strides count elements.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;

  template <class T>
  STAR_ANYWHERE T* row(int64_t batch, int64_t index) const {
    return static_cast<T*>(data) + batch * batch_stride + index * row_stride;
  }
};

}  // namespace star

// Runs the statement with T bound to the storage type that `dtype` names.
#define STAR_WITH_DTYPE(dtype, T, ...)                                       \
  switch (dtype) {                                                           \
    case ::star::Dtype::float32: { using T = float; __VA_ARGS__; break; }    \
    case ::star::Dtype::bfloat16: { using T = ::star::bfloat16; __VA_ARGS__; break; } \
    case ::star::Dtype::float16: { using T = ::star::float16; __VA_ARGS__; break; }   \
  }
