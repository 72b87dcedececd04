// Clipped policy loss with a KL penalty, its metrics and its gradient on the CPU, in one pass over the rows.
//
//   log_ratio = (log_prob - old_log_prob + bias)*scale;  ratio = exp(log_ratio)
//   loss      = mean(weight*max(-A*ratio, -A*clamp(ratio, 1-clip, 1+clip))) + kl_coef*mean(kl)
//   grad      = weight*(-A*ratio*scale)/rows, and 0 where the clipped branch is the larger one
//
// One number per row of a batch: a single thread, double arithmetic.
#include <cmath>

#include "platform.h"

namespace {

// The value within the bounds; NaN stays.
inline double clamp(double value, double lowest, double highest) {
  return value < lowest ? lowest : value > highest ? highest : value;
}

}  // namespace

// The seven inputs and grad: [rows]; kl, scale, bias and weight may be null, for 0, 1, 0 and 1; loss: [1]; metrics: [5],
// the policy loss, the mean kl, the share of rows with |ratio-1| > clip, mean((ratio-1) - log_ratio), max |ratio-1|. The
// integers after `rows` are those of every op here and mean nothing to this one. Returns 0.
DENSEGRPO_API int32_t densegrpo_grpo_loss_f32(const float* log_prob, const float* old_log_prob, const float* advantages,
                                              const float* kl, const float* scale, const float* bias,
                                              const float* weight, double clip, double kl_coef, int64_t rows, int64_t,
                                              int32_t, float* loss, float* metrics, float* grad) {
  const double count = static_cast<double>(rows);
  double policy = 0.0, divergence = 0.0, outside = 0.0, old_divergence = 0.0, furthest = 0.0;
  for (int64_t i = 0; i < rows; ++i) {
    const double slope = scale == nullptr ? 1.0 : scale[i], weighed = weight == nullptr ? 1.0 : weight[i];
    const double change = static_cast<double>(log_prob[i]) - static_cast<double>(old_log_prob[i]);
    const double log_ratio = (change + (bias == nullptr ? 0.0 : static_cast<double>(bias[i]))) * slope;
    const double excess = std::expm1(log_ratio), ratio = 1.0 + excess, deviation = std::fabs(excess);
    const double descent = -static_cast<double>(advantages[i]);
    const double unclipped = descent * ratio, clipped = descent * clamp(ratio, 1.0 - clip, 1.0 + clip);
    // Comparisons that NaN makes false, so that it goes on to the loss and to the metrics.
    const bool is_clipped = clipped > unclipped;
    policy += weighed * (is_clipped ? clipped : unclipped);
    grad[i] = static_cast<float>(is_clipped ? 0.0 * weighed : weighed * unclipped * slope / count);
    divergence += kl == nullptr ? 0.0 : static_cast<double>(kl[i]);
    outside += deviation > clip ? 1.0 : 0.0;
    old_divergence += excess - log_ratio;
    if (deviation > furthest || std::isnan(deviation)) furthest = deviation;  // nothing exceeds a NaN
  }
  const double policy_loss = policy / count, mean_kl = divergence / count;
  *loss = static_cast<float>(policy_loss + kl_coef * mean_kl);
  metrics[0] = static_cast<float>(policy_loss);
  metrics[1] = static_cast<float>(mean_kl);
  metrics[2] = static_cast<float>(outside / count);
  metrics[3] = static_cast<float>(old_divergence / count);
  metrics[4] = static_cast<float>(furthest);
  return 0;
}
