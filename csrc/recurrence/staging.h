// Small tools of the kernels that stage chunks of tokens in float32. Include only from kernel files.
#pragma once

#include <cstdint>

namespace star {
namespace STAR_LEVEL {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// float32 memory of a thread's own, zeroed.
struct Scratch {
  float* data;
  explicit Scratch(int64_t size) : data(new float[size > 0 ? size : 1]) { clear(size); }
  ~Scratch() { delete[] data; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void clear(int64_t size) {
    for (int64_t i = 0; i < size; ++i) data[i] = 0.0f;
  }
};

// Asks for part of a row that comes later: rows read in pieces are too far apart for the hardware to foresee.
// A prefetch never faults, so the address may lie outside the tensor.
template <class T>
inline void prefetch(const T* row, int64_t width, int64_t elements_away) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(elements_away) * sizeof(T);
  for (uintptr_t byte = 0; byte < static_cast<uintptr_t>(width) * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(first + byte));
}

}  // namespace
}  // namespace STAR_LEVEL
}  // namespace star
