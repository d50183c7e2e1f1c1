// Neighbours in memory held as the 32-bit words that they came in until they are needed as floats: values that
// are on their way for long then take half the registers. Include from *cuda*.cu only.
#pragma once

#include "device.h"

#include <cstring>

namespace star {

template <class T, int count>
struct Words {
  static constexpr int words = count * static_cast<int>(sizeof(T)) / 4;
  static_assert(words >= 1 && words * 4 == count * static_cast<int>(sizeof(T)), "whole words");
  Pack<uint32_t, words> pack;

  // Zeros where not `there`; nothing is read then.
  __device__ __forceinline__ void load(const T* from, bool there) {
    pack = Pack<uint32_t, words>{};
    if (there) pack = *reinterpret_cast<const Pack<uint32_t, words>*>(from);
  }

  __device__ __forceinline__ void unpack(float (&values)[count]) const {
#pragma unroll
    for (int i = 0; i < words; ++i) {
      const uint32_t word = pack.values[i];
      if constexpr (sizeof(T) == 4) {
        std::memcpy(&values[i], &word, sizeof(word));
      } else {
        values[2 * i] = to_float(T{static_cast<uint16_t>(word & 0xffffu)});
        values[2 * i + 1] = to_float(T{static_cast<uint16_t>(word >> 16)});
      }
    }
  }
};

// One element, for rows of any alignment.
template <class T>
struct Words<T, 1> {
  T value;

  __device__ __forceinline__ void load(const T* from, bool there) { value = there ? *from : T{}; }
  __device__ __forceinline__ void unpack(float (&values)[1]) const { values[0] = to_float(value); }
};

}  // namespace star
