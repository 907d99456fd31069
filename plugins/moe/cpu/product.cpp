#include "product.h"

#include <algorithm>

namespace gatework {

const float* Stream::rows(const Kernels& kernels, int columns, size_t first, size_t last) const {
  const size_t start = first * columns, count = (last - first) * columns;
  const float* rows = x + start;
  if (skip) {
    for (size_t i = start; i < start + count; ++i) sum[i] = x[i] + skip[i];
    rows = sum + start;
  }
  if (!norm.gamma) return rows;
  static thread_local std::vector<float> normed;
  normed.resize(count);
  for (size_t i = 0; i < count; i += columns) kernels.normalize(norm, rows + i, columns, normed.data() + i);
  return normed.data();
}

void Tokens::resize(const Columns& k, size_t rows) {
  codes_.resize(rows * k.streams() * k.padded());
  scales_.resize(rows * k.groups());
  sums_.resize(rows * k.groups());
  tokens_.resize(rows);
}

void Tokens::set(const Kernels& kernels, const Columns& k, size_t row, const float* x) {
  int8_t* codes = codes_.data() + row * k.streams() * k.padded();
  float* scales = scales_.data() + row * k.groups();
  int32_t* sums = sums_.data() + row * k.groups();
  kernels.quantize(k, x, codes, scales, sums);
  tokens_[row] = {codes, scales, sums};
}

void Tokens::quantize(const Kernels& kernels, const Columns& k, const Stream& x, size_t rows, const Threads& threads) {
  resize(k, rows);
  by_few(threads, rows, [&](size_t first, size_t last) {
    const float* numbers = x.rows(kernels, k.count, first, last);
    for (size_t row = first; row < last; ++row, numbers += k.count) set(kernels, k, row, numbers);
  });
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
  threads.ranges(ceil_div(rows, kRows), least_blocks(tokens), [&](int first, int last) {
    sliced(first, last, 0, tokens, [&](int t, int slice, int b) {
      multiply_block(kernels, k, matrix, b, rows, x.data() + t, slice, y + size_t(t) * rows, rows);
    });
  });
}

}  // namespace gatework
