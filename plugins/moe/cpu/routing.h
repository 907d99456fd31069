// Which experts serve a token, and with what weight; the definition is ../reference.py's `route`.
#pragma once

#include <vector>

namespace gatework {

enum class Scoring { softmax, sigmoid };

struct Router {
  int experts, top_k;
  Scoring scoring;
  bool renormalize;
  float capacity_factor;  // 0: no choice is dropped
  int min_capacity;
};

// Choices sorted by expert, those of one expert in token order.
struct Routing {
  std::vector<int> chosen;     // [T, K] expert
  std::vector<float> weights;  // [T, K]
  std::vector<int> starts;     // [E + 1]: the choices of expert e are starts[e]..starts[e + 1]-1
  std::vector<int> tokens;     // [T * K]: token of each sorted choice
  std::vector<int> places;     // [T, K]: place of each choice among the sorted ones
};

// logits [tokens, experts]
void route(const Router&, const float* logits, int tokens, Routing& out);

}  // namespace gatework
