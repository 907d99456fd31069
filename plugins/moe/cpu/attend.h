// Attention's loops, written once over 16 floats of an instruction set. Included by tile.h.
//
// An instruction set's `Lanes` provide
//   Floats        16 of them, with load, store, all (one number, 16 times), add, mul, and fma(a, b, c) = a * b + c rounded once;
//                 load and store take Halfs, too, see Kernels
//   sum(a)        of the 16: halves are added until one is left
//   sums(a, y)    y[i] = sum(a[i]) of kSums of them, which there are registers for
//   kColumns      groups of 16 columns that six rows of sums leave registers for
#pragma once

#include <algorithm>

#include "layout.h"

namespace gatework {
namespace {

constexpr int kKeys = 48;    // looked at together
constexpr int kDepth = 128;  // elements of a head that are multiplied at a time
constexpr int kRowTile = 6;  // rows whose sums stay in registers
constexpr int kMany = 8;     // so many rows repay turning them round

constexpr float kUnseen = -3e38f;  // instead of the score of a key that a query must not see

// A matrix whose element (r, k) is data[r * row + k * column].
struct Factors {
  const float* data;
  size_t row, column;

  Factors from(int r) const { return {data + r * row, row, column}; }
};

// c [R, 16 * F] += a [R, depth] * b [depth, 16 * F]
template <class Lanes, int R, int F, class Number>
inline void add_product(Factors a, int depth, const Number* b, size_t b_stride, float* c, size_t c_stride) {
  typename Lanes::Floats sums[R][F];  // in registers, if every loop over them is unrolled
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) sums[r][f] = Lanes::load(c + r * c_stride + 16 * f);
  for (int k = 0; k < depth; ++k, b += b_stride, a.data += a.column) {
    typename Lanes::Floats columns[F];
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) columns[f] = Lanes::load(b + 16 * f);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename Lanes::Floats factor = Lanes::all(a.data[r * a.row]);
#pragma GCC unroll 8
      for (int f = 0; f < F; ++f) sums[r][f] = Lanes::fma(factor, columns[f], sums[r][f]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) Lanes::store(c + r * c_stride + 16 * f, sums[r][f]);
}

template <class Lanes, int R, class Number>
inline void add_rows(Factors a, int depth, const Number* b, size_t b_stride, int columns, float* c, size_t c_stride) {
  int n = 0;
  for (; columns - n >= 16 * Lanes::kColumns; n += 16 * Lanes::kColumns)
    add_product<Lanes, R, Lanes::kColumns>(a, depth, b + n, b_stride, c + n, c_stride);
  for (; n < columns; n += 16) add_product<Lanes, R, 1>(a, depth, b + n, b_stride, c + n, c_stride);
}

// c [rows, columns] += a [rows, depth] * b [depth, columns]; columns a multiple of 16
template <class Lanes, class Number>
inline void add_products(Factors a, int rows, int depth, const Number* b, size_t b_stride, int columns, float* c,
                         size_t c_stride) {
  int r = 0;
  for (; rows - r >= kRowTile; r += kRowTile)
    add_rows<Lanes, kRowTile>(a.from(r), depth, b, b_stride, columns, c + r * c_stride, c_stride);
  for (; rows - r >= 4; r += 4) add_rows<Lanes, 4>(a.from(r), depth, b, b_stride, columns, c + r * c_stride, c_stride);
  for (; rows - r >= 2; r += 2) add_rows<Lanes, 2>(a.from(r), depth, b, b_stride, columns, c + r * c_stride, c_stride);
  if (r < rows) add_rows<Lanes, 1>(a.from(r), depth, b, b_stride, columns, c + r * c_stride, c_stride);
}

// scores [R, kKeys] of R queries from the one at q on, a few keys at a time.
template <class Lanes, int R>
inline void scores_of(const Head& head, const float* q, int begin, int keys, float (*scores)[kKeys]) {
  constexpr int kAtOnce = Lanes::kSums / R;
  for (int j = 0; j < keys; j += kAtOnce) {
    const Half* key[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) key[i] = head.keys + size_t(begin + std::min(j + i, keys - 1)) * head.width;
    typename Lanes::Floats sums[Lanes::kSums];
#pragma GCC unroll 16
    for (typename Lanes::Floats& sum : sums) sum = Lanes::all(0.0f);
    for (int d = 0; d < head.width; d += 16) {
      typename Lanes::Floats columns[kAtOnce];
#pragma GCC unroll 16
      for (int i = 0; i < kAtOnce; ++i) columns[i] = Lanes::load(key[i] + d);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const typename Lanes::Floats factors = Lanes::load(q + size_t(r) * head.width + d);
#pragma GCC unroll 16
        for (int i = 0; i < kAtOnce; ++i) sums[r * kAtOnce + i] = Lanes::fma(factors, columns[i], sums[r * kAtOnce + i]);
      }
    }
    alignas(64) float each[Lanes::kSums];
    Lanes::sums(sums, each);
    for (int r = 0; r < R; ++r) std::copy_n(each + r * kAtOnce, kAtOnce, scores[r] + j);
  }
}

