// Plain C++, for any machine.
#include "tile.h"

namespace gatework {
namespace {

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
    static constexpr int kColumns = 1;

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
    static void store(float* p, const Floats& a) { std::memcpy(p, a.lane, sizeof a.lane); }
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
