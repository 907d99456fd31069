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
  static void dot(const uint8_t* w, const int8_t* const* x, int steps, Sums (&sums)[T]) {
    for (int t = 0; t < T; ++t) {
      sums[t] = {};
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

  static void add(const Sums& sums, int32_t, const uint16_t* w_scales, float x_scale, float* acc) {
    for (int r = 0; r < kRows; ++r) acc[r] += float(sums.row[r]) * (from_bfloat16(w_scales[r]) * x_scale);
  }
};

}  // namespace

extern const Kernels kPortable;
const Kernels kPortable = kernels_of<Portable>("portable", [] { return true; });

}  // namespace gatework
