// Products and attention of a few bfloat16 rows, for CPUs. Weights, keys and values stay as they are.

#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention.h"
#include "products.h"
#ifdef __AMX_BF16__
#include "tiles.h"
#endif

namespace {

// x [rows, in] with a weight [out, in] and a bias [out] or none, all bfloat16: [rows, out], rounded once, at the end. The
// weight is read from memory once for all rows.
at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.size(1) == x.size(1), "x has ", x.size(1), " features, the weight takes ", weight.size(1));
  const auto given = x.expect_contiguous(), lines = weight.expect_contiguous();
  const at::BFloat16* const added = bias ? bias->const_data_ptr<at::BFloat16>() : nullptr;
  const at::Tensor result = at::empty({x.size(0), weight.size(0)}, x.options());
#ifdef __AMX_BF16__
  static const bool allowed = at::cpu::init_amx();  // by the system, for the whole process
  if (allowed && weight.size(0) >= tiles::FEATURES) {
    tiles::product(*given, *lines, added, result);
    return result;
  }
#endif
  products::product(*given, *lines, added, result);
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_ee, library) {
  library.def("bfloat16_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def("bfloat16_attention(Tensor query, Tensor[] keys, Tensor[] values) -> Tensor");
}
TORCH_LIBRARY_IMPL(megatron_ee, CPU, library) {
  library.impl("bfloat16_product", &product);
  library.impl("bfloat16_attention", &attention::attention);
}