// scores [rows, kKeys] of a few queries
template <class Lanes>
inline void scores_by_key(const Head& head, const Queries& queries, int begin, int keys, float (*scores)[kKeys]) {
  int r = 0;
  const auto q = [&] { return queries.q + size_t(r) * head.width; };
  for (; queries.rows - r >= 4; r += 4) scores_of<Lanes, 4>(head, q(), begin, keys, scores + r);
  for (; queries.rows - r >= 2; r += 2) scores_of<Lanes, 2>(head, q(), begin, keys, scores + r);
  if (r < queries.rows) scores_of<Lanes, 1>(head, q(), begin, keys, scores + r);
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

// A few queries: their scores are [rows, keys].
template <class Lanes>
void attend_few(const Head& head, const Queries& queries, int begin, int end, float* y, float* top, float* total) {
  alignas(64) float scores[kMany][kKeys];
  std::fill_n(top, queries.rows, kUnseen);
  std::fill_n(total, queries.rows, 0.0f);
  for (; begin < end; begin += kKeys) {
    const int keys = std::min(kKeys, end - begin);
    scores_by_key<Lanes>(head, queries, begin, keys, scores);
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
    add_products<Lanes>({scores[0], kKeys, 1}, queries.rows, keys, head.values + size_t(begin) * head.width, head.width,
                        head.width, y, head.width);
  }
}

// Many queries: their scores are [keys, rows], so that 16 rows are worked on at once and the queries alone, not the keys, have
// to be turned round.
struct Many {
  int rows;                             // a multiple of 16; those beyond the queries' are of no account
  int first[kMaxRows], last[kMaxRows];  // keys that a row sees
  float slopes[kMaxRows];
  alignas(64) float top[kMaxRows], total[kMaxRows];
  alignas(64) float turned[kDepth][kMaxRows];  // queries
  alignas(64) float scores[kKeys][kMaxRows];
  alignas(64) float widened[kKeys][kDepth];  // keys or values
};

// Elements of some keys or values, [keys, depth], as floats.
template <class Lanes>
inline void widen(const Half* rows, size_t stride, int keys, int depth, float (*y)[kDepth]) {
  for (int j = 0; j < keys; ++j)
    for (int d = 0; d < depth; d += 16) Lanes::store(y[j] + d, Lanes::load(rows + size_t(j) * stride + d));
}

inline void begin_many(const Queries& queries, Many& many) {
  many.rows = (queries.rows + 15) / 16 * 16;
  for (int r = 0; r < many.rows; ++r) {
    many.last[r] = queries.position + std::min(r, queries.rows - 1) / queries.group;
    many.first[r] = queries.window ? many.last[r] - queries.window + 1 : 0;
    many.slopes[r] = queries.slopes ? queries.slopes[r % queries.group] : 0.0f;
  }
  std::fill_n(many.top, many.rows, kUnseen);
  std::fill_n(many.total, many.rows, 0.0f);
}

// The queries' elements from `start` on.
inline void turn(const Head& head, const Queries& queries, int start, int depth, Many& many) {
  for (int d = 0; d < depth; ++d) {
    for (int r = 0; r < queries.rows; ++r) many.turned[d][r] = queries.q[size_t(r) * head.width + start + d];
    std::fill(many.turned[d] + queries.rows, many.turned[d] + many.rows, 0.0f);
  }
}

template <class Lanes>
inline void score_many(const Head& head, const Queries& queries, int begin, int keys, int& turned, Many& many) {
  for (int j = 0; j < keys; ++j) std::fill_n(many.scores[j], many.rows, 0.0f);
  for (int start = 0; start < head.width; start += kDepth) {
    const int depth = std::min(kDepth, head.width - start);
    if (turned != start) turn(head, queries, start, depth, many);
    turned = start;
    widen<Lanes>(head.keys + size_t(begin) * head.width + start, head.width, keys, depth, many.widened);
    add_products<Lanes>({many.widened[0], kDepth, 1}, keys, depth, many.turned[0], kMaxRows, many.rows, many.scores[0],
                        kMaxRows);
  }
  for (int j = 0; j < keys; ++j) {
    float* scores = many.scores[j];
    if (head.softcap > 0.0f) cap(scores, many.rows, head.softcap);
    if (queries.slopes)
      for (int r = 0; r < many.rows; ++r) scores[r] += many.slopes[r] * float(begin + j - many.last[r]);
  }
  if (begin + keys - 1 > many.last[0] || begin < many.first[many.rows - 1])
    for (int j = 0; j < keys; ++j)
      for (int r = 0; r < many.rows; ++r)
        many.scores[j][r] = (begin + j <= many.last[r]) & (begin + j >= many.first[r]) ? many.scores[j][r] : kUnseen;
}

// Turns scores into weights, exp(score - top). kept [rows]: what the sums so far are to be multiplied by.
inline void weigh_many(int keys, Many& many, float* kept) {
  alignas(64) float most[kMaxRows], sums[kMaxRows];
  std::copy_n(many.top, many.rows, most);
  for (int j = 0; j < keys; ++j)
    for (int r = 0; r < many.rows; ++r) most[r] = many.scores[j][r] > most[r] ? many.scores[j][r] : most[r];
  for (int r = 0; r < many.rows; ++r) kept[r] = exponential(many.top[r] - most[r]);
  std::fill_n(sums, many.rows, 0.0f);
  for (int j = 0; j < keys; ++j) {
    float* scores = many.scores[j];
    for (int r = 0; r < many.rows; ++r) {
      const float weight = exponential(scores[r] - most[r]);
      scores[r] = scores[r] <= kUnseen ? 0.0f : weight;
      sums[r] += scores[r];
    }
  }
  for (int r = 0; r < many.rows; ++r) many.total[r] = many.total[r] * kept[r] + sums[r];
  std::copy_n(most, many.rows, many.top);
}

template <class Lanes>
void attend_many(const Head& head, const Queries& queries, int begin, int end, float* y, float* top, float* total) {
  Many many;
  alignas(64) float kept[kMaxRows];
  begin_many(queries, many);
  for (int turned = -1; begin < end; begin += kKeys) {
    const int keys = std::min(kKeys, end - begin);
    score_many<Lanes>(head, queries, begin, keys, turned, many);
    weigh_many(keys, many, kept);
    for (int r = 0; r < queries.rows; ++r)
      if (kept[r] != 1.0f)
        for (int d = 0; d < head.width; ++d) y[size_t(r) * head.width + d] *= kept[r];
    for (int start = 0; start < head.width; start += kDepth) {
      const int columns = std::min(kDepth, head.width - start);
      widen<Lanes>(head.values + size_t(begin) * head.width + start, head.width, keys, columns, many.widened);
      add_products<Lanes>({many.scores[0], 1, kMaxRows}, queries.rows, keys, many.widened[0], kDepth, columns, y + start,
                          head.width);
    }
  }
  std::copy_n(many.top, queries.rows, top);
  std::copy_n(many.total, queries.rows, total);
}

template <class Lanes>
void attend(const Head& head, const Queries& queries, int begin, int end, float* y, float* top, float* total) {
  std::fill_n(y, size_t(queries.rows) * head.width, 0.0f);
  (queries.rows < kMany ? attend_few<Lanes> : attend_many<Lanes>)(head, queries, begin, end, y, top, total);
}

template <class Lanes>
void to_halves(const float* x, int count, Half* y) {
  for (int i = 0; i < count; i += 16) Lanes::store(y + i, Lanes::load(x + i));
}

}  // namespace
}  // namespace gatework
