// Log-probability of a stored transition on the CPU, and its gradient with respect to the velocity.
//
//   residual = next - (A*latents + B*velocity)
//   log_prob = -scale*mean_el(residual^2) + const;   grad_velocity = (grad*(2/elements)*scale*B) * residual
//
// The forward pass reads 12 bytes per element; the backward pass computes the residual again and writes 4 more. The
// sums have the shape of sde_step.cpp, so a transition that it stored gets the log_prob that it returned, bit for bit.
#include <new>

#include "blocks.h"

namespace densegrpo {
namespace {

struct Transition {
  const float *latents, *velocity, *next, *rows;
  int64_t elements;
};

struct LogProb {
  Transition of;

  template <int kVariant>
  DENSEGRPO_INLINE_MEMBER double block(int64_t row, int64_t begin, int64_t end) const {
    const float a = of.rows[row * kColumns + kA], b = of.rows[row * kColumns + kB];
    alignas(64) float square[kTile];
    LaneSum sum;
    for (int64_t tile = begin; tile < end; tile += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, end - tile));
      const float* __restrict x = of.latents + row * of.elements + tile;
      const float* __restrict v = of.velocity + row * of.elements + tile;
      const float* __restrict y = of.next + row * of.elements + tile;
      for (int i = 0; i < count; ++i) {
        const float residual = y[i] - (a * x[i] + b * v[i]);
        square[i] = residual * residual;
      }
      for (int i = count; i < kTile; ++i) square[i] = 0.0f;
      sum.add_tile(square);
    }
    return sum.total();
  }
};

struct LogProbGrad {
  Transition of;
  const float* grad;
  float* grad_velocity;

  template <int kVariant>
  DENSEGRPO_INLINE_MEMBER double block(int64_t row, int64_t begin, int64_t end) const {
    const float* coefficient = of.rows + row * kColumns;
    const float a = coefficient[kA], b = coefficient[kB];
    const float mean_weight = static_cast<float>(2.0 / static_cast<double>(of.elements));
    const float factor = grad[row] * mean_weight * coefficient[kLogProbScale] * b;
    const float* __restrict x = of.latents + row * of.elements;
    const float* __restrict v = of.velocity + row * of.elements;
    const float* __restrict y = of.next + row * of.elements;
    float* __restrict out = grad_velocity + row * of.elements;
    for (int64_t i = begin; i < end; ++i) out[i] = factor * (y[i] - (a * x[i] + b * v[i]));
    return 0.0;
  }
};

constexpr int64_t kPerThread = 1 << 17;

}  // namespace
}  // namespace densegrpo

// latents, velocity, next: [batch, elements]; rows: [batch, 6], the coefficients of each sample; log_prob: [batch].
// All contiguous. Returns 0, or 1 when there was no memory (outputs are then undefined).
DENSEGRPO_API int32_t densegrpo_sde_log_prob_f32(const float* latents, const float* velocity, const float* next,
                                                 const float* rows, int64_t batch, int64_t elements, int32_t threads,
                                                 float* log_prob) {
  const densegrpo::LogProb body = {{latents, velocity, next, rows, elements}};
  try {
    const std::vector<double> sums = densegrpo::for_blocks(body, batch, elements, threads, densegrpo::kPerThread);
    for (int64_t row = 0; row < batch; ++row)
      log_prob[row] =
          densegrpo::log_prob_of(sums[static_cast<size_t>(row)], elements, rows + row * densegrpo::kColumns);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

// grad: [batch], what arrives at log_prob; grad_velocity: [batch, elements]; the rest and the result as above.
DENSEGRPO_API int32_t densegrpo_sde_log_prob_backward_f32(const float* grad, const float* latents,
                                                          const float* velocity, const float* next,
                                                          const float* rows, int64_t batch, int64_t elements,
                                                          int32_t threads, float* grad_velocity) {
  const densegrpo::LogProbGrad body = {{latents, velocity, next, rows, elements}, grad, grad_velocity};
  try {
    densegrpo::for_blocks(body, batch, elements, threads, densegrpo::kPerThread);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
