// The random words and the normals of a tile: 64 consecutive counters, 256 consecutive elements.
//
// Compilers do not find the 32x32-bit multiplications of Philox, so the wide variants spell them out: a word lives in
// the low half of a 64-bit lane, and the multiplication ignores what is left in the high half.
#pragma once

#include "philox.h"
#include "variants.h"

#if DENSEGRPO_X86
#include <immintrin.h>
#endif

namespace densegrpo {

constexpr int kQuads = 64;         // counters per tile, four elements each
constexpr int kTile = 4 * kQuads;  // elements per tile

struct alignas(64) TileWords {
  uint32_t v[4][kQuads];
};

inline void tile_words_portable(const Draw& draw, uint32_t first, TileWords& words) {
  for (int q = 0; q < kQuads; ++q) {
    const Words counter = {{first + static_cast<uint32_t>(q), draw.step_word, draw.index_word, draw.epoch_word}};
    const Words r = philox4x32(counter, draw.key0, draw.key1);
    for (int k = 0; k < 4; ++k) words.v[k][q] = r.v[k];
  }
}

#if DENSEGRPO_X86

// Lane j of group 2p holds counter 2j, and of group 2p+1 counter 2j+1, so that a pair packs into consecutive words.
DENSEGRPO_AVX2 inline void tile_words_avx2(const Draw& draw, uint32_t first, TileWords& words) {
  constexpr int kGroups = 2, kStride = 4 * kGroups;
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  for (int q = 0; q < kQuads; q += kStride) {
    const uint32_t n = first + static_cast<uint32_t>(q);
    __m256i c[4][kGroups];
    c[0][0] = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 0, 2, 0, 4, 0, 6, 0));
    c[0][1] = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(1, 0, 3, 0, 5, 0, 7, 0));
    for (int g = 0; g < kGroups; ++g) {
      c[1][g] = _mm256_set1_epi32(static_cast<int>(draw.step_word));
      c[2][g] = _mm256_set1_epi32(static_cast<int>(draw.index_word));
      c[3][g] = _mm256_set1_epi32(static_cast<int>(draw.epoch_word));
    }
    uint32_t key0 = draw.key0, key1 = draw.key1;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m256i k0 = _mm256_set1_epi32(static_cast<int>(key0)), k1 = _mm256_set1_epi32(static_cast<int>(key1));
      for (int g = 0; g < kGroups; ++g) {
        const __m256i product0 = _mm256_mul_epu32(c[0][g], multiplier0);
        const __m256i product1 = _mm256_mul_epu32(c[2][g], multiplier1);
        c[0][g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c[1][g]), k0);
        c[2][g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c[3][g]), k1);
        c[1][g] = product1;
        c[3][g] = product0;
      }
      key0 += kPhiloxIncrement0;
      key1 += kPhiloxIncrement1;
    }
    for (int k = 0; k < 4; ++k) {
      const __m256i packed = _mm256_blend_epi32(c[k][0], _mm256_slli_epi64(c[k][1], 32), 0xAA);
      _mm256_store_si256(reinterpret_cast<__m256i*>(&words.v[k][q]), packed);
    }
  }
}

DENSEGRPO_AVX512 inline void tile_words_avx512(const Draw& draw, uint32_t first, TileWords& words) {
  constexpr int kGroups = 4, kStride = 8 * kGroups;
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  const __m512i even = _mm512_setr_epi32(0, 0, 2, 0, 4, 0, 6, 0, 8, 0, 10, 0, 12, 0, 14, 0);
  const __m512i odd = _mm512_setr_epi32(1, 0, 3, 0, 5, 0, 7, 0, 9, 0, 11, 0, 13, 0, 15, 0);
  for (int q = 0; q < kQuads; q += kStride) {
    __m512i c[4][kGroups];
    for (int g = 0; g < kGroups; ++g) {
      const uint32_t n = first + static_cast<uint32_t>(q + g / 2 * 16);
      c[0][g] = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(n)), g % 2 ? odd : even);
      c[1][g] = _mm512_set1_epi32(static_cast<int>(draw.step_word));
      c[2][g] = _mm512_set1_epi32(static_cast<int>(draw.index_word));
      c[3][g] = _mm512_set1_epi32(static_cast<int>(draw.epoch_word));
    }
    uint32_t key0 = draw.key0, key1 = draw.key1;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m512i k0 = _mm512_set1_epi32(static_cast<int>(key0)), k1 = _mm512_set1_epi32(static_cast<int>(key1));
      for (int g = 0; g < kGroups; ++g) {
        const __m512i product0 = _mm512_mul_epu32(c[0][g], multiplier0);
        const __m512i product1 = _mm512_mul_epu32(c[2][g], multiplier1);
        // 0x96 is the exclusive or of three.
        c[0][g] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(product1, 32), c[1][g], k0, 0x96);
        c[2][g] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(product0, 32), c[3][g], k1, 0x96);
        c[1][g] = product1;
        c[3][g] = product0;
      }
      key0 += kPhiloxIncrement0;
      key1 += kPhiloxIncrement1;
    }
    for (int k = 0; k < 4; ++k) {
      for (int g = 0; g < kGroups; g += 2) {
        const __m512i packed = _mm512_mask_blend_epi32(0xAAAA, c[k][g], _mm512_slli_epi64(c[k][g + 1], 32));
        _mm512_store_si512(&words.v[k][q + g * 8], packed);
      }
    }
  }
}

#endif

// The normals of elements 4*first ... 4*first + kTile - 1 of one sample.
template <int kVariant>
DENSEGRPO_INLINE void draw_tile(const Draw& draw, uint32_t first, float* __restrict noise) {
  TileWords words;
#if DENSEGRPO_X86
  if constexpr (kVariant == kAvx512) {
    tile_words_avx512(draw, first, words);
  } else if constexpr (kVariant == kAvx2) {
    tile_words_avx2(draw, first, words);
  } else {
    tile_words_portable(draw, first, words);
  }
#else
  tile_words_portable(draw, first, words);
#endif
  alignas(64) float normals[4][kQuads];
  for (int pair = 0; pair < 4; pair += 2)
    for (int q = 0; q < kQuads; ++q)
      box_muller(words.v[pair][q], words.v[pair + 1][q], &normals[pair][q], &normals[pair + 1][q]);
  for (int q = 0; q < kQuads; ++q)
    for (int k = 0; k < 4; ++k) noise[4 * q + k] = normals[k][q];
}

}  // namespace densegrpo
