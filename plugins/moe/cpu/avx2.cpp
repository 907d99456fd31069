// AVX2: products of bytes in pairs (vpmaddubsw), which saturate at 16 bits. Weights of 8 bits are therefore multiplied as
// |q| times x with q's sign: 2 * 128 * 127 fits. Those of 4 bits leave room for eight pairs before they have to be widened.
// Where activations have 16 bits, words are multiplied (vpmaddwd), which takes no longer than bytes.
#include "instructions.h"
#include "rows256.h"
#include "tile.h"

namespace gatework {
namespace {

struct Avx2 : Rows256 {
  static constexpr int kTile = 4;
  static constexpr bool kWords = true;
  static constexpr int offset(int bits) { return bits == 8 ? 0 : 8; }

  template <int bits, int T>
  static void dot(const uint8_t* w, const int8_t* const* x, int steps, const int32_t* first, Sums (&sums)[T]) {
    for (int t = 0; t < T; ++t) sums[t].low = sums[t].high = _mm256_set1_epi32(first[t]);
    if constexpr (bits == 8)
      dot8<T>(w, x, steps, sums);
    else
      dot4<T>(w, x, steps, sums);
  }

  static __m256i signed_pairs(__m256i size, __m256i q, __m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(x, q)), _mm256_set1_epi16(1));
  }

  template <int T>
  static void dot8(const uint8_t* w, const int8_t* const* x, int steps, Sums (&sums)[T]) {
    const __m256i flip = _mm256_set1_epi8(char(0x80));
    for (int s = 0; s < steps; ++s, w += kStepBytes) {
      read_ahead<8 * T>(w);
      const __m256i low = _mm256_xor_si256(load(w), flip), high = _mm256_xor_si256(load(w + 32), flip);
      const __m256i low_size = _mm256_abs_epi8(low), high_size = _mm256_abs_epi8(high);
      for (int t = 0; t < T; ++t) {
        const __m256i columns = _mm256_set1_epi32(four_codes(x[t] + 4 * s));
        sums[t].low = _mm256_add_epi32(sums[t].low, signed_pairs(low_size, low, columns));
        sums[t].high = _mm256_add_epi32(sums[t].high, signed_pairs(high_size, high, columns));
      }
    }
  }

  static __m256i even_columns(__m256i q) { return _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8); }

  static __m256i odd_columns(__m256i q) { return _mm256_srai_epi16(q, 8); }

  static int32_t two_words(const int16_t* x) { return four_codes(reinterpret_cast<const int8_t*>(x)); }

  template <int T>
  static void words(const uint8_t* w, const int16_t* const* x, int steps, Sums* sums) {
    const __m256i flip = _mm256_set1_epi8(char(0x80));
    Sums total[T];
    for (int t = 0; t < T; ++t) total[t].low = total[t].high = _mm256_setzero_si256();
    for (int s = 0; s < steps; ++s, w += kStepBytes) {
      read_ahead<8 * T>(w);
      const __m256i low = _mm256_xor_si256(load(w), flip), high = _mm256_xor_si256(load(w + 32), flip);
      const __m256i low_even = even_columns(low), low_odd = odd_columns(low);
      const __m256i high_even = even_columns(high), high_odd = odd_columns(high);
      for (int t = 0; t < T; ++t) {
        const __m256i even = _mm256_set1_epi32(two_words(x[t] + 4 * s));
        const __m256i odd = _mm256_set1_epi32(two_words(x[t] + 4 * s + 2));
        total[t].low = _mm256_add_epi32(total[t].low, _mm256_madd_epi16(low_even, even));
        total[t].low = _mm256_add_epi32(total[t].low, _mm256_madd_epi16(low_odd, odd));
        total[t].high = _mm256_add_epi32(total[t].high, _mm256_madd_epi16(high_even, even));
        total[t].high = _mm256_add_epi32(total[t].high, _mm256_madd_epi16(high_odd, odd));
      }
    }
    for (int t = 0; t < T; ++t) sums[t] = total[t];
  }

  template <int T>
  static void dot4(const uint8_t* w, const int8_t* const* x, int steps, Sums (&sums)[T]) {
    constexpr int kRoom = 4;  // steps of two pairs each: 8 * 2 * 15 * 127 < 2^15
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int s = 0; s < steps;) {
      Sums pairs[T];
      for (int t = 0; t < T; ++t) pairs[t].low = pairs[t].high = _mm256_setzero_si256();
      for (const int end = s + kRoom < steps ? s + kRoom : steps; s < end; ++s, w += kStepBytes) {
        read_ahead<8 * T>(w);
        const __m256i low = load(w), high = load(w + 32);
        const __m256i low_even = _mm256_and_si256(low, nibble), high_even = _mm256_and_si256(high, nibble);
        const __m256i low_odd = _mm256_and_si256(_mm256_srli_epi16(low, 4), nibble);
        const __m256i high_odd = _mm256_and_si256(_mm256_srli_epi16(high, 4), nibble);
        for (int t = 0; t < T; ++t) {
          const __m256i even = _mm256_set1_epi32(four_codes(x[t] + 8 * s));
          const __m256i odd = _mm256_set1_epi32(four_codes(x[t] + 8 * s + 4));
          pairs[t].low = _mm256_add_epi16(pairs[t].low, _mm256_maddubs_epi16(low_even, even));
          pairs[t].low = _mm256_add_epi16(pairs[t].low, _mm256_maddubs_epi16(low_odd, odd));
          pairs[t].high = _mm256_add_epi16(pairs[t].high, _mm256_maddubs_epi16(high_even, even));
          pairs[t].high = _mm256_add_epi16(pairs[t].high, _mm256_maddubs_epi16(high_odd, odd));
        }
      }
      for (int t = 0; t < T; ++t) {
        sums[t].low = _mm256_add_epi32(sums[t].low, _mm256_madd_epi16(pairs[t].low, ones));
        sums[t].high = _mm256_add_epi32(sums[t].high, _mm256_madd_epi16(pairs[t].high, ones));
      }
    }
  }
};

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = kernels_of<Avx2>("avx2", [] { return GATEWORK_HAS("avx2") && GATEWORK_HAS("fma") && GATEWORK_HAS("f16c"); });

}  // namespace gatework
