// How products of bfloat16 are made and added up in vectors: by instructions of that type, or in float32.
//
// STEP features of a weight's row are multiplied with as many of a row of x, which lies as ``lay`` leaves it, and added to
// Terms; a sum is made of ``parts`` such, which need not wait for each other. FEATURES rows of the weight are multiplied
// at a time with several of x, which is then read as much less often.

#pragma once

#include <ATen/core/Tensor.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace products {

#ifdef __AVX512BF16__
constexpr int ROWS = 6;  // of x at a time, at most: with FEATURES of the weight they fill the registers

// By instructions of bfloat16. Every sum goes in one order: a row's result is the same bits whatever is beside it.
struct Arithmetic {
  using Value = at::BFloat16;
  using Terms = __m512;
  static constexpr int64_t STEP = 32;
  static constexpr int FEATURES = 4;
  static constexpr int parts(int) { return 1; }

  static void lay(const at::BFloat16* x, int64_t size, Value* to) { std::memcpy(to, x, size * sizeof(Value)); }
  static __m512bh take(const at::BFloat16* weight) { return (__m512bh)_mm512_loadu_si512(weight); }
  static void add(Terms& terms, __m512bh weight, const Value* x) {
    terms = _mm512_dpbf16_ps(terms, weight, (__m512bh)_mm512_loadu_si512(x));
  }
  template <int COUNT>
  static void sum(const Terms* terms, float* sums) {
    if constexpr (COUNT > 16) {
      sum<16>(terms, sums);
      sum<COUNT - 16>(terms + 16, sums + 16);
    } else if constexpr (COUNT == 1) {
      const __m512 twos = _mm512_add_ps(terms[0], _mm512_shuffle_ps(terms[0], terms[0], 0x4e));
      const __m512 fours = _mm512_add_ps(twos, _mm512_shuffle_ps(twos, twos, 0xb1));
      const __m512 eights = _mm512_add_ps(fours, _mm512_shuffle_f32x4(fours, fours, 0xb1));
      sums[0] = _mm512_cvtss_f32(_mm512_add_ps(eights, _mm512_shuffle_f32x4(eights, eights, 0x4e)));
    } else {
      // All at once: halves of two are put into one, four times.
      const auto given = [&](int at) { return at < COUNT ? terms[at] : _mm512_setzero_ps(); };
      __m512 fours[4], eights[2];
      for (int at = 0; at < 4; ++at) {
        __m512 twos[2];
        for (int each = 0; each < 2; ++each) {
          const __m512 one = given(4 * at + each), other = given(4 * at + 2 + each);
          twos[each] = _mm512_add_ps(_mm512_unpacklo_ps(one, other), _mm512_unpackhi_ps(one, other));
        }
        fours[at] = _mm512_add_ps(_mm512_unpacklo_ps(twos[0], twos[1]), _mm512_unpackhi_ps(twos[0], twos[1]));
      }
      const auto lanes = [](__m512 one, __m512 other) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(one, other, 0x88), _mm512_shuffle_f32x4(one, other, 0xdd));
      };
      for (int at = 0; at < 2; ++at) eights[at] = lanes(fours[2 * at], fours[2 * at + 1]);
      _mm512_mask_storeu_ps(sums, (1u << COUNT) - 1, lanes(eights[0], eights[1]));
    }
  }
};
#else
constexpr int ROWS = 4;

// In float32.
struct Arithmetic {
  using Value = float;
  using Terms = vectors::Floats;
  static constexpr int64_t STEP = vectors::PAIRS;
  static constexpr int FEATURES = 2;
  static constexpr int parts(int sums) { return ROWS * FEATURES / sums; }

  static void lay(const at::BFloat16* x, int64_t size, Value* to) { vectors::widen(x, size, to); }
  static vectors::Words take(const at::BFloat16* weight) { return vectors::take<vectors::Words>(weight); }
  static void add(Terms& terms, vectors::Words weight, const Value* x) {
    terms += vectors::even(weight) * vectors::take<Terms>(x);
    terms += vectors::odd(weight) * vectors::take<Terms>(x + vectors::LANES);
  }
  template <int COUNT>
  static void sum(const Terms* terms, float* sums) {
    for (int at = 0; at < COUNT; ++at) sums[at] = vectors::sum(terms[at]);
  }
};
#endif

}  // namespace products
