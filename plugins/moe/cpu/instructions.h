// The instruction sets' intrinsics and tests for them; with GATEWORK_EMULATE, by SIMDe's portable headers, so that code for any
// processor can be checked on any other.
#pragma once

#if defined(GATEWORK_EMULATE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/arm/neon.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include <cmath>
#define GATEWORK_HAS(feature) true
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC

// What SIMDe lacks.
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  const simde__m256i_private from = simde__m256i_to_private(a);
  simde__m512i_private to;
  for (int i = 0; i < 16; ++i) to.u32[i] = from.u16[i];
  return simde__m512i_from_private(to);
}
inline __m256 _mm512_extractf32x8_ps(__m512 a, int half) {
  return simde__m512_to_private(a).m256[half];
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  const simde__m512i_private from = simde__m512i_to_private(a);
  simde__m512_private to;
  for (int i = 0; i < 16; ++i) to.f32[i] = float(from.i32[i]);
  return simde__m512_from_private(to);
}
inline __m512i _mm512_srai_epi32(__m512i a, int bits) {
  simde__m512i_private shifted = simde__m512i_to_private(a);
  for (int i = 0; i < 16; ++i) shifted.i32[i] >>= bits;
  return simde__m512i_from_private(shifted);
}
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
  const simde__m512_private from[] = {simde__m512_to_private(a), simde__m512_to_private(b)};
  simde__m512_private to;
  for (int i = 0; i < 4; ++i) to.m128[i] = from[i / 2].m128[order >> 2 * i & 3];
  return simde__m512_from_private(to);
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  simde__m512_private to;
  for (int half = 0; half < 2; ++half) to.m256[half] = _mm256_cvtph_ps(simde__m256i_to_private(a).m128i[half]);
  return simde__m512_from_private(to);
}
inline __m256i _mm512_cvtps_ph(__m512 a, int rounding) {
  simde__m256i_private to;
  for (int half = 0; half < 2; ++half)
    to.m128i[half] = _mm256_cvtps_ph(simde__m512_to_private(a).m256[half], rounding);
  return simde__m256i_from_private(to);
}

// What it rounds twice.
#undef _mm256_fmadd_ps
#undef _mm512_fmadd_ps
#undef vfmaq_f32
inline __m256 _mm256_fmadd_ps(__m256 a, __m256 b, __m256 c) {
  for (int i = 0; i < 8; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const simde__m512_private x = simde__m512_to_private(a), y = simde__m512_to_private(b);
  simde__m512_private sum = simde__m512_to_private(c);
  for (int i = 0; i < 16; ++i) sum.f32[i] = std::fma(x.f32[i], y.f32[i], sum.f32[i]);
  return simde__m512_from_private(sum);
}
inline float32x4_t vfmaq_f32(float32x4_t c, float32x4_t a, float32x4_t b) {
  for (int i = 0; i < 4; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}
#elif defined(GATEWORK_X86)
#include <immintrin.h>
#define GATEWORK_HAS(feature) bool(__builtin_cpu_supports(feature))
#elif defined(GATEWORK_ARM)
#include <arm_neon.h>
#endif
