// AVX-512 VNNI: vpdpbusd on 512 bits, one instruction per step and token.
#include "instructions.h"
#include "rows256.h"
#include "tile.h"

namespace gatework {
namespace {

struct Avx512Vnni {
  using Sums = __m512i;
  static constexpr int kTile = 8;
  static constexpr bool kWords = false;
  static constexpr int offset(int bits) { return bits == 8 ? 128 : 8; }

  template <int T>
  static void accumulate(Sums (&sums)[T], __m512i w, const int8_t* const* x, int offset) {
    for (int t = 0; t < T; ++t)
      sums[t] = _mm512_dpbusd_epi32(sums[t], w, _mm512_set1_epi32(four_codes(x[t] + offset)));
  }

  template <int bits, int T>
  static void dot(const uint8_t* w, const int8_t* const* x, int steps, const int32_t* first, Sums (&sums)[T]) {
    for (int t = 0; t < T; ++t) sums[t] = _mm512_set1_epi32(first[t]);
    if constexpr (bits == 4 && T <= 2) return dot4<T>(w, x, steps, sums);
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int s = 0; s < steps; ++s, w += kStepBytes) {
      read_ahead<bits == 8 ? T : 2 * T + 3>(w);
      const __m512i codes = _mm512_loadu_si512(w);
      if constexpr (bits == 8) {
        accumulate<T>(sums, codes, x, 4 * s);
      } else {
        accumulate<T>(sums, _mm512_and_si512(codes, nibble), x, 8 * s);
        accumulate<T>(sums, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble), x, 8 * s + 4);
      }
    }
  }

  // For so few tokens that every instruction counts: upper codes as they are, 16 times too large, in sums of their own.
  template <int T>
  static void dot4(const uint8_t* w, const int8_t* const* x, int steps, Sums (&sums)[T]) {
    const __m512i lower = _mm512_set1_epi8(15), upper = _mm512_set1_epi8(char(0xf0));
    Sums high[T];
    for (int t = 0; t < T; ++t) high[t] = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int s = 0; s < steps; ++s, w += kStepBytes) {
      read_ahead<2 * T + 2>(w);
      const __m512i codes = _mm512_loadu_si512(w);
      accumulate<T>(sums, _mm512_and_si512(codes, lower), x, 8 * s);
      accumulate<T>(high, _mm512_and_si512(codes, upper), x, 8 * s + 4);
    }
    for (int t = 0; t < T; ++t) sums[t] = _mm512_add_epi32(sums[t], _mm512_srai_epi32(high[t], 4));
  }

  static Sums join(Sums high, Sums low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }

  struct Lanes {
    using Floats = __m512;
    static constexpr int kColumns = 4, kSums = 16;

    static Floats all(float value) { return _mm512_set1_ps(value); }
    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static Floats load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
    static void store(Half* p, Floats a) {
      const Floats within = _mm512_max_ps(all(-kLargestHalf), _mm512_min_ps(all(kLargestHalf), a));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(within, kNearest));
    }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static float sum(Floats a) { return sum_of(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))); }
    static void sums(const Floats (&a)[kSums], float* y) {
      Floats parts[kSums];
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) parts[i] = a[i % 4 * 4 + i / 4];  // in the order in which they come out
      halved<8, 0x44, 0xee, true>(parts);
      halved<4, 0x88, 0xdd, true>(parts);
      halved<2, 0x44, 0xee, false>(parts);
      halved<1, 0x88, 0xdd, false>(parts);
      store(y, parts[0]);
    }

   private:
    // Two at a time into one: what the halves of each add up to; quarters: whether it is whole quarters that are moved.
    template <int count, int first, int second, bool quarters>
    static void halved(Floats (&parts)[kSums]) {
#pragma GCC unroll 16
      for (int i = 0; i < count; ++i) {
        const Floats a = parts[2 * i], b = parts[2 * i + 1];
        if constexpr (quarters)
          parts[i] = add(_mm512_shuffle_f32x4(a, b, first), _mm512_shuffle_f32x4(a, b, second));
        else
          parts[i] = add(_mm512_shuffle_ps(a, b, first), _mm512_shuffle_ps(a, b, second));
      }
    }
  };

  static Lanes::Floats numbers(Sums sums) { return _mm512_cvtepi32_ps(sums); }
  static Lanes::Floats scales(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};

}  // namespace

extern const Kernels kAvx512Vnni;
const Kernels kAvx512Vnni = kernels_of<Avx512Vnni>("avx512_vnni", [] {
  return GATEWORK_HAS("avx512f") && GATEWORK_HAS("avx512bw") && GATEWORK_HAS("avx512vl") && GATEWORK_HAS("avx512dq") &&
         GATEWORK_HAS("avx512vnni");
});

}  // namespace gatework
