// One stochastic step of the flow on the CPU: noise, state and log-probability in a single pass over memory.
//
//   mean = A*latents + B*velocity;  next = mean + C*noise;  log_prob = -scale*mean_el((next-mean)^2) + const
//
// Reads 8 and writes 4 bytes per element; guidance reads 4 more; the mean takes 4 more, and a copy of the state in half
// precision, as a model in half precision reads it, 2. The element arithmetic is that of flow/reference.py, operation
// for operation.
#include <new>

#include "blocks.h"
#include "half.h"

namespace densegrpo {
namespace {

enum Half : int32_t { kNoHalf, kFloat16, kBFloat16 };

struct SdeStep {
  const float *latents, *rows;
  Velocities velocity;
  const int64_t *step_index, *sample_index, *seed, *iteration;
  int32_t stream;
  Half half;
  int64_t elements;
  float *next, *mean;  // mean and input: null unless asked for
  uint16_t* input;

  template <int kVariant>
  DENSEGRPO_INLINE_MEMBER Sums block(int64_t row, int64_t begin, int64_t end) const {
    return velocity.uncond != nullptr ? step<kVariant, true>(row, begin, end) : step<kVariant, false>(row, begin, end);
  }

  template <int kVariant, bool kGuided>
  DENSEGRPO_INLINE_MEMBER Sums step(int64_t row, int64_t begin, int64_t end) const {
    const float* coefficient = rows + row * kColumns;
    const float a = coefficient[kA], b = coefficient[kB], c = coefficient[kC];
    const Draw draw = make_draw(step_index[row], stream, sample_index[row], *iteration, *seed);
    alignas(64) float noise[kTile] = {};
    alignas(64) float square[kTile], means[kTile];
    LaneSum sum;
    for (int64_t tile = begin; tile < end; tile += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, end - tile));
      if (c != 0.0f) draw_tile<kVariant>(draw, static_cast<uint32_t>(tile / 4), noise);
      const int64_t first = row * elements + tile;
      const float* __restrict x = latents + first;
      const RowVelocity<kGuided> v = velocity.from<kGuided>(row, elements, tile);
      float* __restrict y = next + first;
      for (int i = 0; i < count; ++i) {
        means[i] = a * x[i] + b * v[i];
        const float state = means[i] + c * noise[i];
        const float residual = state - means[i];
        y[i] = state;
        square[i] = residual * residual;
      }
      for (int i = count; i < kTile; ++i) square[i] = 0.0f;
      sum.add_tile(square);
      // The tile is still in the cache.
      if (mean != nullptr) std::copy(means, means + count, mean + first);
      if (half == kFloat16)
        for (int i = 0; i < count; ++i) input[first + i] = to_float16(y[i]);
      if (half == kBFloat16)
        for (int i = 0; i < count; ++i) input[first + i] = to_bfloat16(y[i]);
    }
    return {sum.total(), 0.0};
  }
};

}  // namespace
}  // namespace densegrpo

// out[4] = Philox4x32-10(counter[4], key[2]); for the known-answer tests.
DENSEGRPO_API void densegrpo_philox4x32(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const densegrpo::Words words =
      densegrpo::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  std::copy(words.v, words.v + 4, out);
}

// cosine[i], sine[i] = the pair of normals of radius_words[i] and turn_words[i]; for the tests of their accuracy.
DENSEGRPO_API void densegrpo_box_muller(const uint32_t* radius_words, const uint32_t* turn_words, int64_t count,
                                        float* cosine, float* sine) {
  for (int64_t i = 0; i < count; ++i)
    densegrpo::box_muller(radius_words[i], turn_words[i], cosine + i, sine + i);
}

// latents, velocity, next: [batch, elements]; uncond, guidance ([batch]): null without guidance; rows: [batch, 6], the
// coefficients of each sample; step_index and sample_index: [batch]; seed and iteration: one value; half: 0 none, 1
// float16, 2 bfloat16, the type of `input`; log_prob: [batch]; mean, input: [batch, elements], null unless asked for,
// A*latents + B*velocity and `next` in half precision. All contiguous.
// Returns 0, or 1 when there was no memory (outputs are then undefined).
DENSEGRPO_API int32_t densegrpo_sde_step_f32(const float* latents, const float* velocity, const float* uncond,
                                             const float* guidance, const float* rows, const int64_t* step_index,
                                             const int64_t* sample_index, const int64_t* seed, const int64_t* iteration,
                                             int32_t stream, int32_t half, int64_t batch, int64_t elements,
                                             int32_t threads, float* next, float* log_prob, uint16_t* input,
                                             float* mean) {
  using namespace densegrpo;
  constexpr int64_t kPerThread = 1 << 15;
  const SdeStep body = {latents, rows, {velocity, uncond, guidance}, step_index, sample_index, seed, iteration, stream,
                        static_cast<Half>(half), elements, next, mean, input};
  try {
    const std::vector<Sums> sums = for_blocks(body, batch, elements, threads, kPerThread);
    for (int64_t row = 0; row < batch; ++row)
      log_prob[row] = log_prob_of(sums[static_cast<size_t>(row)].residual, elements, rows + row * kColumns);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
