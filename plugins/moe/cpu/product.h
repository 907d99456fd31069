// Quantised products of a matrix with many tokens.
#pragma once

#include <algorithm>
#include <vector>

#include "layout.h"
#include "threads.h"

namespace gatework {

constexpr int kChunk = 4;     // blocks that many tokens are multiplied with before the next ones are read
constexpr size_t kFew = 4;    // rows whose work is not worth waking a thread
constexpr int kSlice = 64;    // tokens worked on at once, whose activations stay in a core's own cache

// Activations quantised row by row.
class Tokens {
 public:
  // x: `rows` rows of k.count numbers, one behind the other
  void quantize(const Kernels&, const Columns& k, const float* x, size_t rows, const Threads&);
  const Token& operator[](size_t row) const { return tokens_[row]; }
  const Token* data() const { return tokens_.data(); }

 private:
  std::vector<int8_t> codes_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
  std::vector<Token> tokens_;
};

// A matrix [rows, k.count] in blocks.
struct Matrix {
  const uint8_t* codes;    // [blocks, steps, 16, 4]
  const uint16_t* scales;  // [blocks, groups, 16] bfloat16

  Block block(const Columns& k, int index) const {
    return {codes + index * k.block_bytes(), scales + index * k.block_scales()};
  }
};

// Rows [16 * block, 16 * block + 16) of y [tokens, stride], of which only those below `rows` exist.
void multiply_block(const Kernels&, const Columns&, const Matrix&, int block, int rows, const Token*, int tokens, float* y,
                    size_t stride);

// work(t, slice, b) for all blocks [first, last) and slices of the tokens [begin, end)
template <class Work>
void sliced(int first, int last, int begin, int end, Work&& work) {
  for (; first < last; first += kChunk)
    for (int t = begin; t < end; t += kSlice)
      for (int b = first; b < std::min(first + kChunk, last); ++b) work(t, std::min(kSlice, end - t), b);
}

// y [tokens, rows] = x W^T
void multiply(const Kernels&, const Columns&, const Matrix&, int rows, const Tokens&, int tokens, float* y, const Threads&);

}  // namespace gatework
