// What the kernels of every instruction set share: how weights and activations lie in memory.
//
// A matrix [rows, columns] is stored in blocks of 16 rows. A block is a sequence of 64-byte steps; a step holds, row after
// row, four bytes of each of the 16 rows:
//
//   8 bits  four columns, code = q + 128
//   4 bits  eight columns, code = q + 8; the even column sits in a byte's low nibble, so the low nibbles of the four bytes are
//           columns 0 2 4 6 and the high ones 1 3 5 7
//
// so that one 32-bit lane belongs to one row, and a block streams through memory front to back. Columns come in groups that
// share a scale per row: scales [groups, 16] bfloat16, w = q * scale. Rows that fill up the last block and columns that fill
// up the last group have q = 0.
//
// Activations are quantised per token and group to int8, x = code * scale, or, `wide`, to a high and a low int8, x = (256 * high
// + low) * scale. They lie in the order in which a step reads them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "threads.h"

namespace gatework {

constexpr int kRows = 16;       // of a block
constexpr int kStepBytes = 64;  // of a step

constexpr int step_columns(int bits) { return 32 / bits; }

// Sizes along the contraction axis.
struct Columns {
  int count;  // columns
  int group;  // columns that share a scale, a multiple of 16
  int bits;   // 4 or 8, of a weight
  bool wide;  // activations have two codes

  int groups() const { return ceil_div(count, group); }
  int padded() const { return groups() * group; }
  int group_steps() const { return group / step_columns(bits); }
  size_t block_bytes() const { return size_t(groups()) * group_steps() * kStepBytes; }
  int streams() const { return wide ? 2 : 1; }
  size_t block_scales() const { return size_t(groups()) * kRows; }
};

// 16 rows of a weight.
struct Block {
  const uint8_t* codes;    // [steps, 16, 4]
  const uint16_t* scales;  // [groups, 16] bfloat16
};

// One token's activations.
struct Token {
  const int8_t* codes;  // [streams, padded columns], in [-127, 127]; high ones first
  const float* scales;  // [groups]
  const int32_t* sums;  // [groups], of 256 * high + low, or of codes
};

struct Half {
  uint16_t bits;  // of IEEE 754's binary16
};

constexpr float kLargestHalf = 65504.0f;

// One head of the cache.
struct Head {
  const Half *keys, *values;  // [slots, width]
  int width;                  // a multiple of 16
  float softcap;              // see Attention
};

constexpr int kMaxRows = 128;  // of Queries

// Rows of queries of one head: `group` for each position from `position` on.
struct Queries {
  const float* q;  // [rows, width], scaled
  int rows, group;
  int position;
  int window;           // see Attention
  const float* slopes;  // of the group's heads, or nullptr; see Attention
};

enum class Activation { silu, gelu, gelu_tanh, relu };

// A two-way silu gate: g * sigmoid(alpha * g) * (u + beta), where g is at most limit and u between -limit and limit; without a
// limit (0) they are what they are.
struct Gate {
  float alpha, beta, limit;

  bool plain() const { return alpha == 1.0f && beta == 0.0f && limit == 0.0f; }
};

// x / sqrt(mean of x^2 + epsilon) * gamma, and, `centred`, of x - mean of x.
struct Norm {
  const float* gamma;
  float epsilon;
  bool centred;
};

// The innermost loops, once per instruction set. All give the same bits: sums of integers are exact, and floating-point
// operations happen in one order, fused multiply-add only where it is written.
struct Kernels {
  const char* name;
  bool (*supported)();
  // y[t * stride + r] = the block's row r times token t, for all 16 rows
  void (*product)(const Columns&, const Block&, const Token*, int tokens, float* y, size_t stride);
  // codes, scales and sums (see Token) of x [columns]
  void (*quantize)(const Columns&, const float* x, int8_t* codes, float* scales, int32_t* sums);
  // z[i] = activation(z[i])
  void (*activate)(Activation, float* z, int count);
  // gate[i] = the gate of gate[i] and up[i]
  void (*open_gate)(const Gate&, float* gate, const float* up, int count);
  // Of the keys [begin, end), each row's largest score, the sum of all exp(score - top), and with these weights that of values
  void (*attend)(const Head&, const Queries&, int begin, int end, float* y, float* top, float* total);
  // y [count], a multiple of 16: x rounded to nearest, ties to even; what is beyond the largest becomes that
  void (*to_halves)(const float* x, int count, Half* y);
  // y [count] = the norm of x [count]
  void (*normalize)(const Norm&, const float* x, int count, float* y);
  // y [tokens, rows] = x W^T of float32: w [rows, count], x [tokens, count]
  void (*score)(const float* w, int rows, const float* x, int tokens, int count, float* y);
  float (*exponential)(float);
};

// The kernels that this machine runs fastest, or those named by the environment variable GATEWORK_CPU_PATH; nullptr where
// that one is unknown or needs another machine.
const Kernels* choose_kernels();

}  // namespace gatework
