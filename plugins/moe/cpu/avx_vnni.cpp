// AVX-VNNI: vpdpbusd, four products of an unsigned and a signed byte in each 32-bit lane, on 256 bits.
#include "instructions.h"
#include "tile.h"

namespace gatework {
namespace {

struct AvxVnni {
  struct Sums {
    __m256i low, high;  // rows 0-7, rows 8-15
  };
  static constexpr int kTile = 4;
  static constexpr bool kWords = false;
  static constexpr int offset(int bits) { return bits == 8 ? 128 : 8; }

  static __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

  template <int T>
  static void accumulate(Sums (&sums)[T], __m256i low, __m256i high, const int8_t* const* x, int offset) {
    for (int t = 0; t < T; ++t) {
      const __m256i columns = _mm256_set1_epi32(four_codes(x[t] + offset));
      sums[t].low = _mm256_dpbusd_avx_epi32(sums[t].low, low, columns);
      sums[t].high = _mm256_dpbusd_avx_epi32(sums[t].high, high, columns);
    }
  }

  template <int bits, int T>
  static void dot(const uint8_t* w, const int8_t* const* x, int steps, Sums (&sums)[T]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int t = 0; t < T; ++t) sums[t].low = sums[t].high = _mm256_setzero_si256();
    for (int s = 0; s < steps; ++s, w += kStepBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(w) + 2048, _MM_HINT_T0);
      const __m256i low = load(w), high = load(w + 32);
      if constexpr (bits == 8) {
        accumulate<T>(sums, low, high, x, 4 * s);
      } else {
        accumulate<T>(sums, _mm256_and_si256(low, nibble), _mm256_and_si256(high, nibble), x, 8 * s);
        accumulate<T>(sums, _mm256_and_si256(_mm256_srli_epi16(low, 4), nibble),
                      _mm256_and_si256(_mm256_srli_epi16(high, 4), nibble), x, 8 * s + 4);
      }
    }
  }

  static Sums join(const Sums& high, const Sums& low) {
    return {_mm256_add_epi32(_mm256_slli_epi32(high.low, 8), low.low),
            _mm256_add_epi32(_mm256_slli_epi32(high.high, 8), low.high)};
  }

  static void add(const Sums& sums, int32_t correction, const uint16_t* w_scales, float x_scale, float* acc) {
    add_half(sums.low, correction, w_scales, x_scale, acc);
    add_half(sums.high, correction, w_scales + 8, x_scale, acc + 8);
  }

  static void add_half(__m256i sums, int32_t correction, const uint16_t* w_scales, float x_scale, float* acc) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w_scales));
    const __m256 scales = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(correction)));
    const __m256 part = _mm256_mul_ps(sum, _mm256_mul_ps(scales, _mm256_set1_ps(x_scale)));
    _mm256_store_ps(acc, _mm256_add_ps(_mm256_load_ps(acc), part));
  }
};

}  // namespace

extern const Kernels kAvxVnni;
const Kernels kAvxVnni = kernels_of<AvxVnni>("avx_vnni", [] { return GATEWORK_HAS("avx2") && GATEWORK_HAS("avxvnni"); });

}  // namespace gatework
