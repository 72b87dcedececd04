// One stochastic step of the flow on a CUDA device: noise, state and the sums for its log-probability in one pass.
//
//   mean = A*latents + B*velocity;  next = mean + C*noise;  log_prob = -scale*mean_el((next-mean)^2) + const
//
// One thread draws the four normals of a counter and steps their four elements. log_prob is that of `next` as stored,
// after rounding to its type; a second, tiny kernel adds up the thread blocks of each row.
#include "step.cuh"

namespace densegrpo {
namespace {

struct Noise {
  const int64_t *seed, *sample_index, *iteration;
  int32_t stream;
};

template <bool kVector, class L, class V>
__global__ void __launch_bounds__(kThreads)
    sde_step_kernel(Launch launch, Noise noise, const L* __restrict__ latents, const V* __restrict__ velocity,
                    L* __restrict__ next, double* __restrict__ partial) {
  const Place at = place(launch);
  const float a = coefficient(launch, at.row, kA), b = coefficient(launch, at.row, kB);
  const float c = coefficient(launch, at.row, kC);
  const Draw draw =
      make_draw(launch.step_index[at.row], noise.stream, noise.sample_index[at.row], *noise.iteration, *noise.seed);
  float sum = 0.0f;
#pragma unroll 1
  for (int turn = 0; turn < kQuadsPerThread; ++turn) {
    const int64_t index = at.begin + 4 * (turn * kThreads + static_cast<int>(threadIdx.x));
    if (index >= launch.elements) break;
    const int64_t count = launch.elements - index;
    float x[4], v[4], z[4] = {};
    load<kVector>(latents + at.offset + index, count, x);
    load<kVector>(velocity + at.offset + index, count, v);
    if (c != 0.0f) {
      const Words counter = {{static_cast<uint32_t>(index / 4), draw.step_word, draw.index_word, draw.epoch_word}};
      const Words words = philox4x32(counter, draw.key0, draw.key1);
      box_muller(words.v[0], words.v[1], &z[0], &z[1]);
      box_muller(words.v[2], words.v[3], &z[2], &z[3]);
    }
    Quad<L> states;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float mean = step_mean(a, x[k], b, v[k]);
      states.v[k] = from_float<L>(__fadd_rn(mean, __fmul_rn(c, z[k])));
      const float residual = to_float(states.v[k]) - mean;
      if (kVector || k < count) sum += residual * residual;
    }
    store<kVector>(next + at.offset + index, count, states);
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

}  // namespace
}  // namespace densegrpo

// Version of this interface; native_cuda.py refuses a library of another one.
DENSEGRPO_API int32_t densegrpo_cuda_abi_version() { return 1; }

// What a nonzero result of the functions here and in sde_log_prob.cu means.
DENSEGRPO_API const char* densegrpo_cuda_error(int32_t code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// Elements per partial sum: `partial` has ceil(elements / this) entries per row.
DENSEGRPO_API int64_t densegrpo_cuda_block() { return densegrpo::kBlock; }

// latents, velocity, next: [batch, elements] of the dtypes 0 float32, 1 float16, 2 bfloat16 (step.cuh lists the pairs;
// next has that of latents); table: [steps, 6]; step_index, sample_index: [batch]; seed, iteration: one value; partial:
// [batch, blocks] scratch; log_prob: [batch]. All contiguous on one device. Launches on `stream_handle` and returns
// at once, with 0 or a CUDA error.
DENSEGRPO_API int32_t densegrpo_cuda_sde_step(int32_t device, void* stream_handle, int32_t latents_dtype,
                                              int32_t velocity_dtype, const void* latents, const void* velocity,
                                              const float* table, const int64_t* step_index, const int64_t* seed,
                                              const int64_t* sample_index, const int64_t* iteration, int32_t stream,
                                              int64_t steps, int64_t batch, int64_t elements, void* next,
                                              double* partial, float* log_prob) {
  using namespace densegrpo;
  const Launch launch = make_launch(table, step_index, steps, elements);
  const Noise noise = {seed, sample_index, iteration, stream};
  const cudaStream_t queue = static_cast<cudaStream_t>(stream_handle);
  if (const cudaError_t error = select_device(device)) return error;
  const bool vector = aligned(latents, latents_dtype, elements) && aligned(velocity, velocity_dtype, elements) &&
                      aligned(next, latents_dtype, elements);
  const bool known = for_types(latents_dtype, velocity_dtype, vector, [&](auto l, auto v, auto quads) {
    using L = decltype(l);
    using V = decltype(v);
    const unsigned grid = static_cast<unsigned>(batch * launch.blocks);
    sde_step_kernel<quads.value, L, V><<<grid, kThreads, 0, queue>>>(
        launch, noise, static_cast<const L*>(latents), static_cast<const V*>(velocity), static_cast<L*>(next), partial);
  });
  if (!known) return cudaErrorInvalidValue;
  if (const cudaError_t error = cudaGetLastError()) return error;
  finish_log_prob<<<static_cast<unsigned>(batch), kWarp, 0, queue>>>(launch, partial, log_prob);
  return cudaGetLastError();
}
