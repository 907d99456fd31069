#include "routing.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace gatework {
namespace {

constexpr float kTiny = std::numeric_limits<float>::min();  // scores that all underflow renormalise to 0, not to NaN

// The K largest logits, largest first; equal ones: the lower index first. NaN comes last.
void choose(const Router& router, const float* logits, int* chosen) {
  const auto before = [logits](int a, int b) {
    const bool a_is_nan = std::isnan(logits[a]), b_is_nan = std::isnan(logits[b]);
    if (a_is_nan != b_is_nan) return b_is_nan;
    return a_is_nan || logits[a] == logits[b] ? a < b : logits[a] > logits[b];
  };
  for (int found = 0; found < router.top_k; ++found) {
    int best = -1;
    for (int e = 0; e < router.experts; ++e)
      if (std::find(chosen, chosen + found, e) == chosen + found && (best < 0 || before(e, best))) best = e;
    chosen[found] = best;
  }
}

void score(const Router& router, const float* logits, const int* chosen, float* weights) {
  float sum = 0.0f;
  if (router.scoring == Scoring::softmax) {
    const float top = *std::max_element(logits, logits + router.experts);
    for (int e = 0; e < router.experts; ++e) sum += std::exp(logits[e] - top);
    for (int j = 0; j < router.top_k; ++j) weights[j] = std::exp(logits[chosen[j]] - top) / sum;
  } else {
    for (int j = 0; j < router.top_k; ++j) weights[j] = 1.0f / (1.0f + std::exp(-logits[chosen[j]]));
  }
  if (!router.renormalize) return;
  sum = 0.0f;
  for (int j = 0; j < router.top_k; ++j) sum += weights[j];
  for (int j = 0; j < router.top_k; ++j) weights[j] /= std::max(sum, kTiny);
}

// Slots go to the first choices of all tokens, then to all second choices, and so on; a dropped choice weighs nothing.
void drop(const Router& router, int tokens, Routing& out) {
  const double wanted = std::floor(router.top_k * double(router.capacity_factor) * tokens / router.experts);
  const long long slots = static_cast<long long>(wanted), capacity = std::max<long long>(slots + slots % 2, router.min_capacity);
  std::vector<long long> taken(router.experts);
  for (int j = 0; j < router.top_k; ++j)
    for (int t = 0; t < tokens; ++t) {
      const size_t choice = size_t(t) * router.top_k + j;
      if (taken[out.chosen[choice]]++ >= capacity) out.weights[choice] = 0.0f;
    }
}

}  // namespace

void route(const Router& router, const float* logits, int tokens, Routing& out) {
  const size_t choices = size_t(tokens) * router.top_k;
  out.chosen.resize(choices);
  out.weights.resize(choices);
  out.tokens.resize(choices);
  out.places.resize(choices);
  out.starts.assign(router.experts + 1, 0);
  for (int t = 0; t < tokens; ++t) {
    const float* row = logits + size_t(t) * router.experts;
    int* chosen = out.chosen.data() + size_t(t) * router.top_k;
    choose(router, row, chosen);
    score(router, row, chosen, out.weights.data() + size_t(t) * router.top_k);
    for (int j = 0; j < router.top_k; ++j) ++out.starts[chosen[j] + 1];
  }
  if (router.capacity_factor > 0.0f) drop(router, tokens, out);
  for (int e = 0; e < router.experts; ++e) out.starts[e + 1] += out.starts[e];
  std::vector<int> next(out.starts.begin(), out.starts.end() - 1);
  for (size_t choice = 0; choice < choices; ++choice) {
    const int place = next[out.chosen[choice]]++;
    out.places[choice] = place;
    out.tokens[place] = int(choice / router.top_k);
  }
}

}  // namespace gatework
