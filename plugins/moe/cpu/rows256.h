// The 16 rows of a block, and 16 floats, in two registers of 256 bits.
#pragma once

#include <cstdint>

#include "instructions.h"
#include "layout.h"

namespace gatework {
namespace {

// Asks for weights in time: so far ahead, and into the second cache, because arithmetic for a few tokens must not wait for memory,
// nor memory for arithmetic. Where a step takes few instructions the processor by itself runs ahead far enough, and would only be
// held up.
template <int instructions>
inline void read_ahead(const uint8_t* w) {
  if constexpr (instructions > 5) _mm_prefetch(reinterpret_cast<const char*>(w) + 6144, _MM_HINT_T1);
}

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// Halves are added until one is left.
inline float sum_of(__m256 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

struct Lanes256 {
  struct Floats {
    __m256 low, high;
  };
  static constexpr int kColumns = 1, kSums = 4;

  static Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Floats load(const Half* p) { return {eight(p), eight(p + 8)}; }
  static void store(float* p, const Floats& a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
  }
  static void store(Half* p, const Floats& a) {
    put_eight(p, a.low);
    put_eight(p + 8, a.high);
  }
  static Floats add(const Floats& a, const Floats& b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static Floats mul(const Floats& a, const Floats& b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static float sum(const Floats& a) { return sum_of(_mm256_add_ps(a.low, a.high)); }
  static void sums(const Floats (&a)[kSums], float* y) {
    __m256 eight[kSums];
    for (int i = 0; i < kSums; ++i) eight[i] = _mm256_add_ps(a[i].low, a[i].high);
    const __m256 fours01 = fours(eight[0], eight[1]), fours23 = fours(eight[2], eight[3]);
    const __m256 twos = _mm256_add_ps(_mm256_shuffle_ps(fours01, fours23, 0x44), _mm256_shuffle_ps(fours01, fours23, 0xee));
    const __m256 ones = _mm256_add_ps(twos, _mm256_movehdup_ps(twos));  // 0 - 2 - | 1 - 3 -
    const __m128 even = _mm256_castps256_ps128(ones), odd = _mm256_extractf128_ps(ones, 1);
    const __m128 mixed = _mm_unpacklo_ps(even, odd), rest = _mm_unpackhi_ps(even, odd);  // 0 1 - -, 2 3 - -
    _mm_storeu_ps(y, _mm_movelh_ps(mixed, rest));
  }

 private:
  // What the halves of each add up to.
  static __m256 fours(__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  static __m256 eight(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void put_eight(Half* p, __m256 a) {
    const __m256 most = _mm256_set1_ps(kLargestHalf), least = _mm256_set1_ps(-kLargestHalf);
    const __m256 within = _mm256_max_ps(least, _mm256_min_ps(most, a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(within, kNearest));
  }
};

struct Rows256 {
  using Lanes = Lanes256;
  struct Sums {
    __m256i low, high;  // rows 0-7, rows 8-15
  };

  static __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Sums join(const Sums& high, const Sums& low) {
    return {_mm256_add_epi32(_mm256_slli_epi32(high.low, 8), low.low),
            _mm256_add_epi32(_mm256_slli_epi32(high.high, 8), low.high)};
  }
  static Lanes::Floats numbers(const Sums& sums) { return {_mm256_cvtepi32_ps(sums.low), _mm256_cvtepi32_ps(sums.high)}; }
  static Lanes::Floats scales(const uint16_t* p) { return {half(p), half(p + 8)}; }

 private:
  static __m256 half(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
};

}  // namespace
}  // namespace gatework
