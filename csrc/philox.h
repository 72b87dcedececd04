// Philox4x32-10 and Box-Muller, as flow/noise.py defines them.
//
// Integers agree with it exactly. Floats agree to atol = rtol = 1e-6: the logarithm, sine and cosine below are short
// series on reduced arguments, good to about 2e-7, and free of tables and branches so that loops over them vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define DENSEGRPO_INLINE static inline __attribute__((always_inline))
#else
#define DENSEGRPO_INLINE static inline
#endif

namespace densegrpo {

struct Words {
  uint32_t v[4];
};

DENSEGRPO_INLINE Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kIncrement0 = 0x9E3779B9u, kIncrement1 = 0xBB67AE85u;
  uint32_t c0 = counter.v[0], c1 = counter.v[1], c2 = counter.v[2], c3 = counter.v[3];
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = kMultiplier0 * c0, product1 = kMultiplier1 * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    key0 += kIncrement0;
    key1 += kIncrement1;
  }
  return {{c0, c1, c2, c3}};
}

// Natural logarithm of a float in [2^-24, 1]. With x = m * 2^e and m in [sqrt(1/2), sqrt(2)), ln m is the series of
// 2*atanh(f) in f = (m-1)/(m+1); |f| <= 0.172, so five terms leave a relative error of 2e-9 before rounding.
DENSEGRPO_INLINE float log_unit(float x) {
  constexpr float kLn2 = 0.693147180559945f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t exponent = static_cast<int32_t>(bits + (0x3F800000u - 0x3F3504F3u)) >> 23;
  bits -= static_cast<uint32_t>(exponent - 127) << 23;
  float m;
  std::memcpy(&m, &bits, sizeof m);
  const float f = (m - 1.0f) / (m + 1.0f), g = f * f;
  const float series = 1.0f + g * (1.0f / 3 + g * (1.0f / 5 + g * (1.0f / 7 + g * (1.0f / 9))));
  return 2.0f * f * series + static_cast<float>(exponent - 127) * kLn2;
}

// One pair of normals from two words. The angle is reduced to [-pi/4, pi/4] on the integer, where it is exact.
DENSEGRPO_INLINE void box_muller(uint32_t radius_word, uint32_t turn_word, float* cosine, float* sine) {
  constexpr float kTwoPi = 6.28318530717959f, kUlp = 1.0f / 16777216.0f;
  const float u = static_cast<float>(static_cast<int32_t>((radius_word >> 8) + 1u)) * kUlp;
  const float radius = std::sqrt(-2.0f * log_unit(u));

  const int32_t turn = static_cast<int32_t>(turn_word >> 8);
  const int32_t quadrant = (turn + (1 << 21)) >> 22;
  const float a = static_cast<float>(turn - (quadrant << 22)) * kUlp * kTwoPi;
  const float a2 = a * a;
  const float s = a * (1.0f + a2 * (-1.0f / 6 + a2 * (1.0f / 120 + a2 * (-1.0f / 5040 + a2 * (1.0f / 362880)))));
  const float c = 1.0f + a2 * (-0.5f + a2 * (1.0f / 24 + a2 * (-1.0f / 720 + a2 * (1.0f / 40320 - a2 * (1.0f / 3628800)))));

  const bool swapped = quadrant & 1;
  const float unsigned_cosine = swapped ? s : c, unsigned_sine = swapped ? c : s;
  *cosine = radius * (((quadrant + 1) & 2) ? -unsigned_cosine : unsigned_cosine);
  *sine = radius * ((quadrant & 2) ? -unsigned_sine : unsigned_sine);
}

}  // namespace densegrpo
