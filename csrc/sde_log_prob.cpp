// Log-probability of a stored transition on the CPU, if asked with the divergence from a reference policy, and their
// gradients with respect to the velocity.
//
//   residual = next - (A*latents + B*velocity);  distance = velocity - reference
//   log_prob = -scale*mean_el(residual^2) + const
//   kl       = weight*mean_el(distance^2),  weight = B^2/(2*std^2), and 0 where C is 0
//   grad_velocity = (grad*(2/elements)*scale*B)*residual + (grad_kl*(2/elements)*weight)*distance
//
// With guidance, velocity and reference are uncond + guidance*(cond - uncond), and grad_velocity goes on to cond times
// guidance, to uncond times 1 - guidance. The forward pass reads each input once; the backward pass computes the
// residual again. The sums have the shape of sde_step.cpp, so a transition that it stored gets the log_prob that it
// returned, bit for bit.
#include <new>

#include "blocks.h"

namespace densegrpo {
namespace {

struct Transition {
  const float *latents, *next, *rows;
  Velocities velocity, reference;  // reference.cond is null without a divergence
  int64_t elements;
  Column kl_std;

  float kl_weight(int64_t row) const {
    const float* coefficient = rows + row * kColumns;
    if (!(coefficient[kC] > 0.0f)) return 0.0f;
    const float gain = coefficient[kB] / coefficient[kl_std];
    return gain * gain / 2.0f;
  }
};

struct LogProb {
  Transition of;

  template <int kVariant>
  DENSEGRPO_INLINE_MEMBER Sums block(int64_t row, int64_t begin, int64_t end) const {
    if (of.velocity.uncond != nullptr)
      return of.reference.cond != nullptr ? sums<true, true>(row, begin, end) : sums<true, false>(row, begin, end);
    return of.reference.cond != nullptr ? sums<false, true>(row, begin, end) : sums<false, false>(row, begin, end);
  }

  template <bool kGuided, bool kReference>
  DENSEGRPO_INLINE_MEMBER Sums sums(int64_t row, int64_t begin, int64_t end) const {
    const float a = of.rows[row * kColumns + kA], b = of.rows[row * kColumns + kB];
    alignas(64) float square[kTile], distance[kTile];
    LaneSum residuals, distances;
    for (int64_t tile = begin; tile < end; tile += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, end - tile));
      const float* __restrict x = of.latents + row * of.elements + tile;
      const float* __restrict y = of.next + row * of.elements + tile;
      const RowVelocity<kGuided> v = of.velocity.from<kGuided>(row, of.elements, tile);
      for (int i = 0; i < count; ++i) {
        const float residual = y[i] - (a * x[i] + b * v[i]);
        square[i] = residual * residual;
      }
      for (int i = count; i < kTile; ++i) square[i] = 0.0f;
      residuals.add_tile(square);
      if constexpr (kReference) {
        const RowVelocity<kGuided> r = of.reference.from<kGuided>(row, of.elements, tile);
        for (int i = 0; i < count; ++i) {
          const float difference = v[i] - r[i];
          distance[i] = difference * difference;
        }
        for (int i = count; i < kTile; ++i) distance[i] = 0.0f;
        distances.add_tile(distance);
      }
    }
    return {residuals.total(), distances.total()};
  }
};

struct LogProbGrad {
  Transition of;
  const float *grad, *grad_kl;
  float *grad_velocity, *grad_uncond;  // grad_uncond: null unless asked for

  template <int kVariant>
  DENSEGRPO_INLINE_MEMBER Sums block(int64_t row, int64_t begin, int64_t end) const {
    if (of.velocity.uncond != nullptr) {
      of.reference.cond != nullptr ? write<true, true>(row, begin, end) : write<true, false>(row, begin, end);
    } else {
      of.reference.cond != nullptr ? write<false, true>(row, begin, end) : write<false, false>(row, begin, end);
    }
    return {};
  }

