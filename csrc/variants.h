// One body, compiled for several instruction sets; the widest that the machine has is chosen at run time.
//
// A body is a struct with an always-inlined `template <int kVariant> Sums block(row, begin, end) const`. All variants
// compute the same bits: nothing is contracted or reassociated (see README.md).
#pragma once

#include "platform.h"

namespace densegrpo {

enum Variant : int32_t { kPortable, kAvx2, kAvx512, kVariants };

// The variant in use: the widest one that runs here, unless densegrpo_use_variant said otherwise.
int32_t current_variant();

// What a body adds up over a block: squared residuals, and squared distances to the reference.
struct Sums {
  double residual = 0.0, distance = 0.0;
};

template <class Body>
using BlockFunction = Sums (*)(const Body&, int64_t row, int64_t begin, int64_t end);

template <class Body>
Sums block_portable(const Body& body, int64_t row, int64_t begin, int64_t end) {
  return body.template block<kPortable>(row, begin, end);
}

#if DENSEGRPO_X86
template <class Body>
DENSEGRPO_AVX2 Sums block_avx2(const Body& body, int64_t row, int64_t begin, int64_t end) {
  return body.template block<kAvx2>(row, begin, end);
}

template <class Body>
DENSEGRPO_AVX512 Sums block_avx512(const Body& body, int64_t row, int64_t begin, int64_t end) {
  return body.template block<kAvx512>(row, begin, end);
}
#endif

template <class Body>
BlockFunction<Body> block_function() {
#if DENSEGRPO_X86
  constexpr BlockFunction<Body> table[kVariants] = {block_portable<Body>, block_avx2<Body>, block_avx512<Body>};
  return table[current_variant()];
#else
  return block_portable<Body>;
#endif
}

}  // namespace densegrpo
