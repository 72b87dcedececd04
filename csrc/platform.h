// What differs between compilers: exported names, inlining, and code for wider instruction sets than the build's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(_WIN32)
#define DENSEGRPO_API extern "C" __declspec(dllexport)
#else
#define DENSEGRPO_API extern "C" __attribute__((visibility("default")))
#endif

// Inlined whatever the instruction set of the caller, so that one body serves every variant; and device code for nvcc.
#if defined(__CUDACC__)
#define DENSEGRPO_INLINE static __host__ __device__ __forceinline__
#define DENSEGRPO_INLINE_MEMBER __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DENSEGRPO_INLINE static inline __attribute__((always_inline))
#define DENSEGRPO_INLINE_MEMBER inline __attribute__((always_inline))
#else
#define DENSEGRPO_INLINE static inline
#define DENSEGRPO_INLINE_MEMBER inline
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
#define DENSEGRPO_X86 1
#define DENSEGRPO_AVX2 __attribute__((target("avx2")))
#define DENSEGRPO_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define DENSEGRPO_X86 0
#endif

namespace densegrpo {

DENSEGRPO_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DENSEGRPO_INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace densegrpo
