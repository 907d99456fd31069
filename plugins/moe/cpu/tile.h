// The loops of a kernel, written once over a few operations of an instruction set. Included by one file per instruction set,
// each compiled with its own flags; everything has internal linkage, so that no two of them are merged by the linker.
//
// An instruction set `Isa` provides
//   Sums                     16 int32, one per row of a block
//   kTile                    tokens that fit its registers
//   offset(bits)             what it adds to the weights' q when it multiplies
//   dot<bits, T>(w, x, steps, first, sums)   sums[t] = first[t] + sum of (q + offset) * x[t] over the steps, for T tokens
//   kWords                   whether `wide` activations for 8-bit weights are kept as 16-bit words instead of two codes, those of
//                            columns 0 2 1 3 of each step, and multiplied by words<T>(w, x, steps, sums)
//   join(high, low)          256 * high + low
//   numbers(sums)            as Lanes::Floats
//   scales(p)                16 bfloat16 as Lanes::Floats
//   Lanes                    arithmetic on 16 floats, see attend.h
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "layout.h"

namespace gatework {
namespace {

inline int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float from_bfloat16(uint16_t bits) { return float_of(int32_t(uint32_t(bits) << 16)); }

inline int32_t four_codes(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, sizeof word);
  return word;
}

template <class Isa, int bits, int streams, int T>
inline void tile(const Columns& k, const Block& block, const Token* x, float* y, size_t stride) {
  using Lanes = typename Isa::Lanes;
  typename Lanes::Floats acc[T];
  for (int t = 0; t < T; ++t) acc[t] = Lanes::all(0.0f);
  const uint8_t* w = block.codes;
  const int groups = k.groups(), steps = k.group / step_columns(bits), padded = k.padded();
  for (int g = 0; g < groups; ++g) {
    typename Isa::Sums sums[T * streams];
    if constexpr (streams == 2 && bits == 8 && Isa::kWords) {
      const int16_t* words[T];
      for (int t = 0; t < T; ++t) words[t] = reinterpret_cast<const int16_t*>(x[t].codes) + size_t(g) * k.group;
      Isa::template words<T>(w, words, steps, sums);
    } else {
      const int8_t* codes[T * streams];
      int32_t first[T * streams] = {};
      for (int t = 0; t < T; ++t) {
        for (int s = 0; s < streams; ++s) codes[t * streams + s] = x[t].codes + size_t(s) * padded + size_t(g) * k.group;
        first[t * streams + streams - 1] = -Isa::offset(bits) * x[t].sums[g];
      }
      Isa::template dot<bits, T * streams>(w, codes, steps, first, sums);
      if constexpr (streams == 2)
        for (int t = 0; t < T; ++t) sums[t] = Isa::join(sums[2 * t], sums[2 * t + 1]);
    }
    const typename Lanes::Floats scales = Isa::scales(block.scales + size_t(g) * kRows);
    for (int t = 0; t < T; ++t)
      acc[t] = Lanes::fma(Isa::numbers(sums[t]), Lanes::mul(scales, Lanes::all(x[t].scales[g])), acc[t]);
    w += size_t(steps) * kStepBytes;
  }
  for (int t = 0; t < T; ++t) Lanes::store(y + t * stride, acc[t]);
}

// The last tokens, fewer than T, in one tile: each more would read the weights again.
template <class Isa, int bits, int streams, int T>
inline void rest(const Columns& k, const Block& block, const Token* x, int tokens, float* y, size_t stride) {
  if constexpr (T > 1) {
    if (tokens == T - 1)
      tile<Isa, bits, streams, T - 1>(k, block, x, y, stride);
    else
      rest<Isa, bits, streams, T - 1>(k, block, x, tokens, y, stride);
  }
}

template <class Isa, int bits, int streams, int T>
inline void tiles(const Columns& k, const Block& block, const Token* x, int tokens, float* y, size_t stride) {
  for (; tokens >= T; tokens -= T, x += T, y += T * stride) tile<Isa, bits, streams, T>(k, block, x, y, stride);
  rest<Isa, bits, streams, T>(k, block, x, tokens, y, stride);
}

template <class Isa, int bits>
inline void products(const Columns& k, const Block& block, const Token* x, int tokens, float* y, size_t stride) {
  if (k.wide)
    tiles<Isa, bits, 2, bits == 8 && Isa::kWords ? Isa::kTile : Isa::kTile / 2>(k, block, x, tokens, y, stride);
  else
    tiles<Isa, bits, 1, Isa::kTile>(k, block, x, tokens, y, stride);
}

template <class Isa>
void product(const Columns& k, const Block& block, const Token* x, int tokens, float* y, size_t stride) {
  if (k.bits == 8)
    products<Isa, 8>(k, block, x, tokens, y, stride);
  else
    products<Isa, 4>(k, block, x, tokens, y, stride);
}

// Rounds to the nearest integer, halves to even, as long as |x| < 2^22; the integer is in the low bits of the result.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23

constexpr int kBatch = 256;  // numbers quantised at once, in arrays of their own, so that a compiler knows that nothing overlaps

// The low bytes of n codes, with 4-bit weights in the order of a step: of each eight the even ones, then the odd ones.
inline void store_bytes(const Columns& k, const int32_t* codes, int n, int8_t* place) {
  int8_t bytes[kBatch];
  if (k.bits == 4) {
    for (int i = 0; i < n; i += 8)
      for (int j = 0; j < 4; ++j) {
        bytes[i + j] = int8_t(codes[i + 2 * j]);
        bytes[i + 4 + j] = int8_t(codes[i + 2 * j + 1]);
      }
  } else {
    for (int i = 0; i < n; ++i) bytes[i] = int8_t(codes[i]);
  }
  std::memcpy(place, bytes, n);
}

// Writes n rounded numbers from column `place` on; returns the sum of what stands for them.
template <class Isa>
inline int32_t store_codes(const Columns& k, const int32_t* rounded, int n, int8_t* codes, int place) {
  int32_t sum = 0;
  if (!k.wide) {
    for (int i = 0; i < n; ++i) sum += rounded[i];
    store_bytes(k, rounded, n, codes + place);
    return sum;
  }
  int32_t high[kBatch], low[kBatch];
  for (int i = 0; i < n; ++i) {
    high[i] = (rounded[i] + 128) >> 8;
    low[i] = std::max(rounded[i] - 256 * high[i], -127);  // -128 has no positive twin
    sum += 256 * high[i] + low[i];
  }
  if (k.bits == 8 && Isa::kWords) {
    int16_t words[kBatch];
    for (int i = 0; i < n; ++i) words[i] = int16_t(256 * high[i] + low[i]);
    for (int i = 0; i < n; i += 4) std::swap(words[i + 1], words[i + 2]);
    std::memcpy(reinterpret_cast<int16_t*>(codes) + place, words, n * sizeof *words);
  } else {
    store_bytes(k, high, n, codes + place);
    store_bytes(k, low, n, codes + k.padded() + place);
  }
  return sum;
}

template <class Isa>
void quantize(const Columns& k, const float* x, int8_t* codes, float* scales, int32_t* sums) {
  const float largest_code = k.wide ? 127.0f * 256.0f : 127.0f;
  for (int g = 0, start = 0; start < k.count; ++g, start += k.group) {
    const int count = std::min(k.group, k.count - start);
    int32_t top = 0;  // the largest magnitude's bits, whose order is that of the numbers
    for (int i = start; i < start + count; ++i) top = std::max(top, bits_of(x[i]) & 0x7fffffff);
    const float largest = float_of(top);
    const bool finite = top < 0x7f800000;
    const float inverse = finite && largest > 1e-30f ? largest_code / largest : 0.0f;
    scales[g] = inverse > 0.0f ? largest / largest_code : finite ? 0.0f : NAN;
    sums[g] = 0;
    for (int first = 0; first < k.group; first += kBatch) {
      const int n = std::min(kBatch, k.group - first), given = std::max(0, std::min(n, count - first));
      float values[kBatch];
      int32_t rounded[kBatch];
      std::copy_n(x + start + first, given, values);
      std::fill_n(values + given, n - given, 0.0f);
      for (int i = 0; i < n; ++i) rounded[i] = bits_of(values[i] * inverse + kRounder) - bits_of(kRounder);
      sums[g] += store_codes<Isa>(k, rounded, n, codes, start + first);
    }
  }
}

// e^x to 2 units in the last place, by the Cephes library's polynomial (netlib.org/cephes, expf.c).
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504088896341f + kRounder;
  const float n = shifted - kRounder;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  return p * float_of(int32_t((uint32_t(bits_of(shifted)) + 127u) << 23));  // 2^n
}