  template <bool kGuided, bool kReference>
  DENSEGRPO_INLINE_MEMBER void write(int64_t row, int64_t begin, int64_t end) const {
    const float* coefficient = of.rows + row * kColumns;
    const float a = coefficient[kA], b = coefficient[kB];
    const float mean_weight = static_cast<float>(2.0 / static_cast<double>(of.elements));
    const float factor = grad[row] * mean_weight * coefficient[kLogProbScale] * b;
    const float* __restrict x = of.latents + row * of.elements;
    const float* __restrict y = of.next + row * of.elements;
    const RowVelocity<kGuided> v = of.velocity.from<kGuided>(row, of.elements, 0);
    float* __restrict out = grad_velocity + row * of.elements;
    if constexpr (kReference) {
      const RowVelocity<kGuided> r = of.reference.from<kGuided>(row, of.elements, 0);
      const float pull = grad_kl[row] * mean_weight * of.kl_weight(row);
      for (int64_t i = begin; i < end; ++i)
        out[i] = factor * (y[i] - (a * x[i] + b * v[i])) + pull * (v[i] - r[i]);
    } else {
      for (int64_t i = begin; i < end; ++i) out[i] = factor * (y[i] - (a * x[i] + b * v[i]));
    }
    if constexpr (kGuided) {
      const float scale = of.velocity.scale[row];
      if (grad_uncond != nullptr) {
        float* __restrict other = grad_uncond + row * of.elements;
        for (int64_t i = begin; i < end; ++i) other[i] = (1.0f - scale) * out[i];
      }
      for (int64_t i = begin; i < end; ++i) out[i] = scale * out[i];
    }
  }
};

constexpr int64_t kPerThread = 1 << 17;

}  // namespace
}  // namespace densegrpo

// latents, velocity, next: [batch, elements]; uncond, guidance ([batch]): null without guidance; reference: null
// without a divergence; reference_uncond: as uncond; rows: [batch, 6], the coefficients of each sample; kl_std: the
// column of the divergence's standard deviation; log_prob, kl: [batch], kl null without a divergence. All contiguous.
// Returns 0, or 1 when there was no memory (outputs are then undefined).
DENSEGRPO_API int32_t densegrpo_sde_log_prob_f32(const float* latents, const float* velocity, const float* uncond,
                                                 const float* guidance, const float* reference,
                                                 const float* reference_uncond, const float* next, const float* rows,
                                                 int32_t kl_std, int64_t batch, int64_t elements, int32_t threads,
                                                 float* log_prob, float* kl) {
  using namespace densegrpo;
  const LogProb body = {{latents, next, rows, {velocity, uncond, guidance}, {reference, reference_uncond, guidance},
                         elements, static_cast<Column>(kl_std)}};
  try {
    const std::vector<Sums> sums = for_blocks(body, batch, elements, threads, kPerThread);
    for (int64_t row = 0; row < batch; ++row) {
      const Sums& own = sums[static_cast<size_t>(row)];
      log_prob[row] = log_prob_of(own.residual, elements, rows + row * kColumns);
      if (kl != nullptr)
        kl[row] = static_cast<float>(static_cast<double>(body.of.kl_weight(row)) *
                                     (own.distance / static_cast<double>(elements)));
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

// grad, grad_kl: [batch], what arrives at log_prob and kl; grad_velocity, grad_uncond: [batch, elements], the latter
// null unless asked for; the rest and the result as above.
DENSEGRPO_API int32_t densegrpo_sde_log_prob_backward_f32(
    const float* grad, const float* grad_kl, const float* latents, const float* velocity, const float* uncond,
    const float* guidance, const float* reference, const float* reference_uncond, const float* next, const float* rows,
    int32_t kl_std, int64_t batch, int64_t elements, int32_t threads, float* grad_velocity, float* grad_uncond) {
  using namespace densegrpo;
  const LogProbGrad body = {{latents, next, rows, {velocity, uncond, guidance},
                             {reference, reference_uncond, guidance}, elements, static_cast<Column>(kl_std)},
                            grad, grad_kl, grad_velocity, grad_uncond};
  try {
    for_blocks(body, batch, elements, threads, kPerThread);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
