// A few bfloat16 rows with a weight by vectors, for CPUs without tiles.
//
// The weight is read once for all rows of x, from its beginning to its end: a CPU fetches one such stream ahead of its
// use. Several of its rows at a time are several streams, which it does not, so that they are asked for.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "arithmetic.h"

namespace products {

using Value = Arithmetic::Value;
constexpr int64_t STEP = Arithmetic::STEP;
constexpr int64_t LINE = 32;  // bfloat16 in a line of the cache

// Rows of the weight, and of x from one on.
struct Operands {
  const at::BFloat16* weight;
  const Value* x;
  int64_t size, stride;  // features, and how far apart the rows of x lie
};

// Of what is to be multiplied next as many lines as are asked for at each step.
struct Ahead {
  const at::BFloat16* from;
  int64_t lines;
};

// Sums of products of FEATURES rows of the weight with COUNT rows of x: [row][feature]. Always inlined: with one row of x
// calls took a tenth to a fifth of the time.
template <int COUNT, int FEATURES>
__attribute__((always_inline)) inline void dot(const Operands& given, Ahead& ahead, float* sums) {
  constexpr int SUMS = COUNT * FEATURES, PARTS = Arithmetic::parts(SUMS);
  const at::BFloat16* const weight = given.weight;
  const Value* const x = given.x;
  const int64_t size = given.size, stride = given.stride;
  Arithmetic::Terms terms[PARTS][SUMS] = {};
  int64_t at = 0;
  const auto step = [&](int part) {
    for (int64_t line = 0; line < ahead.lines; ++line, ahead.from += LINE) {
      __builtin_prefetch(ahead.from, 0, 2);  // to the second cache
    }
    for (int feature = 0; feature < FEATURES; ++feature) {
      const auto taken = Arithmetic::take(weight + feature * size + at);
      for (int row = 0; row < COUNT; ++row) {
        Arithmetic::add(terms[part][row * FEATURES + feature], taken, x + row * stride + at);
      }
    }
    at += STEP;
  };
  while (at + PARTS * STEP <= size) {
    for (int part = 0; part < PARTS; ++part) step(part);
  }
  while (at + STEP <= size) step(0);
  for (int part = 1; part < PARTS; ++part) {
    for (int each = 0; each < SUMS; ++each) terms[0][each] += terms[part][each];
  }
  Arithmetic::sum<SUMS>(terms[0], sums);
  for (; at < size; ++at) {
    for (int each = 0; each < SUMS; ++each) {
      const int row = each / FEATURES, feature = each % FEATURES;
      sums[each] += static_cast<float>(weight[feature * size + at]) * static_cast<float>(x[row * stride + at]);
    }
  }
}

// ``dot`` with as many rows of x as are taken, from one on.
template <int FEATURES, int... BEFORE>
void several(int64_t taken, const Operands& given, Ahead& ahead, float* sums, std::integer_sequence<int, BEFORE...>) {
  ((taken == BEFORE + 1 ? dot<BEFORE + 1, FEATURES>(given, ahead, sums) : void()), ...);
}

// All rows of x with FEATURES rows of the weight, to neighbouring places of each row of what is made.
template <int FEATURES>
void multiply(Operands given, int64_t rows, const at::BFloat16* bias, at::BFloat16* to, int64_t features) {
  // Evenly by all passes over these rows, so that fetching goes on beside products.
  int64_t passes = (rows + ROWS - 1) / ROWS;
  const int64_t lines = FEATURES * STEP / LINE;
  Ahead ahead{given.weight + FEATURES * given.size, FEATURES == 1 ? 0 : std::max<int64_t>(1, lines / passes)};
  for (int64_t row = 0, taken; row < rows; row += taken, --passes) {
    float sums[ROWS * FEATURES];
    taken = (rows - row + passes - 1) / passes;  // as many in each: one that is left over would read all for itself
    several<FEATURES>(taken, given, ahead, sums, std::make_integer_sequence<int, ROWS>());
    for (int64_t each = 0; each < taken; ++each) {
      for (int feature = 0; feature < FEATURES; ++feature) {
        const float added = bias ? static_cast<float>(bias[feature]) : 0;
        to[(row + each) * features + feature] = sums[each * FEATURES + feature] + added;
      }
    }
    given.x += taken * given.stride;
  }
}

// One row: it is the weight that takes long, read by each thread from one place on.
inline void multiply_one(const Operands& given, const at::BFloat16* bias, at::BFloat16* to, int64_t features) {
#pragma omp parallel for schedule(static) num_threads(at::get_num_threads())
  for (int64_t at = 0; at < features; ++at) {
    float sum;
    Ahead ahead{};
    dot<1, 1>({given.weight + at * given.size, given.x, given.size, given.stride}, ahead, &sum);
    to[at] = sum + (bias ? static_cast<float>(bias[at]) : 0);
  }
}

// See ``product`` in operations.cpp; all contiguous.
inline void product(const at::Tensor& x, const at::Tensor& weight, const at::BFloat16* bias, const at::Tensor& result) {
  const int64_t rows = x.size(0), size = x.size(1), features = weight.size(0);
  // Rows that lie a power of two apart would push each other out of the cache.
  const int64_t stride = size + STEP;
  const at::Tensor laid = at::empty({rows, stride}, x.options().dtype(c10::CppTypeToScalarType<Value>::value));
  Value* const from = laid.mutable_data_ptr<Value>();
  const at::BFloat16* const weights = weight.const_data_ptr<at::BFloat16>();
  at::BFloat16* const to = result.mutable_data_ptr<at::BFloat16>();
  for (int64_t row = 0; row < rows; ++row) {
    Arithmetic::lay(x.const_data_ptr<at::BFloat16>() + row * size, size, from + row * stride);
  }
  if (rows == 1) return multiply_one({weights, from, size, stride}, bias, to, features);
  constexpr int TOGETHER = Arithmetic::FEATURES;
  const int64_t together = features / TOGETHER * TOGETHER;
#pragma omp parallel num_threads(at::get_num_threads())
  {
#pragma omp for schedule(static) nowait
    for (int64_t at = 0; at < together; at += TOGETHER) {
      multiply<TOGETHER>({weights + at * size, from, size, stride}, rows, bias ? bias + at : nullptr, to + at, features);
    }
#pragma omp for schedule(static)
    for (int64_t at = together; at < features; ++at) {
      multiply<1>({weights + at * size, from, size, stride}, rows, bias ? bias + at : nullptr, to + at, features);
    }
  }
}

}  // namespace products
