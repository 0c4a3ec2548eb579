// A few bfloat16 rows with a weight by AMX's tiles.
//
// The weight is the first factor, which takes its rows as they lie; the other one's layout differs, and that is x. A row of
// the result is the same bits whatever rows are beside it.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace tiles {

constexpr int64_t FEATURES = 16;  // in a tile of the weight, and rows in one of x
constexpr int64_t DEPTH = 32;     // bfloat16 in a line of the weight's tile

// Up to FEATURES rows of x: pairs of neighbours of all rows lie together, [size / 2][rows][2], and zeros after the last.
struct Chunk {
  int64_t row, rows;
  at::BFloat16* pairs;
};

inline int64_t padded(int64_t size) { return (size + DEPTH - 1) / DEPTH * DEPTH; }

// Compilers are not told that tiles are loaded from memory: what was written for that has to be there by now.
inline void written(const at::BFloat16* values) { asm volatile("" : : "r"(values) : "memory"); }

// Fill a chunk's pairs with as many features from ``at`` on as a tile has. x begins with the chunk's first row.
inline void pair_up(const at::BFloat16* x, int64_t size, int64_t at, const Chunk& chunk) {
  constexpr size_t PAIR = 2 * sizeof(at::BFloat16);
  at::BFloat16* to = chunk.pairs + at * chunk.rows;
  for (const int64_t stop = at + DEPTH; at < stop; at += 2) {
    for (int64_t row = 0; row < chunk.rows; ++row, to += 2) {
      const at::BFloat16* const from = x + row * size + at;
      if (at + 2 <= size) {
        std::memcpy(to, from, PAIR);
      } else {
        to[0] = at < size ? from[0] : at::BFloat16(0);
        to[1] = 0;
      }
    }
  }
  written(chunk.pairs);
}

// What the tiles hold: 0 to 3 the sums of two chunks, two each, which need not wait for each other; 4 and 5 the weight;
// 6 and 7 the chunks.
inline void configure(const Chunk* chunks, int64_t count) {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t lines[16] = {};
  } shape;
  const auto set = [&](int tile, int64_t bytes) {
    shape.bytes[tile] = static_cast<uint16_t>(bytes);
    shape.lines[tile] = FEATURES;
  };
  for (int chunk = 0; chunk < count; ++chunk) {
    for (const int tile : {2 * chunk, 2 * chunk + 1, 6 + chunk}) set(tile, chunks[chunk].rows * 4);
  }
  for (const int tile : {4, 5}) set(tile, DEPTH * 2);
  _tile_loadconfig(&shape);
}

// Sums of products of FEATURES rows of the weight with one chunk or two: [chunk][two parts][feature][row].
template <int CHUNKS>
void dot(const at::BFloat16* weight, int64_t size, const Chunk* chunks, float (*sums)[2][FEATURES * FEATURES]) {
  _tile_zero(0);
  _tile_zero(1);
  if (CHUNKS > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const auto line = [&](int chunk) { return chunks[chunk].rows * 4; };
  const auto pairs = [&](int chunk, int64_t at) { return chunks[chunk].pairs + at * chunks[chunk].rows; };
  // Instructions name their tiles: what follows cannot be one piece of code for both parts.
  const auto even = [&](const at::BFloat16* from, int64_t stride, int64_t at) {
    _tile_loadd(4, from, stride * 2);
    _tile_loadd(6, pairs(0, at), line(0));
    _tile_dpbf16ps(0, 4, 6);
    if (CHUNKS > 1) {
      _tile_loadd(7, pairs(1, at), line(1));
      _tile_dpbf16ps(2, 4, 7);
    }
  };
  const auto odd = [&](const at::BFloat16* from, int64_t stride, int64_t at) {
    _tile_loadd(5, from, stride * 2);
    _tile_loadd(6, pairs(0, at), line(0));
    _tile_dpbf16ps(1, 5, 6);
    if (CHUNKS > 1) {
      _tile_loadd(7, pairs(1, at), line(1));
      _tile_dpbf16ps(3, 5, 7);
    }
  };
  int64_t at = 0;
  for (; at + 2 * DEPTH <= size; at += 2 * DEPTH) {
    even(weight + at, size, at);
    odd(weight + at + DEPTH, size, at + DEPTH);
  }
  if (at + DEPTH <= size) {
    even(weight + at, size, at);
    at += DEPTH;
  }
  if (at < size) {
    // What follows a row's end is another row, which may hold what is not a number.
    at::BFloat16 end[FEATURES * DEPTH] = {};
    for (int64_t row = 0; row < FEATURES; ++row) {
      std::memcpy(end + row * DEPTH, weight + row * size + at, (size - at) * sizeof(at::BFloat16));
    }
    written(end);
    odd(end, DEPTH, at);
  }
  _tile_stored(0, sums[0][0], line(0));
  _tile_stored(1, sums[0][1], line(0));
  if (CHUNKS > 1) {
    _tile_stored(2, sums[1][0], line(1));
    _tile_stored(3, sums[1][1], line(1));
  }
}

// See ``product`` in operations.cpp; all contiguous, and at least FEATURES rows of the weight.
inline void product(const at::Tensor& x, const at::Tensor& weight, const at::BFloat16* bias, const at::Tensor& result) {
  const int64_t rows = x.size(0), size = x.size(1), features = weight.size(0);
  const at::BFloat16* const values = x.const_data_ptr<at::BFloat16>();
  const at::BFloat16* const weights = weight.const_data_ptr<at::BFloat16>();
  at::BFloat16* const to = result.mutable_data_ptr<at::BFloat16>();
  const at::Tensor laid_out = at::empty({rows, padded(size)}, x.options());
  at::BFloat16* const pairs = laid_out.mutable_data_ptr<at::BFloat16>();
  for (int64_t first = 0; first < rows; first += 2 * FEATURES) {
    Chunk chunks[2];
    int64_t count = 0;
    for (int64_t row = first; row < std::min(rows, first + 2 * FEATURES); row += FEATURES) {
      const int64_t taken = std::min(rows - row, FEATURES);
      chunks[count++] = {row, taken, pairs + row * padded(size)};
    }
#pragma omp parallel num_threads(at::get_num_threads())
    {
      configure(chunks, count);
      float sums[2][2][FEATURES * FEATURES];
#pragma omp for schedule(static)
      for (int64_t at = 0; at < size; at += DEPTH) {
        for (const Chunk* chunk = chunks; chunk < chunks + count; ++chunk) {
          pair_up(values + chunk->row * size, size, at, *chunk);
        }
      }
#pragma omp for schedule(static)
      for (int64_t block = 0; block < features; block += FEATURES) {
        const int64_t at = std::min(block, features - FEATURES);  // the last ones again, rather than fewer
        (count > 1 ? dot<2> : dot<1>)(weights + at * size, size, chunks, sums);
        for (int64_t each = 0; each < count; ++each) {
          const Chunk& chunk = chunks[each];
          for (int64_t row = 0; row < chunk.rows; ++row) {
            for (int64_t feature = block - at; feature < FEATURES; ++feature) {
              const int64_t place = feature * chunk.rows + row;
              const float added = bias ? static_cast<float>(bias[at + feature]) : 0;
              to[(chunk.row + row) * features + at + feature] = sums[each][0][place] + sums[each][1][place] + added;
            }
          }
        }
      }
      _tile_release();
    }
  }
}

}  // namespace tiles
