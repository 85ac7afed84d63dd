#include "cpu/gated.h"

#include "cpu/experts/steps.h"
#include "cpu/threads/threads.h"

namespace permllm::cpu {

template <class Real>
void multiply_gated(const Real* x, Real* y, int64_t m, int64_t n, Activation activation) {
  const auto activate = steps_of<Real>(select("")).activate[static_cast<int>(activation)];
  if (m == 1) return activate(x, n, nullptr, y);
  parallel_for(m, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) activate(x + 2 * n * t, n, nullptr, y + n * t);
  });
}

template void multiply_gated(const bf16*, bf16*, int64_t, int64_t, Activation);
template void multiply_gated(const fp16*, fp16*, int64_t, int64_t, Activation);
template void multiply_gated(const float*, float*, int64_t, int64_t, Activation);

}  // namespace permllm::cpu
