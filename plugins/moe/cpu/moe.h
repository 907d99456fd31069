// The operator gatework::MoE on quantised weights; the definition is ../reference.py.
#pragma once

#include "product.h"
#include "routing.h"

namespace gatework {

enum class Glu { none = 1, two_way = 2, three_way = 3 };  // value: matrices that an expert applies to its input

struct MoE {
  Router router;
  Activation activation;
  Glu glu;
  Gate gate;  // of two-way silu gates
  Columns in, out;  // columns of w_in: D; of w_out: I, the expert width

  int matrices() const { return int(glu); }
};

struct Experts {
  Matrix w_in;         // [E, matrices, blocks of I]
  Matrix w_out;        // [E, blocks of D]
  const float* b_in;   // [E, matrices * I] or nullptr
  const float* b_out;  // [E, D] or nullptr
};

// y [tokens, D] from x [tokens, D] and logits [tokens, E], which are first made of x by `router` [E, D] where that is given
void run_moe(const Kernels&, const MoE&, const Experts&, const Stream& x, const float* router, float* logits, int tokens,
             float* y, const Threads&);

}  // namespace gatework
