// The instruction sets' intrinsics and tests for them; with GATEWORK_EMULATE, by SIMDe's portable headers, so that code for any
// processor can be checked on any other.
#pragma once

#if defined(GATEWORK_EMULATE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/arm/neon.h>
#include <simde/x86/avx512.h>
#define GATEWORK_HAS(feature) true
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32

// What SIMDe lacks.
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  const simde__m256i_private from = simde__m256i_to_private(a);
  simde__m512i_private to;
  for (int i = 0; i < 16; ++i) to.u32[i] = from.u16[i];
  return simde__m512i_from_private(to);
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  const simde__m512i_private from = simde__m512i_to_private(a);
  simde__m512_private to;
  for (int i = 0; i < 16; ++i) to.f32[i] = float(from.i32[i]);
  return simde__m512_from_private(to);
}
#elif defined(GATEWORK_X86)
#include <immintrin.h>
#define GATEWORK_HAS(feature) bool(__builtin_cpu_supports(feature))
#elif defined(GATEWORK_ARM)
#include <arm_neon.h>
#endif
