#include "moe.h"

#include <algorithm>

namespace gatework {
namespace {

// What one call needs, kept from call to call.
struct Workspace {
  Routing routing;
  Tokens x, h;
  std::vector<Token> sorted;  // x's rows in the order of the sorted choices
  std::vector<int> chosen;    // experts that have a token
  std::vector<float> hidden;  // [choices, I]
  std::vector<float> served;  // [choices, D]
};

// work(expert, first, last) for the blocks of every expert that has a token, several at a time.
template <class Work>
void each_expert(const Threads& threads, const std::vector<int>& chosen, int blocks, int tokens, Work&& work) {
  threads.ranges(int(chosen.size()) * blocks, least_blocks(tokens), [&](int first, int last) {
    for (int end; first < last; first = end) {
      const int place = first / blocks, start = place * blocks;
      end = std::min(last, start + blocks);
      work(chosen[place], first - start, end - start);
    }
  });
}

// hidden = activation(gate) * up for one block of rows and a slice of tokens.
void expert_in(const Kernels& kernels, const MoE& moe, const Experts& experts, int expert, int block, const Token* x, int tokens,
               float* hidden) {
  const int I = moe.out.count, blocks = ceil_div(I, kRows), G = moe.matrices();
  const int first = block * kRows, count = std::min(kRows, I - first);
  alignas(64) float part[3][kSlice][kRows];
  for (int m = 0; m < G; ++m) {
    const Block rows = experts.w_in.block(moe.in, (expert * G + m) * blocks + block);
    kernels.product(moe.in, rows, x, tokens, part[m][0], kRows);
    if (experts.b_in) {
      const float* bias = experts.b_in + (size_t(expert) * G + m) * I + first;
      for (int t = 0; t < tokens; ++t)
        for (int r = 0; r < count; ++r) part[m][t][r] += bias[r];
    }
  }
  float(*const gate)[kRows] = part[moe.glu == Glu::three_way ? 1 : 0];
  const bool plain = moe.gate.plain();
  if (plain)
    kernels.activate(moe.activation, gate[0], tokens * kRows);
  else
    kernels.open_gate(moe.gate, gate[0], part[1][0], tokens * kRows);
  for (int t = 0; t < tokens; ++t) {
    float* h = hidden + size_t(t) * I + first;
    for (int r = 0; r < count; ++r) {
      const float a = moe.glu == Glu::three_way ? part[0][t][r] * gate[t][r] : gate[t][r];
      h[r] = moe.glu == Glu::none || !plain ? a : a * part[G - 1][t][r];
    }
  }
}

void combine(const MoE& moe, const Experts& experts, const Workspace& work, int token, float* y) {
  const int D = moe.in.count, K = moe.router.top_k;
  std::fill_n(y, D, 0.0f);
  for (int j = 0; j < K; ++j) {
    const size_t choice = size_t(token) * K + j;
    const float weight = work.routing.weights[choice];
    const float* served = work.served.data() + size_t(work.routing.places[choice]) * D;
    const float* bias = experts.b_out ? experts.b_out + size_t(work.routing.chosen[choice]) * D : nullptr;
    for (int d = 0; d < D; ++d) y[d] += weight * (bias ? served[d] + bias[d] : served[d]);
  }
}

}  // namespace

void run_moe(const Kernels& kernels, const MoE& moe, const Experts& experts, const Stream& x, const float* router, float* logits,
             int tokens, float* y, const Threads& threads) {
  static thread_local Workspace kept;
  Workspace& work = kept;  // the caller's, whichever thread a task runs on
  const int D = moe.in.count, I = moe.out.count, E = moe.router.experts;
  work.x.resize(moe.in, tokens);
  by_few(threads, tokens, [&](size_t first, size_t last) {
    const float* rows = x.rows(kernels, D, first, last);
    if (router) kernels.score(router, E, rows, int(last - first), D, logits + first * E);
    for (size_t row = first; row < last; ++row, rows += D) work.x.set(kernels, moe.in, row, rows);
  });
  route(moe.router, logits, tokens, work.routing);
  const Routing& routing = work.routing;
  const size_t choices = routing.tokens.size();

  work.sorted.resize(choices);
  for (size_t i = 0; i < choices; ++i) work.sorted[i] = work.x[routing.tokens[i]];
  work.chosen.clear();
  for (int e = 0; e < E; ++e)
    if (routing.starts[e] < routing.starts[e + 1]) work.chosen.push_back(e);
  work.hidden.resize(choices * I);
  each_expert(threads, work.chosen, ceil_div(I, kRows), tokens, [&](int e, int first, int last) {
    sliced(first, last, routing.starts[e], routing.starts[e + 1], [&](int t, int slice, int b) {
      expert_in(kernels, moe, experts, e, b, work.sorted.data() + t, slice, work.hidden.data() + size_t(t) * I);
    });
  });

  work.h.quantize(kernels, moe.out, {work.hidden.data()}, choices, threads);
  work.served.resize(choices * D);
  const int blocks = ceil_div(D, kRows);
  each_expert(threads, work.chosen, blocks, tokens, [&](int e, int first, int last) {
    const Matrix w_out{experts.w_out.codes + size_t(e) * blocks * moe.out.block_bytes(),
                       experts.w_out.scales + size_t(e) * blocks * moe.out.block_scales()};
    sliced(first, last, routing.starts[e], routing.starts[e + 1], [&](int t, int slice, int b) {
      multiply_block(kernels, moe.out, w_out, b, D, work.h.data() + t, slice, work.served.data() + size_t(t) * D, D);
    });
  });

  by_few(threads, tokens, [&](size_t first, size_t last) {
    for (size_t t = first; t < last; ++t) combine(moe, experts, work, int(t), y + t * D);
  });
}

}  // namespace gatework
