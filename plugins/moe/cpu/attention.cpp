#include "attention.h"

#include <algorithm>
#include <vector>

namespace gatework {
namespace {

constexpr int kTileRows = 96;  // queries of a task, whose scores and keys stay in a core's own cache
constexpr int kSplit = 1024;   // keys of a task where there is one query a head
constexpr size_t kSerial = 16;  // positions whose rotation, and so on, is not worth waking a thread

// Some queries of one key/value head, and the keys that the task looks at.
struct Task {
  int sequence, head;  // of keys and values
  int first, tokens;
  int begin, end;
};

// What one call needs, kept from call to call.
struct Workspace {
  std::vector<float> queries;  // [batch, kv_heads, length, heads / kv_heads, width], rotated and scaled
  std::vector<float> read;     // a row for each query of each task
  std::vector<float> top, total;
  std::vector<Task> tasks;
  std::vector<size_t> rows;     // of each task, the first in `read`
  std::vector<size_t> parted;   // the first task of each that share queries
};

// x [width] in its position's angles, times scale.
void rotate(const Attention& attention, const float* x, const float* cos, const float* sin, float scale, float* y) {
  const int half = attention.rotary / 2;
  for (int j = 0; j < half; ++j) {
    const float a = x[j], b = x[j + half];
    y[j] = (a * cos[j] - b * sin[j]) * scale;
    y[j + half] = (b * cos[j] + a * sin[j]) * scale;
  }
  for (int j = attention.rotary; j < attention.width; ++j) y[j] = x[j] * scale;
}

void enlist(const Attention& attention, const int64_t* starts, int batch, int length, Workspace& work) {
  const int group = attention.heads / attention.kv_heads;
  const int tile = std::max(1, kTileRows / group);
  work.tasks.clear();
  work.rows.clear();
  work.parted.clear();
  size_t rows = 0;
  for (int b = 0; b < batch; ++b)
    for (int head = 0; head < attention.kv_heads; ++head)
      for (int first = 0; first < length; first += tile) {
        const int tokens = std::min(tile, length - first), start = int(starts[b]) + first;
        const int seen = attention.window ? std::max(0, start - attention.window + 1) : 0, end = start + tokens;
        const int span = length == 1 ? kSplit : end - seen;
        work.parted.push_back(work.tasks.size());
        for (int begin = seen; begin < end; begin += span, rows += size_t(tokens) * group) {
          work.tasks.push_back({b, head, first, tokens, begin, std::min(begin + span, end)});
          work.rows.push_back(rows);
        }
      }
  work.read.resize(rows * attention.width);
  work.top.resize(rows);
  work.total.resize(rows);
}

// y: the parts of one row, from tasks [first, last), as if one task had seen all keys; sink: of the row's head, or nullptr.
void join(const Kernels& kernels, const Attention& attention, const Workspace& work, size_t first, size_t last, size_t row,
          const float* sink, float* y) {
  float top = work.top[work.rows[first] + row];
  for (size_t i = first + 1; i < last; ++i) top = std::max(top, work.top[work.rows[i] + row]);
  if (sink) top = std::max(top, *sink);
  float total = sink ? kernels.exponential(*sink - top) : 0.0f;
  std::fill_n(y, attention.width, 0.0f);
  for (size_t i = first; i < last; ++i) {
    const size_t part = work.rows[i] + row;
    const float weight = first + 1 == last && !sink ? 1.0f : kernels.exponential(work.top[part] - top);
    const float* read = work.read.data() + part * attention.width;
    total += weight * work.total[part];
    for (int d = 0; d < attention.width; ++d) y[d] += weight * read[d];
  }
  const float inverse = 1.0f / total;
  for (int d = 0; d < attention.width; ++d) y[d] *= inverse;
}

}  // namespace

void run_attention(const Kernels& kernels, const Attention& attention, const Projected& x, const KVCache& cache,
                   const int64_t* starts, int batch, int length, float* y, const Threads& threads) {
  static thread_local Workspace kept;
  Workspace& work = kept;  // the caller's, whichever thread a task runs on
  const int width = attention.width, kv_heads = attention.kv_heads, group = attention.heads / kv_heads;
  work.queries.resize(size_t(batch) * length * attention.heads * width);

  const auto write_position = [&](size_t row) {
    const size_t b = row / length, s = row % length, slot = size_t(starts[b]) + s, half = attention.rotary / 2;
    const float *cos = cache.cos + slot * half, *sin = cache.sin + slot * half;
    for (int head = 0; head < attention.heads; ++head) {
      const size_t place = ((b * kv_heads + head / group) * length + s) * group + head % group;
      const float* q = x.q + row * x.q_stride + size_t(head) * width;
      rotate(attention, q, cos, sin, attention.scale, work.queries.data() + place * width);
    }
    static thread_local std::vector<float> key;
    key.resize(width);
    for (int head = 0; head < kv_heads; ++head) {
      const size_t place = ((b * kv_heads + head) * cache.slots + slot) * width;
      rotate(attention, x.k + row * x.k_stride + size_t(head) * width, cos, sin, 1.0f, key.data());
      kernels.to_halves(key.data(), width, cache.keys + place);
      kernels.to_halves(x.v + row * x.v_stride + size_t(head) * width, width, cache.values + place);
    }
  };
  const size_t positions = size_t(batch) * length;
  const auto shared_out = [&](size_t count, auto&& task) {
    if (positions > kSerial)
      threads.each(count, task);
    else
      for (size_t i = 0; i < count; ++i) task(i);
  };
  shared_out(positions, write_position);

  enlist(attention, starts, batch, length, work);
  threads.each(work.tasks.size(), [&](size_t i) {
    const Task& task = work.tasks[i];
    const size_t head = size_t(task.sequence) * kv_heads + task.head, place = head * cache.slots * width;
    const Queries queries{work.queries.data() + (head * length + task.first) * group * width, task.tokens * group, group,
                          int(starts[task.sequence]) + task.first, attention.window,
                          attention.slopes ? attention.slopes + task.head * group : nullptr};
    kernels.attend({cache.keys + place, cache.values + place, width, attention.softcap}, queries, task.begin, task.end,
                   work.read.data() + work.rows[i] * width, work.top.data() + work.rows[i], work.total.data() + work.rows[i]);
  });

  shared_out(work.parted.size(), [&](size_t i) {
    const size_t first = work.parted[i], last = i + 1 < work.parted.size() ? work.parted[i + 1] : work.tasks.size();
    const Task& task = work.tasks[first];
    for (int row = 0; row < task.tokens * group; ++row) {
      const size_t token = size_t(task.sequence) * length + task.first + row / group;
      const size_t head = size_t(task.head) * group + row % group;
      const float* sink = attention.sinks ? attention.sinks + head : nullptr;
      join(kernels, attention, work, first, last, row, sink, y + (token * attention.heads + head) * width);
    }
  });
}

}  // namespace gatework
