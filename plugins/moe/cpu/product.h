// Quantised products of a matrix with many tokens.
#pragma once

#include <algorithm>
#include <vector>

#include "layout.h"
#include "threads.h"

namespace gatework {

constexpr int kChunk = 4;     // blocks that many tokens are multiplied with before the next ones are read
constexpr size_t kFew = 4;    // rows whose work is not worth waking a second thread
constexpr int kSlice = 64;    // tokens worked on at once, whose activations stay in a core's own cache

// work(first, last) for the rows 0..rows, few at a time.
template <class Work>
void by_few(const Threads& threads, size_t rows, Work&& work) {
  threads.each((rows + kFew - 1) / kFew, [&](size_t i) { work(i * kFew, std::min(rows, (i + 1) * kFew)); });
}

// Rows of numbers that a product is made of: those of x; where `skip` is given, x + skip, which is written to `sum`; where
// there is a norm, its results.
struct Stream {
  const float* x;
  const float* skip = nullptr;
  float* sum = nullptr;
  Norm norm{};  // without gamma: none

  // The rows [first, last), of at most kFew, one behind the other; valid until the calling thread asks for others.
  const float* rows(const Kernels&, int columns, size_t first, size_t last) const;
};

// Activations quantised row by row.
class Tokens {
 public:
  void resize(const Columns& k, size_t rows);
  // x: k.count numbers
  void set(const Kernels&, const Columns& k, size_t row, const float* x);
  // Both, for all rows.
  void quantize(const Kernels&, const Columns& k, const Stream& x, size_t rows, const Threads&);
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

// Blocks that a thread takes at least: with so few tokens that all are one slice, the fewer the sooner all threads are done.
constexpr int least_blocks(int tokens) { return tokens <= kSlice ? 1 : kChunk; }

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
