// Plain C++, for any machine.
#include "tile.h"

namespace gatework {
namespace {

float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ff;
  if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * float(fraction);
  return float_of(int32_t(sign | (exponent == 31 ? 0xffu : exponent + 112) << 23 | fraction << 13));
}

uint16_t half_of(float x) {
  x = x > kLargestHalf ? kLargestHalf : x < -kLargestHalf ? -kLargestHalf : x;
  const uint32_t bits = uint32_t(bits_of(x)), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00);  // not a number
  if (size < 0x38800000)  // below 2^-14: what is left of the fraction beside 0.5
    return uint16_t(sign | uint32_t(bits_of(float_of(int32_t(size)) + 0.5f) - bits_of(0.5f)));
  return uint16_t(sign | (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13);
}

struct Portable {
  struct Sums {
    int32_t row[kRows];
  };
  static constexpr int kTile = 2;
  static constexpr bool kWords = false;
  static constexpr int offset(int) { return 0; }

  template <int bits, int T>
  static void dot(const uint8_t* w, const int8_t* const* x, int steps, const int32_t* first, Sums (&sums)[T]) {
    for (int t = 0; t < T; ++t) {
      for (int32_t& row : sums[t].row) row = first[t];
      for (int s = 0; s < steps; ++s)
        for (int r = 0; r < kRows; ++r)
          for (int i = 0; i < 4; ++i) {
            const int code = w[s * kStepBytes + 4 * r + i];
            const int8_t* columns = x[t] + s * step_columns(bits) + i;
            if constexpr (bits == 8)
              sums[t].row[r] += (code - 128) * columns[0];
            else
              sums[t].row[r] += ((code & 15) - 8) * columns[0] + ((code >> 4) - 8) * columns[4];
          }
    }
  }

  static Sums join(const Sums& high, const Sums& low) {
    Sums joined;
    for (int r = 0; r < kRows; ++r) joined.row[r] = 256 * high.row[r] + low.row[r];
    return joined;
  }

  struct Lanes {
    struct Floats {
      float lane[16];
    };
    static constexpr int kColumns = 1, kSums = 4;

    static Floats all(float value) {
      Floats floats;
      for (float& lane : floats.lane) lane = value;
      return floats;
    }
    static Floats load(const float* p) {
      Floats floats;
      std::memcpy(floats.lane, p, sizeof floats.lane);
      return floats;
    }
    static Floats load(const Half* p) {
      Floats floats;
      for (int i = 0; i < 16; ++i) floats.lane[i] = float_of_half(p[i].bits);
      return floats;
    }
    static void store(float* p, const Floats& a) { std::memcpy(p, a.lane, sizeof a.lane); }
    static void store(Half* p, const Floats& a) {
      for (int i = 0; i < 16; ++i) p[i].bits = half_of(a.lane[i]);
    }
    static Floats add(const Floats& a, const Floats& b) {
      Floats sums;
      for (int i = 0; i < 16; ++i) sums.lane[i] = a.lane[i] + b.lane[i];
      return sums;
    }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
      Floats sums;
      for (int i = 0; i < 16; ++i) sums.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
      return sums;
    }
    static Floats mul(const Floats& a, const Floats& b) {
      Floats products;
      for (int i = 0; i < 16; ++i) products.lane[i] = a.lane[i] * b.lane[i];
      return products;
    }
    static float sum(Floats a) {
      for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
      return a.lane[0];
    }
    static void sums(const Floats (&a)[kSums], float* y) {
      for (int i = 0; i < kSums; ++i) y[i] = sum(a[i]);
    }
  };

  static Lanes::Floats numbers(const Sums& sums) {
    Lanes::Floats numbers;
    for (int r = 0; r < kRows; ++r) numbers.lane[r] = float(sums.row[r]);
    return numbers;
  }
  static Lanes::Floats scales(const uint16_t* p) {
    Lanes::Floats scales;
    for (int r = 0; r < kRows; ++r) scales.lane[r] = from_bfloat16(p[r]);
    return scales;
  }
};

}  // namespace

extern const Kernels kPortable;
const Kernels kPortable = kernels_of<Portable>("portable", [] { return true; });

}  // namespace gatework
