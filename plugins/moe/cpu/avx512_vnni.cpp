// AVX-512 VNNI: vpdpbusd on 512 bits, one instruction per step and token.
#include "instructions.h"
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
  static void dot(const uint8_t* w, const int8_t* const* x, int steps, Sums (&sums)[T]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_si512();
    for (int s = 0; s < steps; ++s, w += kStepBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(w) + 2048, _MM_HINT_T0);
      const __m512i codes = _mm512_loadu_si512(w);
      if constexpr (bits == 8) {
        accumulate<T>(sums, codes, x, 4 * s);
      } else {
        accumulate<T>(sums, _mm512_and_si512(codes, nibble), x, 8 * s);
        accumulate<T>(sums, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble), x, 8 * s + 4);
      }
    }
  }

  static Sums join(Sums high, Sums low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }

  static void add(Sums sums, int32_t correction, const uint16_t* w_scales, float x_scale, float* acc) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w_scales));
    const __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(correction)));
    const __m512 part = _mm512_mul_ps(sum, _mm512_mul_ps(scales, _mm512_set1_ps(x_scale)));
    _mm512_store_ps(acc, _mm512_add_ps(_mm512_load_ps(acc), part));
  }
};

}  // namespace

extern const Kernels kAvx512Vnni;
const Kernels kAvx512Vnni = kernels_of<Avx512Vnni>("avx512_vnni", [] {
  return GATEWORK_HAS("avx512f") && GATEWORK_HAS("avx512bw") && GATEWORK_HAS("avx512vl") && GATEWORK_HAS("avx512dq") &&
         GATEWORK_HAS("avx512vnni");
});

}  // namespace gatework
