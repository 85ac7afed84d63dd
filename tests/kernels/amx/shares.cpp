// C interface for test_first_touch.py: the row groups that a thread takes before it helps another.
#include "cpu/kernels.h"
#include "cpu/threads/team.h"
// The vector code comes last.
#include "cpu/amx/target.h"
//
#include "cpu/amx/cut.h"

using namespace permllm::cpu;

extern "C" {

// Adds to reads[row group] the times that amx/many.h gives it to `worker`; returns how often each
// must be read, or 0 for a worker that has no share.
int64_t reads_of_many(int64_t m, int64_t n, int64_t k, int64_t threads, int64_t worker,
                      int64_t* reads) {
  LinearArguments arguments{};
  arguments.m = m;
  arguments.n = n;
  arguments.k = k;
  const Cut cut(arguments, threads);
  if (worker >= cut.shares) return 0;
  Team team(threads);
  Worker own(team, worker);
  own.begin(cut.tasks(), cut.shares);
  for (int64_t left = cut.tasks_of_share(); left > 0; --left) {
    const Cut::Task task = cut.task(own.claim());
    for (int64_t group = task.first_group; group < task.end_group; ++group) ++reads[group];
  }
  return cut.spans;
}

// The same for the pairs of amx/few.h, each read once.
int64_t reads_of_few(int64_t n, int64_t threads, int64_t worker, int64_t* reads) {
  const int64_t groups = ceil_div(n, kAmxRows), pairs = ceil_div(groups, kAmxGroups);
  const int64_t share = ceil_div(pairs, threads);
  if (worker * share >= pairs) return 0;
  Team team(threads);
  Worker own(team, worker);
  own.begin(pairs, threads);
  for (int64_t left = smaller(share, pairs - worker * share); left > 0; --left) {
    const int64_t group = own.claim() * kAmxGroups;
    for (int64_t g = group; g < smaller(group + kAmxGroups, groups); ++g) ++reads[g];
  }
  return 1;
}

}  // extern "C"