template <class Isa>
void activate(Activation activation, float* z, int count) {
  switch (activation) {
    case Activation::silu:
      for (int i = 0; i < count; ++i) z[i] = z[i] / (1.0f + exponential(-z[i]));
      break;
    case Activation::gelu:
      for (int i = 0; i < count; ++i) z[i] = z[i] * (0.5f + 0.5f * ::erff(z[i] * 0.70710678118654752f));
      break;
    case Activation::gelu_tanh:
      for (int i = 0; i < count; ++i) {
        const float u = 0.79788456080286536f * (z[i] + 0.044715f * z[i] * z[i] * z[i]);
        z[i] = z[i] * (1.0f - 1.0f / (exponential(2.0f * u) + 1.0f));  // 0.5 z (1 + tanh u)
      }
      break;
    case Activation::relu:
      for (int i = 0; i < count; ++i) z[i] = z[i] < 0.0f ? 0.0f : z[i];
      break;
  }
}

inline void open_gate(const Gate& settings, float* gate, const float* up, int count) {
  const float limit = settings.limit > 0.0f ? settings.limit : INFINITY;
  for (int i = 0; i < count; ++i) {
    const float g = gate[i] > limit ? limit : gate[i];
    const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
    gate[i] = g / (1.0f + exponential(-settings.alpha * g)) * (u + settings.beta);
  }
}

}  // namespace
}  // namespace gatework

#include "attend.h"
#include "normalize.h"

namespace gatework {
namespace {

template <class Isa>
constexpr Kernels kernels_of(const char* name, bool (*supported)()) {
  using Lanes = typename Isa::Lanes;
  return {name,          supported,        product<Isa>,     quantize<Isa>, activate<Isa>, open_gate,
          attend<Lanes>, to_halves<Lanes>, normalize<Lanes>, score<Lanes>,  exponential};
}

}  // namespace
}  // namespace gatework
