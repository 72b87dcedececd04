// Philox4x32-10 and Box-Muller, as flow/noise.py defines them, for C++ and CUDA.
//
// Integers agree with it exactly, floats to atol = rtol = 1e-6. The logarithm, sine and cosine are short minimax
// polynomials on arguments that were reduced exactly; they have no tables and no branches, so that loops over them
// vectorise and CUDA needs no local memory.
#pragma once

#include <cmath>

#include "platform.h"

namespace densegrpo {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxIncrement0 = 0x9E3779B9u, kPhiloxIncrement1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// The two functions that CUDA has an instruction for. Arguments here are never subnormal, and not near a limit.
DENSEGRPO_INLINE float divide(float numerator, float denominator) {
#if defined(__CUDA_ARCH__)
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(denominator));
  return numerator * reciprocal;
#else
  return numerator / denominator;
#endif
}

DENSEGRPO_INLINE float square_root(float value) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
#else
  return sqrtf(value);
#endif
}

struct Words {
  uint32_t v[4];
};

// Who draws: everything in the counter but its first word, and the key. See the table in flow/noise.py.
struct Draw {
  uint32_t step_word, index_word, epoch_word, key0, key1;
};

DENSEGRPO_INLINE Draw make_draw(int64_t step, int32_t stream, int64_t sample, int64_t iteration, int64_t seed) {
  const uint64_t key = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(step) | static_cast<uint32_t>(stream) << 16, static_cast<uint32_t>(sample),
          static_cast<uint32_t>(iteration), static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

DENSEGRPO_INLINE Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.v[0], c1 = counter.v[1], c2 = counter.v[2], c3 = counter.v[3];
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    key0 += kPhiloxIncrement0;
    key1 += kPhiloxIncrement1;
  }
  return {{c0, c1, c2, c3}};
}

// Natural logarithm of a float in [2^-24, 1]. With x = m * 2^e and m in [sqrt(1/2), sqrt(2)), and f = (m-1)/(m+1),
// ln m = 2*atanh(f) = 2*f*(1 + f^2*P(f^2)); |f| <= 0.172, where this P is within 8e-10. m-1 is exact, so the result
// keeps its relative accuracy up to x = 1.
DENSEGRPO_INLINE float log_unit(float x) {
  constexpr float kLn2 = 0.693147180559945f;
  const uint32_t bits = to_bits(x);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float m = from_bits(bits - (static_cast<uint32_t>(exponent) << 23));
  const float f = divide(m - 1.0f, m + 1.0f), g = f * f, twice = f + f;
  const float series = g * (0.33333388f + g * (0.19988768f + g * 0.14935931f));
  return static_cast<float>(exponent) * kLn2 + (twice + twice * series);
}

// One pair of normals from two words. The turn (24 bits) is split on the integer into a quadrant and an angle in
// [-pi/4, pi/4), on which the polynomials are within 4e-9.
DENSEGRPO_INLINE void box_muller(uint32_t radius_word, uint32_t turn_word, float* cosine, float* sine) {
  constexpr float kUlp = 1.0f / 16777216.0f, kRadians = 6.28318530717959f / 16777216.0f;
  constexpr uint32_t kQuadrant = 1u << 22, kSign = 0x80000000u;
  const float u = static_cast<float>(static_cast<int32_t>((radius_word >> 8) + 1u)) * kUlp;
  const float radius = square_root(-2.0f * log_unit(u));

  const uint32_t turn = (turn_word >> 8) + kQuadrant / 2;
  const int32_t offset = static_cast<int32_t>(turn & (kQuadrant - 1)) - static_cast<int32_t>(kQuadrant / 2);
  const float a = static_cast<float>(offset) * kRadians, a2 = a * a;
  const float s = a + a * (a2 * (-0.16666655f + a2 * (0.0083321779f + a2 * -0.00019517267f)));
  const float c = 1.0f + a2 * (-0.5f + a2 * (0.041666647f + a2 * (-0.0013887367f + a2 * 2.4438416e-5f)));

  // Bit 0 of the quadrant swaps sine and cosine; their signs are bit 1 of the quadrant and of the next one.
  const uint32_t swapped = (to_bits(s) ^ to_bits(c)) & (0u - (turn / kQuadrant & 1u));
  *cosine = radius * from_bits(to_bits(c) ^ swapped ^ ((turn + kQuadrant) << 8 & kSign));
  *sine = radius * from_bits(to_bits(s) ^ swapped ^ (turn << 8 & kSign));
}

}  // namespace densegrpo
