// Products of a few bfloat16 rows with a weight, summed in float32: for CPUs that have no instructions of that type.
//
// One row of the weight after another is read, from its beginning to its end, once for all rows of x: a CPU fetches one
// such stream ahead of its use, but not several that lie a row apart.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>

namespace {

// Vectors of eight, which compilers make of whatever the processor has.
using Floats = float __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(32)));
constexpr int64_t LANES = 8;
constexpr int64_t PAIRS = 2 * LANES;  // bfloat16 in a vector of words

template <typename Vector>
Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

float sum(Floats terms) {
  const float* each = reinterpret_cast<const float*>(&terms);
  return ((each[0] + each[4]) + (each[1] + each[5])) + ((each[2] + each[6]) + (each[3] + each[7]));
}

// x in float32: of every 16 features those at even places come first, as they are the lower halves of words.
void widen(const at::BFloat16* x, int64_t size, float* to) {
  for (int64_t at = 0; at + PAIRS <= size; at += PAIRS) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
      to[at + lane] = x[at + 2 * lane];
      to[at + LANES + lane] = x[at + 2 * lane + 1];
    }
  }
  for (int64_t rest = size - size % PAIRS; rest < size; ++rest) to[rest] = x[rest];
}

// Sums of products of one row of the weight with ROWS rows of x, which lie a stride apart, each in PARTS that need not
// wait for each other. A bfloat16 is the upper half of a float32.
template <int ROWS, int PARTS>
void dot(const at::BFloat16* weight, const float* x, int64_t size, int64_t stride, float* sums) {
  Floats lower[ROWS][PARTS] = {}, upper[ROWS][PARTS] = {};
  int64_t at = 0;
  const auto step = [&](int part) {
    const Words words = load<Words>(weight + at);
    const Floats even = reinterpret_cast<Floats>(words << 16), odd = reinterpret_cast<Floats>(words & 0xffff0000u);
    for (int row = 0; row < ROWS; ++row) {
      lower[row][part] += even * load<Floats>(x + row * stride + at);
      upper[row][part] += odd * load<Floats>(x + row * stride + at + LANES);
    }
    at += PAIRS;
  };
  while (at + PARTS * PAIRS <= size) {
    for (int part = 0; part < PARTS; ++part) step(part);
  }
  while (at + PAIRS <= size) step(0);
  for (int row = 0; row < ROWS; ++row) {
    Floats terms = lower[row][0] + upper[row][0];
    for (int part = 1; part < PARTS; ++part) terms += lower[row][part] + upper[row][part];
    sums[row] = sum(terms);
    for (int64_t rest = at; rest < size; ++rest) sums[row] += static_cast<float>(weight[rest]) * x[row * stride + rest];
  }
}

// x [rows, in] with a weight [out, in] and a bias [out] or none, all bfloat16: [rows, out], rounded once, at the end.
at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const int64_t rows = x.size(0), size = x.size(1), features = weight.size(0);
  TORCH_CHECK(weight.size(1) == size, "x has ", size, " features, the weight takes ", weight.size(1));
  const auto given = x.expect_contiguous(), lines = weight.expect_contiguous();
  // Rows that lie a power of two apart would push each other out of the cache.
  const int64_t stride = size + PAIRS;
  const at::Tensor wide = at::empty({rows, stride}, x.options().dtype(at::kFloat));
  at::Tensor result = at::empty({rows, features}, x.options());
  float* const from = wide.mutable_data_ptr<float>();
  const at::BFloat16* const weights = lines->const_data_ptr<at::BFloat16>();
  const at::BFloat16* const added = bias ? bias->const_data_ptr<at::BFloat16>() : nullptr;
  at::BFloat16* const to = result.mutable_data_ptr<at::BFloat16>();
  for (int64_t row = 0; row < rows; ++row) {
    widen(given->const_data_ptr<at::BFloat16>() + row * size, size, from + row * stride);
  }
#pragma omp parallel for schedule(static) num_threads(at::get_num_threads())
  for (int64_t feature = 0; feature < features; ++feature) {
    const at::BFloat16* const line = weights + feature * size;
    const float start = added ? static_cast<float>(added[feature]) : 0;
    for (int64_t row = 0; row < rows;) {
      float sums[4];
      const int64_t left = rows - row, taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const auto several = taken == 4 ? dot<4, 1> : taken == 2 ? dot<2, 2> : dot<1, 4>;
      several(line, from + row * stride, size, stride, sums);
      for (int64_t each = 0; each < taken; ++each) to[(row + each) * features + feature] = start + sums[each];
      row += taken;
    }
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_ee, library) {
  library.def("bfloat16_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}
TORCH_LIBRARY_IMPL(megatron_ee, CPU, library) { library.impl("bfloat16_product", &product); }
