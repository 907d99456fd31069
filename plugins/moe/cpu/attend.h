// Attention's loops, written once over 16 floats of an instruction set. Included by tile.h.
//
// An instruction set's `Lanes` provide
//   Floats        16 of them, with load, store, all (one number, 16 times), add, mul, and fma(a, b, c) = a * b + c rounded once
//   sum(a)        of the 16: halves are added until one is left
//   kColumns      groups of 16 columns that six rows of sums leave registers for
#pragma once

#include <algorithm>

#include "layout.h"

namespace gatework {
namespace {

constexpr int kKeys = 64;    // looked at together
constexpr int kDepth = 64;   // elements of a head that are multiplied at a time
constexpr int kRowTile = 6;  // rows whose sums stay in registers
constexpr int kAhead = 16;   // keys
constexpr int kDirect = 8;   // so many rows repay turning the keys round

// c [R, 16 * F] += a [R, depth] * b [depth, 16 * F]
template <class Lanes, int R, int F>
inline void add_product(const float* a, size_t a_stride, int depth, const float* b, size_t b_stride, float* c,
                        size_t c_stride) {
  typename Lanes::Floats sums[R][F];
  for (int r = 0; r < R; ++r)
    for (int f = 0; f < F; ++f) sums[r][f] = Lanes::load(c + r * c_stride + 16 * f);
  for (int k = 0; k < depth; ++k, b += b_stride) {
    typename Lanes::Floats columns[F];
    for (int f = 0; f < F; ++f) columns[f] = Lanes::load(b + 16 * f);
    for (int r = 0; r < R; ++r) {
      const typename Lanes::Floats factor = Lanes::all(a[r * a_stride + k]);
      for (int f = 0; f < F; ++f) sums[r][f] = Lanes::fma(factor, columns[f], sums[r][f]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int f = 0; f < F; ++f) Lanes::store(c + r * c_stride + 16 * f, sums[r][f]);
}

template <class Lanes, int R>
inline void add_rows(const float* a, size_t a_stride, int depth, const float* b, size_t b_stride, int columns, float* c,
                     size_t c_stride) {
  int n = 0;
  for (; columns - n >= 16 * Lanes::kColumns; n += 16 * Lanes::kColumns)
    add_product<Lanes, R, Lanes::kColumns>(a, a_stride, depth, b + n, b_stride, c + n, c_stride);
  for (; n < columns; n += 16) add_product<Lanes, R, 1>(a, a_stride, depth, b + n, b_stride, c + n, c_stride);
}

// c [rows, columns] += a [rows, depth] * b [depth, columns]; columns a multiple of 16
template <class Lanes>
inline void add_products(const float* a, size_t a_stride, int rows, int depth, const float* b, size_t b_stride, int columns,
                         float* c, size_t c_stride) {
  for (; rows >= kRowTile; rows -= kRowTile, a += kRowTile * a_stride, c += kRowTile * c_stride)
    add_rows<Lanes, kRowTile>(a, a_stride, depth, b, b_stride, columns, c, c_stride);
  for (; rows >= 2; rows -= 2, a += 2 * a_stride, c += 2 * c_stride)
    add_rows<Lanes, 2>(a, a_stride, depth, b, b_stride, columns, c, c_stride);
  if (rows) add_rows<Lanes, 1>(a, a_stride, depth, b, b_stride, columns, c, c_stride);
}

// scores [rows, kKeys] of a few queries, key by key.
template <class Lanes>
inline void scores_by_key(const Head& head, const Queries& queries, int begin, int keys, float (*scores)[kKeys]) {
  for (int j = 0; j < keys; ++j) {
    const float *key = head.keys + size_t(begin + j) * head.width, *value = head.values + size_t(begin + j) * head.width;
    for (int d = 0; d < head.width; d += 16) {  // the next keys, and what is read when this chunk's are done
      __builtin_prefetch(key + kAhead * head.width + d);
      __builtin_prefetch(value + d);
    }
    for (int r = 0; r < queries.rows; ++r) {
      const float* q = queries.q + size_t(r) * head.width;
      typename Lanes::Floats sums = Lanes::all(0.0f);
      for (int d = 0; d < head.width; d += 16) sums = Lanes::fma(Lanes::load(q + d), Lanes::load(key + d), sums);
      scores[r][j] = Lanes::sum(sums);
    }
  }
}

// The same for many queries: keys are turned round, so that their elements lie side by side.
template <class Lanes>
inline void scores_by_element(const Head& head, const Queries& queries, int begin, int keys, float (*scores)[kKeys]) {
  alignas(64) float turned[kDepth][kKeys] = {};
  std::fill_n(scores[0], size_t(queries.rows) * kKeys, 0.0f);
  for (int start = 0; start < head.width; start += kDepth) {
    const int depth = std::min(kDepth, head.width - start);
    for (int j = 0; j < keys; ++j) {
      const float* key = head.keys + size_t(begin + j) * head.width + start;
      for (int d = 0; d < depth; ++d) turned[d][j] = key[d];
    }
    add_products<Lanes>(queries.q + start, head.width, queries.rows, depth, turned[0], kKeys, kKeys, scores[0], kKeys);
  }
}

// Turns the scores [first, last) of a row into weights, exp(score - top), all else into zeros; returns their sum.
template <class Lanes>
inline float weigh(float* scores, int first, int last, float top) {
  for (int j = 0; j < kKeys; ++j) scores[j] = exponential(scores[j] - top);
  for (int j = 0; j < first; ++j) scores[j] = 0.0f;
  for (int j = last; j < kKeys; ++j) scores[j] = 0.0f;
  typename Lanes::Floats sums = Lanes::load(scores);
  for (int j = 16; j < kKeys; j += 16) sums = Lanes::add(sums, Lanes::load(scores + j));
  return Lanes::sum(sums);
}

inline float largest(const float* scores, int first, int last) {
  float most[16];
  std::fill_n(most, 16, scores[first]);
  int j = first;
  for (; j + 16 <= last; j += 16)
    for (int i = 0; i < 16; ++i) most[i] = scores[j + i] > most[i] ? scores[j + i] : most[i];
  for (; j < last; ++j) most[0] = scores[j] > most[0] ? scores[j] : most[0];
  return *std::max_element(most, most + 16);
}

inline void cap(float* scores, int count, float softcap) {
  const float inverse = 2.0f / softcap;
  for (int j = 0; j < count; ++j) scores[j] = softcap * (1.0f - 2.0f / (exponential(scores[j] * inverse) + 1.0f));
}

inline void lean(float* scores, int count, int distance, float slope) {
  for (int j = 0; j < count; ++j) scores[j] += slope * float(distance + j);
}

template <class Lanes>
void attend(const Head& head, const Queries& queries, int begin, int end, float* y, float* top, float* total) {
  alignas(64) float scores[kMaxRows][kKeys];
  std::fill_n(y, size_t(queries.rows) * head.width, 0.0f);
  std::fill_n(top, queries.rows, -3e38f);
  std::fill_n(total, queries.rows, 0.0f);
  for (; begin < end; begin += kKeys) {
    const int keys = std::min(kKeys, end - begin);
    if (queries.rows < kDirect)
      scores_by_key<Lanes>(head, queries, begin, keys, scores);
    else
      scores_by_element<Lanes>(head, queries, begin, keys, scores);
    for (int r = 0; r < queries.rows; ++r) {
      const int position = queries.position + r / queries.group;
      const int first = queries.window ? std::max(0, position - queries.window + 1 - begin) : 0;
      const int last = std::min(keys, position + 1 - begin);
      if (first >= last) {
        std::fill_n(scores[r], kKeys, 0.0f);
        continue;
      }
      if (head.softcap > 0.0f) cap(scores[r], keys, head.softcap);
      if (queries.slopes) lean(scores[r], keys, begin - position, queries.slopes[r % queries.group]);
      const float most = std::max(top[r], largest(scores[r], first, last));
      const float kept = exponential(top[r] - most);
      total[r] = total[r] * kept + weigh<Lanes>(scores[r], first, last, most);
      top[r] = most;
      if (kept != 1.0f)
        for (int d = 0; d < head.width; ++d) y[size_t(r) * head.width + d] *= kept;
    }
    add_products<Lanes>(scores[0], kKeys, queries.rows, keys, head.values + size_t(begin) * head.width, head.width, head.width,
                        y, head.width);
  }
}

}  // namespace
}  // namespace gatework
