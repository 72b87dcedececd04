// The library's version and the choice of the instruction set.
#include "variants.h"

#include <atomic>

namespace densegrpo {
namespace {

constexpr const char* kNames[kVariants] = {"portable", "avx2", "avx512"};

bool runs_here(int32_t variant) {
  switch (variant) {
    case kPortable:
      return true;
#if DENSEGRPO_X86
    case kAvx2:
      return __builtin_cpu_supports("avx2");
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default:
      return false;
  }
}

int32_t widest() {
  int32_t variant = kVariants - 1;
  while (!runs_here(variant)) --variant;
  return variant;
}

std::atomic<int32_t>& choice() {
  static std::atomic<int32_t> variant{widest()};
  return variant;
}

}  // namespace

int32_t current_variant() { return choice().load(std::memory_order_relaxed); }

}  // namespace densegrpo

// Version of this interface; native.py refuses a library of another one.
DENSEGRPO_API int32_t densegrpo_abi_version() { return 4; }

// Name of a variant, 0 being the narrowest; null when there is none of that number, or it does not run here.
DENSEGRPO_API const char* densegrpo_variant_name(int32_t variant) {
  return densegrpo::runs_here(variant) ? densegrpo::kNames[variant] : nullptr;
}

DENSEGRPO_API int32_t densegrpo_variant() { return densegrpo::current_variant(); }

// Choose a variant for all later calls of all threads. Returns 0, or 1 when it does not run here.
DENSEGRPO_API int32_t densegrpo_use_variant(int32_t variant) {
  if (!densegrpo::runs_here(variant)) return 1;
  densegrpo::choice().store(variant, std::memory_order_relaxed);
  return 0;
}
