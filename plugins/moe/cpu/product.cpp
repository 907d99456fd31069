#include "product.h"

#include <algorithm>

namespace gatework {

void Tokens::quantize(const Kernels& kernels, const Columns& k, const float* x, size_t rows, const Threads& threads) {
  const size_t columns = size_t(k.streams()) * k.padded(), groups = k.groups();
  codes_.resize(rows * columns);
  scales_.resize(rows * groups);
  sums_.resize(rows * groups);
  tokens_.resize(rows);
  const auto quantize_row = [&](size_t row) {
    int8_t* codes = codes_.data() + row * columns;
    float* scales = scales_.data() + row * groups;
    int32_t* sums = sums_.data() + row * groups;
    kernels.quantize(k, x + row * k.count, codes, scales, sums);
    tokens_[row] = {codes, scales, sums};
  };
  if (rows > kFew)
    threads.each(rows, quantize_row);
  else
    for (size_t row = 0; row < rows; ++row) quantize_row(row);
}

void multiply_block(const Kernels& kernels, const Columns& k, const Matrix& matrix, int block, int rows, const Token* x,
                    int tokens, float* y, size_t stride) {
  const int first = block * kRows, count = std::min(kRows, rows - first);
  if (count == kRows) {
    kernels.product(k, matrix.block(k, block), x, tokens, y + first, stride);
    return;
  }
  float whole[kSlice][kRows];
  for (int t = 0; t < tokens; t += kSlice) {
    const int slice = std::min(kSlice, tokens - t);
    kernels.product(k, matrix.block(k, block), x + t, slice, whole[0], kRows);
    for (int i = 0; i < slice; ++i) std::copy_n(whole[i], count, y + (t + i) * stride + first);
  }
}

void multiply(const Kernels& kernels, const Columns& k, const Matrix& matrix, int rows, const Tokens& x, int tokens,
              float* y, const Threads& threads) {
  threads.ranges(ceil_div(rows, kRows), kChunk, [&](int first, int last) {
    sliced(first, last, 0, tokens, [&](int t, int slice, int b) {
      multiply_block(kernels, k, matrix, b, rows, x.data() + t, slice, y + size_t(t) * rows, rows);
    });
  });
}

}  // namespace gatework
