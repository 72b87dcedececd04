// Work in blocks of elements of one row, spread over threads, with sums that do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

#include "philox_tile.h"

namespace densegrpo {

constexpr int64_t kBlock = 4096;  // elements per partial sum, a multiple of kTile; part of the numerics
constexpr int kLanes = 16;        // independent double accumulators

enum Column { kA, kB, kC, kStdDev, kLogProbScale, kLogProbConst, kColumns };

// The sum of a block: four floats are added as a tree, then go to a double accumulator.
struct LaneSum {
  double lanes[kLanes] = {};

  DENSEGRPO_INLINE_MEMBER void add_tile(const float* __restrict values) {
    alignas(64) float four[kQuads];
    for (int q = 0; q < kQuads; ++q)
      four[q] = (values[q] + values[q + kQuads]) + (values[q + 2 * kQuads] + values[q + 3 * kQuads]);
    for (int q = 0; q < kQuads; q += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += four[q + lane];
  }

  DENSEGRPO_INLINE_MEMBER double total() const {
    double sum = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
  }
};

// The velocity of a row: as given, or guided, uncond + scale*(velocity - uncond), when there is an unconditional one.
template <bool kGuided>
struct RowVelocity {
  const float* __restrict cond;
  const float* __restrict uncond;
  float scale;

  DENSEGRPO_INLINE_MEMBER float operator[](int64_t i) const {
    if constexpr (kGuided) return uncond[i] + scale * (cond[i] - uncond[i]);
    return cond[i];
  }
};

// Velocities of a batch, [batch, elements]; uncond and scale ([batch]) are null without guidance.
struct Velocities {
  const float *cond, *uncond, *scale;

  template <bool kGuided>
  DENSEGRPO_INLINE_MEMBER RowVelocity<kGuided> from(int64_t row, int64_t elements, int64_t first) const {
    const int64_t start = row * elements + first;
    if constexpr (kGuided) return {cond + start, uncond + start, scale[row]};
    return {cond + start, nullptr, 0.0f};
  }
};

// log_prob of a row from the sum of its squared residuals.
inline float log_prob_of(double sum, int64_t elements, const float* row) {
  return static_cast<float>(-static_cast<double>(row[kLogProbScale]) * (sum / static_cast<double>(elements)) +
                            static_cast<double>(row[kLogProbConst]));
}

// Runs body.block on every block of every row and returns the sums of its results per row.
//
// per_thread: elements that repay starting a thread. No thread outlives the call. Throws std::bad_alloc.
template <class Body>
std::vector<Sums> for_blocks(const Body& body, int64_t batch, int64_t elements, int32_t threads, int64_t per_thread) {
  const int64_t blocks = (elements + kBlock - 1) / kBlock, units = batch * blocks;
  const BlockFunction<Body> block = block_function<Body>();
  std::vector<Sums> sums(static_cast<size_t>(batch)), partial(static_cast<size_t>(units));
  const auto work = [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t begin = unit % blocks * kBlock;
      partial[static_cast<size_t>(unit)] = block(body, unit / blocks, begin, std::min(begin + kBlock, elements));
    }
  };
  const int64_t useful = std::min<int64_t>(units, batch * elements / per_thread);
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, useful));
  std::vector<std::thread> pool;
  pool.reserve(static_cast<size_t>(workers - 1));
  int64_t rest = units;
  try {
    for (int64_t w = workers - 1; w >= 1; --w) {
      pool.emplace_back(work, units * w / workers, rest);
      rest = units * w / workers;
    }
  } catch (const std::exception&) {
    // No more threads to be had: the calling one does all that is left.
  }
  work(0, rest);
  for (std::thread& thread : pool) thread.join();
  for (int64_t unit = 0; unit < units; ++unit) {
    sums[static_cast<size_t>(unit / blocks)].residual += partial[static_cast<size_t>(unit)].residual;
    sums[static_cast<size_t>(unit / blocks)].distance += partial[static_cast<size_t>(unit)].distance;
  }
  return sums;
}

}  // namespace densegrpo
