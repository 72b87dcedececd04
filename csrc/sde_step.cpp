// One stochastic step of the flow on the CPU: noise, state and log-probability in a single pass over memory.
//
//   mean = A*latents + B*velocity;  next = mean + C*noise;  log_prob = -scale*mean_el((next-mean)^2) + const
//
// Reads 8 and writes 4 bytes per element. Plain C interface, no torch headers (see README.md). The element arithmetic
// is that of flow/reference.py, operation for operation. Squares are summed in double over blocks of fixed size and
// then over blocks in order, so the result does not depend on the number of threads.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#include "philox.h"

#if defined(_WIN32)
#define DENSEGRPO_API extern "C" __declspec(dllexport)
#else
#define DENSEGRPO_API extern "C" __attribute__((visibility("default")))
#endif

// One build serves every x86 processor: the loader picks the widest clone the machine supports.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define DENSEGRPO_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define DENSEGRPO_CLONES
#endif

namespace {

constexpr int64_t kBlock = 4096;         // elements per partial sum; part of the numerics, do not tune per machine
constexpr int kQuads = 64;               // counters per tile, four elements each
constexpr int kTile = 4 * kQuads;        // elements per tile; divides kBlock
constexpr int kLanes = 16;               // independent double accumulators; divides kTile
constexpr int64_t kPerThread = 1 << 15;  // elements that repay starting a thread

enum Column { kA, kB, kC, kStdDev, kLogProbScale, kLogProbConst, kColumns };

struct Sample {
  const float* latents;
  const float* velocity;
  const float* row;
  float* next;
  uint32_t step_word, index_word, epoch_word, key0, key1;
};

DENSEGRPO_CLONES double step_block(const Sample& sample, int64_t begin, int64_t end) {
  const float a = sample.row[kA], b = sample.row[kB], c = sample.row[kC];
  alignas(64) float quad[4][kQuads];
  alignas(64) float noise[kTile] = {};
  alignas(64) float square[kTile];
  double lanes[kLanes] = {};
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, end - tile));
    if (c != 0.0f) {
      const uint32_t first = static_cast<uint32_t>(tile / 4);
      for (int q = 0; q < kQuads; ++q) {
        const densegrpo::Words counter = {
            {first + static_cast<uint32_t>(q), sample.step_word, sample.index_word, sample.epoch_word}};
        const densegrpo::Words r = densegrpo::philox4x32(counter, sample.key0, sample.key1);
        densegrpo::box_muller(r.v[0], r.v[1], &quad[0][q], &quad[1][q]);
        densegrpo::box_muller(r.v[2], r.v[3], &quad[2][q], &quad[3][q]);
      }
      for (int q = 0; q < kQuads; ++q)
        for (int k = 0; k < 4; ++k) noise[4 * q + k] = quad[k][q];
    }
    const float *x = sample.latents + tile, *v = sample.velocity + tile;
    float* next = sample.next + tile;
    for (int i = 0; i < count; ++i) {
      const float mean = a * x[i] + b * v[i];
      const float state = mean + c * noise[i];
      const float residual = state - mean;
      next[i] = state;
      square[i] = residual * residual;
    }
    for (int i = count; i < kTile; ++i) square[i] = 0.0f;
    for (int i = 0; i < kTile; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += square[i + lane];
  }
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

}  // namespace

// Version of this interface; native.py refuses a library of another one.
DENSEGRPO_API int32_t densegrpo_abi_version() { return 1; }

// out[4] = Philox4x32-10(counter[4], key[2]); for the known-answer tests.
DENSEGRPO_API void densegrpo_philox4x32(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const densegrpo::Words words =
      densegrpo::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  std::copy(words.v, words.v + 4, out);
}

// latents, velocity, next: [batch, elements]; rows: [batch, 6], the coefficients of each sample; step_index and
// sample_index: [batch]; seed and epoch: one value; log_prob: [batch]. All contiguous.
// Returns 0, or 1 when there was no memory (outputs are then undefined).
DENSEGRPO_API int32_t densegrpo_sde_step_f32(const float* latents, const float* velocity, const float* rows,
                                             const int64_t* step_index, const int64_t* sample_index,
                                             const int64_t* seed, const int64_t* epoch, int32_t stream,
                                             int64_t batch, int64_t elements, int32_t threads, float* next,
                                             float* log_prob) {
  const int64_t blocks = (elements + kBlock - 1) / kBlock, units = batch * blocks;
  const uint64_t key = static_cast<uint64_t>(*seed);
  try {
    std::vector<double> partial(static_cast<size_t>(units));
    const auto work = [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t row = unit / blocks, begin = unit % blocks * kBlock;
        const Sample sample = {latents + row * elements,
                               velocity + row * elements,
                               rows + row * kColumns,
                               next + row * elements,
                               static_cast<uint32_t>(step_index[row]) | static_cast<uint32_t>(stream) << 16,
                               static_cast<uint32_t>(sample_index[row]),
                               static_cast<uint32_t>(*epoch),
                               static_cast<uint32_t>(key),
                               static_cast<uint32_t>(key >> 32)};
        partial[static_cast<size_t>(unit)] = step_block(sample, begin, std::min(begin + kBlock, elements));
      }
    };
    const int64_t useful = std::min<int64_t>(units, batch * elements / kPerThread);
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

    for (int64_t row = 0; row < batch; ++row) {
      double sum = 0.0;
      for (int64_t block = 0; block < blocks; ++block) sum += partial[static_cast<size_t>(row * blocks + block)];
      const float* c = rows + row * kColumns;
      log_prob[row] = static_cast<float>(-static_cast<double>(c[kLogProbScale]) * (sum / static_cast<double>(elements)) +
                                         static_cast<double>(c[kLogProbConst]));
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
