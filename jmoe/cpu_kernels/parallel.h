// Phases of independent units of work on XLA's own thread pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace jmoe {

struct Phase {
  int64_t units;
  std::function<void(int64_t unit, int64_t next)> run;  // next: the one that the thread runs after it, or -1
};

// Runs each phase's units, in whatever order and on whatever thread, before the next phase's. The caller works too, so
// that all gets done even where no thread of the pool is free: XLA runs this very call on one of them.
template <class Pool>
void run_phases(Pool& pool, const std::vector<Phase>& phases) {
  struct Progress {
    std::atomic<int64_t> taken{0}, done{0};
  };
  struct Shared {
    explicit Shared(const std::vector<Phase>& phases) : phases(phases), progress(phases.size()) {}
    void work() {
      for (size_t p = 0; p < phases.size(); p++) {
        const int64_t units = phases[p].units;
        for (int64_t unit = progress[p].taken++, next; unit < units; unit = next) {
          next = progress[p].taken++;
          phases[p].run(unit, next < units ? next : -1);
          progress[p].done++;
        }
        for (int spins = 0; progress[p].done < units; spins++)
          if (spins > 2000) std::this_thread::yield();
      }
    }
    // A copy: a helper may start when the call is over, and finds nothing left to do.
    const std::vector<Phase> phases;
    std::vector<Progress> progress;
  };
  const auto shared = std::make_shared<Shared>(phases);
  int64_t most = 0;
  for (const Phase& phase : phases) most = phase.units > most ? phase.units : most;
  const int64_t threads = pool.num_threads();
  for (int64_t helper = 1; helper < threads && helper < most; helper++)
    pool.Schedule([shared] { shared->work(); });
  shared->work();
}

}  // namespace jmoe
