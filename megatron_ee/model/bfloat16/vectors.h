// Vectors of bfloat16 and of float32, which compilers make of whatever the processor has.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>

namespace vectors {

using Floats = float __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(32)));
constexpr int64_t LANES = 8;
constexpr int64_t PAIRS = 2 * LANES;  // bfloat16 in a vector of words

template <typename Vector>
Vector take(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

// Of a vector of words the bfloat16 at even and at odd places; one is the upper half of a float32.
inline Floats even(Words words) { return reinterpret_cast<Floats>(words << 16); }
inline Floats odd(Words words) { return reinterpret_cast<Floats>(words & 0xffff0000u); }

inline float sum(Floats terms) {
  const float* each = reinterpret_cast<const float*>(&terms);
  return ((each[0] + each[4]) + (each[1] + each[5])) + ((each[2] + each[6]) + (each[3] + each[7]));
}

// x in float32: of every 16 features those at even places come first, as they are the lower halves of words.
inline void widen(const at::BFloat16* x, int64_t size, float* to) {
  for (int64_t at = 0; at + PAIRS <= size; at += PAIRS) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
      to[at + lane] = x[at + 2 * lane];
      to[at + LANES + lane] = x[at + 2 * lane + 1];
    }
  }
  for (int64_t rest = size - size % PAIRS; rest < size; ++rest) to[rest] = x[rest];
}

}  // namespace vectors
