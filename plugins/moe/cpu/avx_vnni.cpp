// AVX-VNNI: vpdpbusd, four products of an unsigned and a signed byte in each 32-bit lane, on 256 bits.
#include "instructions.h"
#include "rows256.h"
#include "tile.h"

namespace gatework {
namespace {

struct AvxVnni : Rows256 {
  static constexpr int kTile = 4;
  static constexpr bool kWords = false;
  static constexpr int offset(int bits) { return bits == 8 ? 128 : 8; }

  template <int T>
  static void accumulate(Sums (&sums)[T], __m256i low, __m256i high, const int8_t* const* x, int offset) {
    for (int t = 0; t < T; ++t) {
      const __m256i columns = _mm256_set1_epi32(four_codes(x[t] + offset));
      sums[t].low = _mm256_dpbusd_avx_epi32(sums[t].low, low, columns);
      sums[t].high = _mm256_dpbusd_avx_epi32(sums[t].high, high, columns);
    }
  }

  template <int bits, int T>
  static void dot(const uint8_t* w, const int8_t* const* x, int steps, const int32_t* first, Sums (&sums)[T]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int t = 0; t < T; ++t) sums[t].low = sums[t].high = _mm256_set1_epi32(first[t]);
    for (int s = 0; s < steps; ++s, w += kStepBytes) {
      read_ahead<bits == 8 ? 2 * T : 4 * T + 6>(w);
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
};

}  // namespace

extern const Kernels kAvxVnni;
const Kernels kAvxVnni = kernels_of<AvxVnni>("avx_vnni", [] {
  return GATEWORK_HAS("avx2") && GATEWORK_HAS("fma") && GATEWORK_HAS("avxvnni");
});

}  // namespace gatework
