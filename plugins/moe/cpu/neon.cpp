// NEON with the dot product extension (Armv8.2): sdot, four products of signed bytes in each 32-bit lane, on 128 bits.
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "instructions.h"
#include "tile.h"

namespace gatework {
namespace {

struct Neon {
  struct Sums {
    int32x4_t quarter[4];  // rows 0-3, 4-7, 8-11, 12-15
  };
  static constexpr int kTile = 4;
  static constexpr bool kWords = false;
  static constexpr int offset(int bits) { return bits == 8 ? 0 : 8; }

  template <int T>
  static void accumulate(Sums (&sums)[T], const int8x16_t (&w)[4], const int8_t* const* x, int offset) {
    for (int t = 0; t < T; ++t) {
      const int8x16_t columns = vreinterpretq_s8_s32(vdupq_n_s32(four_codes(x[t] + offset)));
      for (int i = 0; i < 4; ++i) sums[t].quarter[i] = vdotq_s32(sums[t].quarter[i], w[i], columns);
    }
  }

  template <int bits, int T>
  static void dot(const uint8_t* w, const int8_t* const* x, int steps, const int32_t* first, Sums (&sums)[T]) {
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < 4; ++i) sums[t].quarter[i] = vdupq_n_s32(first[t]);
    for (int s = 0; s < steps; ++s, w += kStepBytes) {
      __builtin_prefetch(w + 1024);
      int8x16_t first[4], second[4];
      for (int i = 0; i < 4; ++i) {
        const uint8x16_t codes = vld1q_u8(w + 16 * i);
        if constexpr (bits == 8) {
          first[i] = vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(0x80)));
        } else {
          first[i] = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(15)));
          second[i] = vreinterpretq_s8_u8(vshrq_n_u8(codes, 4));
        }
      }
      accumulate<T>(sums, first, x, step_columns(bits) * s);
      if constexpr (bits == 4) accumulate<T>(sums, second, x, 8 * s + 4);
    }
  }

  static Sums join(const Sums& high, const Sums& low) {
    Sums joined;
    for (int i = 0; i < 4; ++i) joined.quarter[i] = vaddq_s32(vshlq_n_s32(high.quarter[i], 8), low.quarter[i]);
    return joined;
  }

  struct Lanes {
    struct Floats {
      float32x4_t quarter[4];
    };
    static constexpr int kColumns = 1, kSums = 4;

    static Floats all(float value) {
      const float32x4_t four = vdupq_n_f32(value);
      return {{four, four, four, four}};
    }
    static Floats load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
    static Floats load(const Half* p) {
      Floats floats;
      for (int i = 0; i < 4; ++i) floats.quarter[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p[4 * i].bits)));
      return floats;
    }
    static void store(float* p, const Floats& a) {
      for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.quarter[i]);
    }
    static void store(Half* p, const Floats& a) {
      const float32x4_t most = vdupq_n_f32(kLargestHalf), least = vdupq_n_f32(-kLargestHalf);
      for (int i = 0; i < 4; ++i) {
        const float32x4_t within = vmaxq_f32(least, vminq_f32(most, a.quarter[i]));
        vst1_u16(&p[4 * i].bits, vreinterpret_u16_f16(vcvt_f16_f32(within)));
      }
    }
    static Floats add(const Floats& a, const Floats& b) {
      Floats sums;
      for (int i = 0; i < 4; ++i) sums.quarter[i] = vaddq_f32(a.quarter[i], b.quarter[i]);
      return sums;
    }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
      Floats sums;
      for (int i = 0; i < 4; ++i) sums.quarter[i] = vfmaq_f32(c.quarter[i], a.quarter[i], b.quarter[i]);
      return sums;
    }
    static Floats mul(const Floats& a, const Floats& b) {
      Floats products;
      for (int i = 0; i < 4; ++i) products.quarter[i] = vmulq_f32(a.quarter[i], b.quarter[i]);
      return products;
    }
    static float sum(const Floats& a) {
      const float32x4_t four = fours(a);
      const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
      return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
    static void sums(const Floats (&a)[kSums], float* y) {
      vst1q_f32(y, vpaddq_f32(twos(fours(a[0]), fours(a[1])), twos(fours(a[2]), fours(a[3]))));
    }

   private:
    // What the halves add up to, of 16 twice, and of 4 of a and of b.
    static float32x4_t fours(const Floats& a) {
      return vaddq_f32(vaddq_f32(a.quarter[0], a.quarter[2]), vaddq_f32(a.quarter[1], a.quarter[3]));
    }
    static float32x4_t twos(float32x4_t a, float32x4_t b) {
      return vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)), vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
    }
  };

  static Lanes::Floats numbers(const Sums& sums) {
    Lanes::Floats numbers;
    for (int i = 0; i < 4; ++i) numbers.quarter[i] = vcvtq_f32_s32(sums.quarter[i]);
    return numbers;
  }
  static Lanes::Floats scales(const uint16_t* p) {
    Lanes::Floats scales;
    for (int i = 0; i < 4; ++i) scales.quarter[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return scales;
  }
};

bool supported() {
#if defined(__linux__) && defined(__aarch64__)
  return getauxval(AT_HWCAP) & (1 << 20);  // HWCAP_ASIMDDP
#else
  return true;  // every Apple processor has it
#endif
}

}  // namespace

extern const Kernels kNeon;
const Kernels kNeon = kernels_of<Neon>("neon", supported);

}  // namespace gatework
