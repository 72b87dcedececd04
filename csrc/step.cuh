// What the CUDA kernels share: coefficients, loads and stores of four elements, and sums of a fixed shape.
//
// A thread block owns kBlock consecutive elements of one row and adds them up in an order that no GPU changes, so that
// results do not depend on the device, the batch or the launch. Nothing here reads device memory on the host or
// allocates, so that every call may be captured in a CUDA graph.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "philox.h"

namespace densegrpo {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kQuadsPerThread = 4;
constexpr int64_t kBlock = 4 * kQuadsPerThread * kThreads;  // elements of one thread block; part of the numerics

enum Column { kA, kB, kC, kStdDev, kLogProbScale, kLogProbConst, kColumns };
enum Dtype : int32_t { kFloat32, kFloat16, kBFloat16 };

// The arguments that every kernel takes. table: [steps, 6]; step_index: [batch]; blocks: thread blocks per row.
struct Launch {
  const float* table;
  const int64_t* step_index;
  int64_t steps, elements;
  unsigned blocks;
};

inline Launch make_launch(const float* table, const int64_t* step_index, int64_t steps, int64_t elements) {
  return {table, step_index, steps, elements, static_cast<unsigned>((elements + kBlock - 1) / kBlock)};
}

// Makes a device the current one. A failure is taken here, or the next launch that succeeds would report it.
inline cudaError_t select_device(int32_t device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// What a thread block works on: the elements of a row from `begin` on; the row starts at `offset`.
struct Place {
  int64_t row, offset, begin;
};

__device__ __forceinline__ Place place(const Launch& launch) {
  const int64_t row = blockIdx.x / launch.blocks;
  return {row, row * launch.elements, blockIdx.x % launch.blocks * kBlock};
}

// A step outside the table cannot be reported without a host sync; it makes the whole row NaN.
__device__ __forceinline__ float coefficient(const Launch& launch, int64_t row, Column column) {
  const int64_t step = launch.step_index[row];
  return step < 0 || step >= launch.steps ? __int_as_float(0x7FC00000) : launch.table[step * kColumns + column];
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float(float value) { return value; }
template <>
__device__ __forceinline__ __half from_float(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float value) { return __float2bfloat16_rn(value); }

// Four elements, and the word that moves them at once.
template <class T>
struct Quad {
  T v[4];
};
template <class T>
using QuadWord = typename std::conditional<sizeof(T) == 4, uint4, uint2>::type;

// In assembly, because the compiler takes an assignment apart into stores of one element.
__device__ __forceinline__ void store_word(uint4* to, uint4 word) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}
__device__ __forceinline__ void store_word(uint2* to, uint2 word) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(word.x), "r"(word.y) : "memory");
}

// Whether four elements may be moved at once: every row starts at a multiple of four elements.
inline bool aligned(const void* pointer, int32_t dtype, int64_t elements) {
  const uintptr_t bytes = dtype == kFloat32 ? sizeof(QuadWord<float>) : sizeof(QuadWord<__half>);
  return elements % 4 == 0 && reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Four elements from `from` on. Unless kVector, only the first `count` are there, and the others become 0.
template <bool kVector, class T>
__device__ __forceinline__ void load(const T* from, int64_t count, float (&out)[4]) {
  Quad<T> quad;
  if constexpr (kVector) {
    const QuadWord<T> word = *reinterpret_cast<const QuadWord<T>*>(from);
    memcpy(&quad, &word, sizeof quad);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) quad.v[k] = k < count ? from[k] : from_float<T>(0.0f);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) out[k] = to_float(quad.v[k]);
}

template <bool kVector, class T>
__device__ __forceinline__ void store(T* to, int64_t count, const Quad<T>& quad) {
  if constexpr (kVector) {
    QuadWord<T> word;
    memcpy(&word, &quad, sizeof word);
    store_word(reinterpret_cast<QuadWord<T>*>(to), word);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < count) to[k] = quad.v[k];
  }
}

// A*latents + B*velocity without contraction: every kernel, and PyTorch, get the same bits.
__device__ __forceinline__ float step_mean(float a, float latent, float b, float velocity) {
  return __fadd_rn(__fmul_rn(a, latent), __fmul_rn(b, velocity));
}

// Sum over the thread block, in thread 0.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warps[kThreads / kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_down_sync(0xFFFFFFFFu, value, distance);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += warps[warp];
  return sum;
}

// log_prob of every row from the sums of its blocks; one warp per row. partial: [batch, blocks].
static __global__ void finish_log_prob(Launch launch, const double* __restrict__ partial,
                                       float* __restrict__ log_prob) {
  const int64_t row = blockIdx.x;
  double sum = 0.0;
  for (unsigned block = threadIdx.x; block < launch.blocks; block += kWarp) sum += partial[row * launch.blocks + block];
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    sum += __shfl_down_sync(0xFFFFFFFFu, sum, distance);
  if (threadIdx.x == 0) {
    const double scale = coefficient(launch, row, kLogProbScale), constant = coefficient(launch, row, kLogProbConst);
    log_prob[row] = static_cast<float>(-scale * (sum / static_cast<double>(launch.elements)) + constant);
  }
}

// Calls function(latents_type(), velocity_type(), std::bool_constant<vector>()) for the pairs of types that are
// compiled: float32 latents with any velocity, or both in the same half precision. Returns whether there was one.
template <class Function>
bool for_types(int32_t latents_dtype, int32_t velocity_dtype, bool vector, const Function& function) {
  const auto call = [&](auto latents, auto velocity) {
    if (vector) function(latents, velocity, std::true_type());
    else function(latents, velocity, std::false_type());
    return true;
  };
  if (latents_dtype == kFloat32 && velocity_dtype == kFloat32) return call(float(), float());
  if (latents_dtype == kFloat32 && velocity_dtype == kFloat16) return call(float(), __half());
  if (latents_dtype == kFloat32 && velocity_dtype == kBFloat16) return call(float(), __nv_bfloat16());
  if (latents_dtype == kFloat16 && velocity_dtype == kFloat16) return call(__half(), __half());
  if (latents_dtype == kBFloat16 && velocity_dtype == kBFloat16) return call(__nv_bfloat16(), __nv_bfloat16());
  return false;
}

}  // namespace densegrpo
