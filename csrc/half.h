// float32 to float16 and bfloat16, to the nearest, ties to even: what PyTorch's conversions give, without branches, so
// that loops over them vectorise in every variant.
#pragma once

#include "platform.h"

namespace densegrpo {

DENSEGRPO_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

DENSEGRPO_INLINE uint16_t to_float16(float value) {
  constexpr uint32_t kBias = 112u << 23;      // between the exponents of the two formats
  constexpr uint32_t kNormal = 113u << 23;    // 2^-14, the smallest normal float16
  constexpr uint32_t kInfinite = 0x477FF000u;  // 65520: from here on, what is nearest is infinite
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  // An odd neighbour is rounded up from the middle on, an even one only beyond it.
  const uint32_t normal = (size - kBias + 0x0FFFu + (size >> 13 & 1u)) >> 13;
  // Beside 0.5 a float32 has steps of 2^-24, those of a subnormal float16: the addition rounds.
  const uint32_t subnormal = to_bits(from_bits(size) + 0.5f) - to_bits(0.5f);
  uint32_t half = size < kNormal ? subnormal : normal;
  half = size >= kInfinite ? 0x7C00u : half;
  half = size > 0x7F800000u ? 0x7E00u : half;
  return static_cast<uint16_t>(sign | half);
}

}  // namespace densegrpo
