// A few bfloat16 rows with a weight by vectors of float32, for CPUs without instructions of bfloat16.
//
// The weight is read once for all rows of x, from its beginning to its end: a CPU fetches one such stream ahead of its
// use. Two of its rows at a time are two streams, which it does not, so that they are asked for.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace vectors {

// Vectors of eight, which compilers make of whatever the processor has.
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

// Sums of products of FEATURES rows of the weight with ROWS rows of x, which lie a stride apart: [row][feature]. Each is
// made in parts that need not wait for each other, eight vectors in all.
template <int ROWS, int FEATURES>
void dot(const at::BFloat16* weight, const float* x, int64_t size, int64_t stride, float* sums) {
  constexpr int PARTS = 8 / (ROWS * FEATURES);
  Floats terms[ROWS][FEATURES][PARTS] = {};
  int64_t at = 0;
  const auto step = [&](int part) {
    if (FEATURES > 1) __builtin_prefetch(weight + FEATURES * (size + at));  // of the next rows as much as is used here
    for (int feature = 0; feature < FEATURES; ++feature) {
      const Words words = take<Words>(weight + feature * size + at);
      for (int row = 0; row < ROWS; ++row) {
        terms[row][feature][part] += even(words) * take<Floats>(x + row * stride + at);
        terms[row][feature][part] += odd(words) * take<Floats>(x + row * stride + at + LANES);
      }
    }
    at += PAIRS;
  };
  while (at + PARTS * PAIRS <= size) {
    for (int part = 0; part < PARTS; ++part) step(part);
  }
  while (at + PAIRS <= size) step(0);
  for (int row = 0; row < ROWS; ++row) {
    for (int feature = 0; feature < FEATURES; ++feature) {
      for (int part = 1; part < PARTS; ++part) terms[row][feature][0] += terms[row][feature][part];
      float& found = sums[row * FEATURES + feature] = sum(terms[row][feature][0]);
      for (int64_t rest = at; rest < size; ++rest) {
        found += static_cast<float>(weight[feature * size + rest]) * x[row * stride + rest];
      }
    }
  }
}

struct Sizes {
  int64_t rows, size, stride, features;
};

// All rows of x with FEATURES rows of the weight, to places of as many neighbours in each row.
template <int FEATURES>
void multiply(
    const at::BFloat16* weight, const at::BFloat16* bias, const float* x, const Sizes& sizes, at::BFloat16* to) {
  for (int64_t row = 0; row < sizes.rows;) {
    float sums[4 * FEATURES];
    const int64_t taken = std::min<int64_t>(sizes.rows - row, 4);
    const auto several = taken == 4   ? dot<4, FEATURES>
                         : taken == 3 ? dot<3, FEATURES>
                         : taken == 2 ? dot<2, FEATURES>
                                      : dot<1, FEATURES>;
    several(weight, x + row * sizes.stride, sizes.size, sizes.stride, sums);
    for (int64_t each = 0; each < taken; ++each, ++row) {
      for (int feature = 0; feature < FEATURES; ++feature) {
        const float added = bias ? static_cast<float>(bias[feature]) : 0;
        to[row * sizes.features + feature] = sums[each * FEATURES + feature] + added;
      }
    }
  }
}

// See ``product`` in operations.cpp; all contiguous.
inline void product(const at::Tensor& x, const at::Tensor& weight, const at::BFloat16* bias, const at::Tensor& result) {
  const int64_t rows = x.size(0), size = x.size(1), features = weight.size(0);
  // Rows that lie a power of two apart would push each other out of the cache.
  const int64_t stride = size + PAIRS;
  const at::Tensor wide = at::empty({rows, stride}, x.options().dtype(at::kFloat));
  float* const from = wide.mutable_data_ptr<float>();
  const at::BFloat16* const weights = weight.const_data_ptr<at::BFloat16>();
  at::BFloat16* const to = result.mutable_data_ptr<at::BFloat16>();
  for (int64_t row = 0; row < rows; ++row) {
    widen(x.const_data_ptr<at::BFloat16>() + row * size, size, from + row * stride);
  }
  const Sizes sizes{rows, size, stride, features};
  // Several rows of x are read half as often for two features at a time; with one it is the weight that takes long.
  const int64_t pairs = rows == 1 ? 0 : features / 2;
#pragma omp parallel num_threads(at::get_num_threads())
  {
#pragma omp for schedule(static) nowait
    for (int64_t at = 0; at < 2 * pairs; at += 2) {
      multiply<2>(weights + at * size, bias ? bias + at : nullptr, from, sizes, to + at);
    }
#pragma omp for schedule(static)
    for (int64_t at = 2 * pairs; at < features; ++at) {
      multiply<1>(weights + at * size, bias ? bias + at : nullptr, from, sizes, to + at);
    }
  }
}

}  // namespace vectors
