// Workers of csrc/cpu/threads/team.h go through random phases: every item once, and no phase before
// the one before it is finished.
//
// usage: team together|in-turn|failing WORKERS    failing: one worker throws out of its item
#include "cpu/threads/team.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

using permllm::cpu::Team;
using permllm::cpu::Worker;

constexpr int kPhases = 400, kMostItems = 40;

enum class Kind { kEach, kAlone, kShare, kClaimed };

struct Phase {
  Kind kind;
  int64_t items;
  std::atomic<int64_t> done{0};
  std::atomic<int> times[kMostItems] = {};
};

void require(bool holds, const char* rule) {
  if (holds) return;
  std::printf("%s\n", rule);
  std::_Exit(1);
}

class Walk {
 public:
  Walk(std::vector<Phase>& phases, int64_t failing) : phases_(phases), failing_(failing) {}

  bool failed() const { return thrown_; }

  void go(Worker& worker, int64_t index) {
    for (size_t p = 0; p < phases_.size(); ++p) {
      Phase& phase = phases_[p];
      const bool last = p + 1 == phases_.size();
      const auto item = [&](int64_t i) {
        require(p == 0 || thrown_ || phases_[p - 1].done == phases_[p - 1].items,
                "a phase began too early");
        if (p == kPhases / 2 && failing_ >= 0) meet_failure(index);
        ++phase.times[i];
        ++phase.done;
      };
      if (phase.kind == Kind::kEach) {
        worker.each(phase.items, item);
      } else if (phase.kind == Kind::kAlone) {
        worker.alone([&] {
          for (int64_t i = 0; i < phase.items; ++i) item(i);
        });
      } else if (phase.kind == Kind::kShare) {
        worker.share(phase.items, last, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) item(i);
        });
      } else {  // in fewer ranges than workers; the next is taken while one is worked on
        worker.begin(phase.items, 2);
        for (int64_t i = worker.claim(); i >= 0;) {
          const int64_t next = worker.claim();
          item(i);
          i = next;
        }
      }
    }
  }

 private:
  // One worker throws, while the others hold an item each: they leave one to it.
  void meet_failure(int64_t index) {
    if (index == failing_) {
      thrown_ = true;
      throw std::runtime_error("planted");
    }
    while (!thrown_) std::this_thread::yield();
  }

  std::vector<Phase>& phases_;
  const int64_t failing_;
  std::atomic<bool> thrown_{false};
};

}  // namespace

int main(int, char** words) {
  const bool in_turn = std::strcmp(words[1], "in-turn") == 0;
  const bool fails = std::strcmp(words[1], "failing") == 0;
  const int64_t workers = std::atoi(words[2]);
  std::mt19937 random(1);
  std::vector<Phase> phases(kPhases);
  for (Phase& phase : phases) {
    phase.kind = static_cast<Kind>(random() % 4);
    phase.items = 1 + random() % kMostItems;
  }
  phases[kPhases / 2].kind = Kind::kEach;
  phases[kPhases / 2].items = kMostItems;
  phases.back().kind = Kind::kShare;
  Walk walk(phases, fails ? workers - 1 : -1);
  Team team(workers);
  const auto work = [&](int64_t index) {
    try {
      Worker worker(team, index);
      walk.go(worker, index);
    } catch (const std::runtime_error&) {
    }
  };
  std::vector<std::thread> threads;
  for (int64_t index = 0; index < workers; ++index) {
    if (in_turn) {
      work(index);
    } else {
      threads.emplace_back(work, index);
    }
  }
  for (std::thread& thread : threads) thread.join();
  require(!fails || walk.failed(), "nothing was thrown");
  if (!fails) {
    for (const Phase& phase : phases) {
      for (int64_t i = 0; i < kMostItems; ++i) {
        require(phase.times[i] == (i < phase.items), "an item was worked on twice, or never");
      }
    }
  }
  std::printf("finished\n");
}
