// Norms and routers, in float32, written once over 16 floats of an instruction set (Lanes, see attend.h). Included by tile.h.
#pragma once

#include <cmath>

#include "layout.h"

namespace gatework {
namespace {

constexpr int kRouterRows = 4, kRouterTokens = 2;  // whose sums stay in registers

// sums[t][r] = w [R, count] times x [T, count], row times row
template <class Lanes, int T, int R>
inline void inner_products(const float* w, const float* x, int count, float (&sums)[T][R]) {
  typename Lanes::Floats parts[T][R];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) parts[t][r] = Lanes::all(0.0f);
  const auto add = [&](const float* rows, const float* tokens, size_t stride) {
    typename Lanes::Floats columns[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) columns[r] = Lanes::load(rows + r * stride);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const typename Lanes::Floats token = Lanes::load(tokens + t * stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) parts[t][r] = Lanes::fma(token, columns[r], parts[t][r]);
    }
  };
  int i = 0;
  for (; i + 16 <= count; i += 16) add(w + i, x + i, size_t(count));
  if (i < count) {
    float rows[R][16] = {}, tokens[T][16] = {};
    for (int r = 0; r < R; ++r) std::copy_n(w + size_t(r) * count + i, count - i, rows[r]);
    for (int t = 0; t < T; ++t) std::copy_n(x + size_t(t) * count + i, count - i, tokens[t]);
    add(rows[0], tokens[0], 16);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[t][r] = Lanes::sum(parts[t][r]);
}

template <class Lanes, int T, int R>
inline void score_tile(const float* w, const float* x, int count, float* y, int stride) {
  float sums[T][R];
  inner_products<Lanes, T, R>(w, x, count, sums);
  for (int t = 0; t < T; ++t) std::copy_n(sums[t], R, y + size_t(t) * stride);
}

template <class Lanes, int T>
inline void score_tokens(const float* w, int rows, const float* x, int count, float* y) {
  int r = 0;
  for (; r + kRouterRows <= rows; r += kRouterRows)
    score_tile<Lanes, T, kRouterRows>(w + size_t(r) * count, x, count, y + r, rows);
  for (; r < rows; ++r) score_tile<Lanes, T, 1>(w + size_t(r) * count, x, count, y + r, rows);
}

template <class Lanes>
void score(const float* w, int rows, const float* x, int tokens, int count, float* y) {
  int t = 0;
  for (; t + kRouterTokens <= tokens; t += kRouterTokens)
    score_tokens<Lanes, kRouterTokens>(w, rows, x + size_t(t) * count, count, y + size_t(t) * rows);
  for (; t < tokens; ++t) score_tokens<Lanes, 1>(w, rows, x + size_t(t) * count, count, y + size_t(t) * rows);
}

template <class Lanes>
inline float mean(const float* x, int count) {
  typename Lanes::Floats sums = Lanes::all(0.0f);
  int i = 0;
  for (; i + 16 <= count; i += 16) sums = Lanes::add(sums, Lanes::load(x + i));
  float rest[16] = {};
  std::copy_n(x + i, count - i, rest);
  return Lanes::sum(Lanes::add(sums, Lanes::load(rest))) / float(count);
}

template <class Lanes>
void normalize(const Norm& norm, const float* x, int count, float* y) {
  if (norm.centred) {
    const float middle = mean<Lanes>(x, count);
    for (int i = 0; i < count; ++i) y[i] = x[i] - middle;
    x = y;
  }
  float squares[1][1];
  inner_products<Lanes, 1, 1>(x, x, count, squares);
  const float inverse = 1.0f / std::sqrt(squares[0][0] / float(count) + norm.epsilon);
  for (int i = 0; i < count; ++i) y[i] = x[i] * inverse * norm.gamma[i];
}

}  // namespace
}  // namespace gatework
