// Work shared out over a pool of threads.
#pragma once

#include <atomic>
#include <cstddef>

namespace gatework {

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

 protected:
  ~Threads() = default;
};

}  // namespace gatework
