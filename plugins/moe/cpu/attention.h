// The operator gatework::CachedAttention: rotary positions, the write into the cache and grouped-query attention over it.
#pragma once

#include "layout.h"
#include "threads.h"

namespace gatework {

struct Attention {
  int heads, kv_heads;
  int width;      // of a head, a multiple of 16
  int rotary;     // the first elements of a head that are rotated, in halves (j, j + rotary / 2)
  float scale;    // of the scores
  float softcap;  // c: scores become c * tanh(score / c); 0: they stay as they are
  int window;     // keys that a query sees, its own included; 0: all up to its own
  const float* sinks;   // [heads] or nullptr: a score more in the softmax, for no key
  const float* slopes;  // [heads] or nullptr: what ALiBi takes off for each position that a key is behind the query
};

// New queries, keys and values: rows of `stride` floats, one for each position of each sequence.
struct Projected {
  const float *q, *k, *v;
  size_t q_stride, k_stride, v_stride;
};

// The cache of one layer, [batch, kv_heads, slots, width] each, and the angles of each slot, [slots, rotary / 2] each.
struct KVCache {
  Half *keys, *values;
  const float *cos, *sin;
  int slots;
};

// Writes `length` new positions of each sequence, from slot starts[b] on, and reads for each of them: y [batch, length, heads *
// width]. Pre: 0 <= starts[b] <= slots - length.
void run_attention(const Kernels&, const Attention&, const Projected&, const KVCache&, const int64_t* starts, int batch,
                   int length, float* y, const Threads&);

}  // namespace gatework
