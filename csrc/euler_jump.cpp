// Straight-line move between two noise levels on the CPU: next = latents + dt*velocity, dt per row.
//
// Reads 8 and writes 4 bytes per element.
#include <new>

#include "blocks.h"

namespace densegrpo {
namespace {

struct EulerJump {
  const float *latents, *velocity, *dt;
  int64_t elements;
  float* next;

  template <int kVariant>
  DENSEGRPO_INLINE_MEMBER Sums block(int64_t row, int64_t begin, int64_t end) const {
    const float step = dt[row];
    const float* __restrict x = latents + row * elements;
    const float* __restrict v = velocity + row * elements;
    float* __restrict y = next + row * elements;
    for (int64_t i = begin; i < end; ++i) y[i] = x[i] + step * v[i];
    return {};
  }
};

}  // namespace
}  // namespace densegrpo

// latents, velocity, next: [batch, elements]; dt: [batch]. All contiguous.
// Returns 0, or 1 when there was no memory (outputs are then undefined).
DENSEGRPO_API int32_t densegrpo_euler_jump_f32(const float* latents, const float* velocity, const float* dt,
                                               int64_t batch, int64_t elements, int32_t threads, float* next) {
  constexpr int64_t kPerThread = 1 << 17;
  try {
    densegrpo::for_blocks(densegrpo::EulerJump{latents, velocity, dt, elements, next}, batch, elements, threads,
                          kPerThread);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
