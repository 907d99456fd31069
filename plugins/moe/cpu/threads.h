// Work shared out over a pool of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <thread>

namespace gatework {

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Runs fn(data, i) for i in 0..count-1 on some threads and waits for them.
class Threads {
 public:
  virtual void run(void (*fn)(void*, size_t), size_t count, void* data) const = 0;

  // task(i) for each i < tasks, in any order. A thread takes the next task when it is done with one, since threads that share
  // a machine with others do not run equally fast.
  template <class Task>
  void each(size_t tasks, Task&& task) const {
    if (tasks <= 1) {
      if (tasks) task(size_t(0));
      return;
    }
    struct Queue {
      Task& task;
      size_t tasks;
      std::atomic<size_t> next{0};
    } queue{task, tasks};
    run(
        [](void* data, size_t) {
          Queue& queue = *static_cast<Queue*>(data);
          for (size_t i; (i = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.tasks;) queue.task(i);
        },
        tasks, &queue);
  }

  // task(first, last) for ranges that make up 0..count. They begin large, since memory is read fastest from end to end, and
  // get smaller, down to `least`, so that threads that do not run equally fast end together.
  template <class Task>
  void ranges(int count, int least, Task&& task) const {
    static const int cpus = std::max(1, int(std::thread::hardware_concurrency()));
    std::atomic<int> next{0};
    each(std::min(ceil_div(count, least), cpus), [&](size_t) {
      for (int first = next.load(); first < count;) {
        const int last = std::min(count, first + std::max(least, (count - first) / (2 * cpus) / least * least));
        if (!next.compare_exchange_weak(first, last)) continue;
        task(first, last);
        first = next.load();
      }
    });
  }

 protected:
  ~Threads() = default;
};

}  // namespace gatework
