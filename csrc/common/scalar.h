// Storage types of the CPU kernels and their conversions to and from float32, in which all sums are kept.
// Written branch-free so that loops over them vectorise. Include only from <family>/kernels.cpp.
#pragma once

#include <cstdint>

#include "types.h"

// A loop vectorises only when all that it calls is inlined.
#define STAR_INLINE inline __attribute__((always_inline))

namespace star {
namespace STAR_LEVEL {

STAR_INLINE uint32_t float_bits(float value) { return __builtin_bit_cast(uint32_t, value); }
STAR_INLINE float bits_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

STAR_INLINE float to_float(float value) { return value; }

STAR_INLINE float to_float(bfloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

STAR_INLINE float to_float(float16 value) {
  // Shift the half's exponent and mantissa into place and rescale by 2^112; halves below 2^-14 have no
  // exponent, and come out exactly by subtracting 0.5 from 0.5 + their mantissa.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t widened = magnitude << 13;
  const float normal = bits_float(widened + ((127u - 15u) << 23));
  const float special = bits_float(widened + ((255u - 31u) << 23));
  const float subnormal = bits_float(magnitude | (126u << 23)) - 0.5f;
  // 0.5 + m * 2^-24 holds the 10 mantissa bits exactly: a float in [0.5, 1) has steps of 2^-24.
  const float absolute = magnitude >= 0x7c00u ? special : magnitude < 0x0400u ? subnormal : normal;
  return bits_float(float_bits(absolute) | sign);
}

template <class T>
STAR_INLINE T from_float(float value);

template <>
STAR_INLINE float from_float<float>(float value) {
  return value;
}

template <>
STAR_INLINE bfloat16 from_float<bfloat16>(float value) {
  // Round to nearest even; a NaN keeps a mantissa bit so that it does not become an infinity.
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x0040u;
  return bfloat16{static_cast<uint16_t>(value != value ? nan : rounded)};
}

template <>
STAR_INLINE float16 from_float<float16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rebased = magnitude - ((127u - 15u) << 23);
  const uint32_t normal = (rebased + 0x0fffu + ((rebased >> 13) & 1u)) >> 13;
  // Adding 0.5 rounds a magnitude below 2^-14 to the steps of a subnormal half, in hardware.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - (126u << 23);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t absolute = magnitude >= 0x477ff000u ? special
                            : magnitude < 0x38800000u ? subnormal
                                                      : normal;
  return float16{static_cast<uint16_t>(absolute | sign)};
}

}  // namespace STAR_LEVEL
}  // namespace star
