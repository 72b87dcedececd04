// Log-probability of a stored transition on a CUDA device, and its gradient with respect to the velocity.
//
//   residual = next - (A*latents + B*velocity)
//   log_prob = -scale*mean_el(residual^2) + const;   grad_velocity = (grad*(2/elements)*scale*B) * residual
//
// The sums have the shape of sde_step.cu: a transition that it stored gets the log_prob that it returned.
#include "step.cuh"

namespace densegrpo {
namespace {

template <bool kVector, class L, class V>
__global__ void __launch_bounds__(kThreads)
    sde_log_prob_kernel(Launch launch, const L* __restrict__ latents, const V* __restrict__ velocity,
                        const L* __restrict__ next, double* __restrict__ partial) {
  const Place at = place(launch);
  const float a = coefficient(launch, at.row, kA), b = coefficient(launch, at.row, kB);
  float sum = 0.0f;
#pragma unroll
  for (int turn = 0; turn < kQuadsPerThread; ++turn) {
    const int64_t index = at.begin + 4 * (turn * kThreads + static_cast<int>(threadIdx.x));
    if (index >= launch.elements) break;
    const int64_t count = launch.elements - index;
    float x[4], v[4], y[4];
    load<kVector>(latents + at.offset + index, count, x);
    load<kVector>(velocity + at.offset + index, count, v);
    load<kVector>(next + at.offset + index, count, y);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float residual = y[k] - step_mean(a, x[k], b, v[k]);
      if (kVector || k < count) sum += residual * residual;
    }
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

template <bool kVector, class L, class V>
__global__ void __launch_bounds__(kThreads)
    sde_log_prob_backward_kernel(Launch launch, float mean_weight, const float* __restrict__ grad,
                                 const L* __restrict__ latents, const V* __restrict__ velocity,
                                 const L* __restrict__ next, V* __restrict__ grad_velocity) {
  const Place at = place(launch);
  const float a = coefficient(launch, at.row, kA), b = coefficient(launch, at.row, kB);
  const float factor = grad[at.row] * mean_weight * coefficient(launch, at.row, kLogProbScale) * b;
#pragma unroll
  for (int turn = 0; turn < kQuadsPerThread; ++turn) {
    const int64_t index = at.begin + 4 * (turn * kThreads + static_cast<int>(threadIdx.x));
    if (index >= launch.elements) break;
    const int64_t count = launch.elements - index;
    float x[4], v[4], y[4];
    load<kVector>(latents + at.offset + index, count, x);
    load<kVector>(velocity + at.offset + index, count, v);
    load<kVector>(next + at.offset + index, count, y);
    Quad<V> gradient;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      gradient.v[k] = from_float<V>(factor * (y[k] - step_mean(a, x[k], b, v[k])));
    store<kVector>(grad_velocity + at.offset + index, count, gradient);
  }
}

}  // namespace
}  // namespace densegrpo

// latents, velocity, next: [batch, elements] of the dtypes 0 float32, 1 float16, 2 bfloat16 (step.cuh lists the pairs;
// next has that of latents); table: [steps, 6]; step_index: [batch]; partial: [batch, blocks] scratch, see
// densegrpo_cuda_block; log_prob: [batch]. All contiguous on one device. Launches on `stream_handle` and returns at
// once, with 0 or a CUDA error.
DENSEGRPO_API int32_t densegrpo_cuda_sde_log_prob(int32_t device, void* stream_handle, int32_t latents_dtype,
                                                  int32_t velocity_dtype, const void* latents, const void* velocity,
                                                  const void* next, const float* table, const int64_t* step_index,
                                                  int64_t steps, int64_t batch, int64_t elements, double* partial,
                                                  float* log_prob) {
  using namespace densegrpo;
  const Launch launch = make_launch(table, step_index, steps, elements);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream_handle);
  if (const cudaError_t error = select_device(device)) return error;
  const bool vector = aligned(latents, latents_dtype, elements) && aligned(velocity, velocity_dtype, elements) &&
                      aligned(next, latents_dtype, elements);
  const bool known = for_types(latents_dtype, velocity_dtype, vector, [&](auto l, auto v, auto quads) {
    using L = decltype(l);
    using V = decltype(v);
    const unsigned grid = static_cast<unsigned>(batch * launch.blocks);
    sde_log_prob_kernel<quads.value, L, V><<<grid, kThreads, 0, queue>>>(
        launch, static_cast<const L*>(latents), static_cast<const V*>(velocity), static_cast<const L*>(next), partial);
  });
  if (!known) return cudaErrorInvalidValue;
  if (const cudaError_t error = cudaGetLastError()) return error;
  finish_log_prob<<<static_cast<unsigned>(batch), kWarp, 0, queue>>>(launch, partial, log_prob);
  return cudaGetLastError();
}

// grad: [batch], what arrives at log_prob; grad_velocity: [batch, elements] of velocity's dtype; the rest as above.
DENSEGRPO_API int32_t densegrpo_cuda_sde_log_prob_backward(int32_t device, void* stream_handle, int32_t latents_dtype,
                                                           int32_t velocity_dtype, const float* grad,
                                                           const void* latents, const void* velocity, const void* next,
                                                           const float* table, const int64_t* step_index,
                                                           int64_t steps, int64_t batch, int64_t elements,
                                                           void* grad_velocity) {
  using namespace densegrpo;
  const Launch launch = make_launch(table, step_index, steps, elements);
  const float mean_weight = static_cast<float>(2.0 / static_cast<double>(elements));
  const cudaStream_t queue = static_cast<cudaStream_t>(stream_handle);
  if (const cudaError_t error = select_device(device)) return error;
  const bool vector = aligned(latents, latents_dtype, elements) && aligned(velocity, velocity_dtype, elements) &&
                      aligned(next, latents_dtype, elements) && aligned(grad_velocity, velocity_dtype, elements);
  const bool known = for_types(latents_dtype, velocity_dtype, vector, [&](auto l, auto v, auto quads) {
    using L = decltype(l);
    using V = decltype(v);
    const unsigned grid = static_cast<unsigned>(batch * launch.blocks);
    sde_log_prob_backward_kernel<quads.value, L, V><<<grid, kThreads, 0, queue>>>(
        launch, mean_weight, grad, static_cast<const L*>(latents), static_cast<const V*>(velocity),
        static_cast<const L*>(next), static_cast<V*>(grad_velocity));
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}
