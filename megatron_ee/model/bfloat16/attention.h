// Attention of rows' newest tokens to all that is kept up to them: sums and shares in float32, rounded once.
//
// Every sum goes in one order, so that a token's context is the same bits whatever is beside it.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace attention {

using vectors::even;
using vectors::Floats;
using vectors::LANES;
using vectors::odd;
using vectors::PAIRS;
using vectors::Words;
constexpr int TOGETHER = 4;  // queries, for which a key or value is read once

// Up to TOGETHER queries of one key-value head of one row.
struct Queries {
  const at::BFloat16 *keys, *values;  // [kept, size], of the head
  int64_t kept, size;                 // as many as the last of them sees
  float* wide;                        // [queries, size], see ``widen``
  float* scores;                      // [queries, kept]
  int64_t seen[TOGETHER];             // by each
  at::BFloat16* to[TOGETHER];         // [size] each
};

// Products of COUNT queries with KEYS keys from ``key`` on.
template <int COUNT, int KEYS>
void score(const Queries& queries, int64_t key) {
  Floats terms[COUNT][KEYS][2] = {};
  for (int64_t at = 0; at < queries.size; at += PAIRS) {
    for (int each = 0; each < KEYS; ++each) {
      const Words words = vectors::take<Words>(queries.keys + (key + each) * queries.size + at);
      for (int query = 0; query < COUNT; ++query) {
        const float* const wide = queries.wide + query * queries.size + at;
        terms[query][each][0] += even(words) * vectors::take<Floats>(wide);
        terms[query][each][1] += odd(words) * vectors::take<Floats>(wide + LANES);
      }
    }
  }
  for (int query = 0; query < COUNT; ++query) {
    for (int each = 0; each < KEYS; ++each) {
      queries.scores[query * queries.kept + key + each] = vectors::sum(terms[query][each][0] + terms[query][each][1]);
    }
  }
}

// WIDTH times PAIRS features from ``at`` on of each query's sum of the values, each times its key's share.
template <int COUNT, int WIDTH>
void mix(const Queries& queries, int64_t at) {
  Floats terms[COUNT][WIDTH][2] = {};
  for (int64_t key = 0; key < queries.kept; ++key) {
    for (int each = 0; each < WIDTH; ++each) {
      const Words words = vectors::take<Words>(queries.values + key * queries.size + at + each * PAIRS);
      for (int query = 0; query < COUNT; ++query) {
        const float share = queries.scores[query * queries.kept + key];
        terms[query][each][0] += even(words) * share;
        terms[query][each][1] += odd(words) * share;
      }
    }
  }
  for (int query = 0; query < COUNT; ++query) {
    for (int64_t place = 0; place < WIDTH * PAIRS; ++place) {
      queries.to[query][at + place] = terms[query][place / PAIRS][place % 2][place % PAIRS / 2];
    }
  }
}

// Scores become shares of one.
inline void share(float* scores, int64_t kept, int64_t size) {
  using Vector = at::vec::Vectorized<float>;
  const auto larger = [](Vector one, Vector other) { return at::vec::maximum(one, other); };
  const auto both = [](Vector one, Vector other) { return one + other; };
  const Vector most(at::vec::reduce_all<float>(larger, scores, kept)), scale(1 / std::sqrt(static_cast<float>(size)));
  at::vec::map<float>([&](Vector score) { return ((score - most) * scale).exp_u20(); }, scores, scores, kept);
  const Vector total(at::vec::reduce_all<float>(both, scores, kept));
  at::vec::map<float>([&](Vector part) { return part / total; }, scores, scores, kept);
}

template <int COUNT>
void attend(const Queries& queries) {
  constexpr int EACH = TOGETHER / COUNT;
  int64_t key = 0, at = 0;
  for (; key + EACH <= queries.kept; key += EACH) score<COUNT, EACH>(queries, key);
  for (; key < queries.kept; ++key) score<COUNT, 1>(queries, key);
  for (int query = 0; query < COUNT; ++query) {
    float* const scores = queries.scores + query * queries.kept;
    share(scores, queries.seen[query], queries.size);
    std::fill(scores + queries.seen[query], scores + queries.kept, 0.0f);
  }
  for (; at + EACH * PAIRS <= queries.size; at += EACH * PAIRS) mix<COUNT, EACH>(queries, at);
  for (; at < queries.size; at += PAIRS) mix<COUNT, 1>(queries, at);
}

// query [rows * tokens, kv_heads, queries per key-value head, head_dim], as many tokens of each row, and of each row keys
// and values [1, kv_heads, kept, head_dim], which end with its tokens', all bfloat16: [rows * tokens, heads * head_dim].
inline at::Tensor attention(const at::Tensor& query, at::TensorList keys, at::TensorList values) {
  const int64_t rows = keys.size(), groups = query.size(1), shared = query.size(2), size = query.size(3);
  TORCH_CHECK(size % PAIRS == 0, "heads of ", size, " features; they have to be a multiple of ", PAIRS);
  TORCH_CHECK(rows > 0 && values.size() == keys.size(), "keys of ", rows, " rows, and values of ", values.size());
  TORCH_CHECK(query.size(0) % rows == 0, query.size(0), " tokens of ", rows, " rows: not as many of each");
  const int64_t tokens = query.size(0) / rows;
  const auto given = query.expect_contiguous();
  const at::Tensor result = at::empty({rows * tokens, groups * shared * size}, query.options());
  int64_t longest = 0;
  for (const at::TensorList all : {keys, values}) {
    for (const at::Tensor& kept : all) {
      TORCH_CHECK(kept.stride(2) == size && kept.stride(3) == 1, "a head's keys or values do not lie together");
      TORCH_CHECK(kept.size(2) >= tokens, "keys or values of ", kept.size(2), " positions, for ", tokens, " tokens");
      longest = std::max(longest, kept.size(2));
    }
  }
  const at::BFloat16* const from = given->const_data_ptr<at::BFloat16>();
  at::BFloat16* const to = result.mutable_data_ptr<at::BFloat16>();
  const int64_t parts = (tokens * shared + TOGETHER - 1) / TOGETHER;  // of the queries of a row's key-value head
#pragma omp parallel num_threads(at::get_num_threads())
  {
    std::vector<float> wide(TOGETHER * size), scores(TOGETHER * longest);
#pragma omp for schedule(dynamic)
    for (int64_t number = 0; number < rows * groups * parts; ++number) {
      const int64_t row = number / (groups * parts), group = number / parts % groups;
      const int64_t first = number % parts * TOGETHER, count = std::min<int64_t>(tokens * shared - first, TOGETHER);
      const int64_t kept = keys[row].size(2);
      const auto head = [&](at::TensorList all) {
        return all[row].const_data_ptr<at::BFloat16>() + group * all[row].stride(1);
      };
      Queries queries{head(keys), head(values), 0, size, wide.data(), scores.data()};
      for (int64_t each = 0; each < count; ++each) {
        const int64_t token = (first + each) / shared, query_head = (first + each) % shared;
        const int64_t place = (((row * tokens + token) * groups + group) * shared + query_head) * size;
        vectors::widen(from + place, size, queries.wide + each * size);
        queries.to[each] = to + place;
        queries.kept = queries.seen[each] = kept - tokens + 1 + token;
      }
      const auto several = count == 4 ? attend<4> : count == 3 ? attend<3> : count == 2 ? attend<2> : attend<1>;
      several(queries);
    }
  }
  return result;
}

}  // namespace attention
