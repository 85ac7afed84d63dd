#include "kernels.h"
#include "launch.h"
#include "many_tokens_mma.h"

namespace permllm::cuda {
namespace {

template <class Element, class Value, int kTokens>
__global__ void __launch_bounds__(kManyThreads<kTokens>)
    many_tokens_kernel(LinearArguments arguments) {
  extern __shared__ __align__(128) unsigned char shared[];
  many_tokens_body<Element, Value, kTokens>(arguments, shared);
}

template <class Element, class Value, int kTokens>
int run_tile(const LinearArguments& arguments, const Device& device, void* stream) {
  const dim3 grid((arguments.tokens + kTokens - 1) / kTokens, arguments.padded_rows / kStepRows);
  return launch(many_tokens_kernel<Element, Value, kTokens>, grid, kManyThreads<kTokens>,
                many_tokens_shared_bytes<Value, kTokens>(), device, stream, arguments);
}

// The larger tile where the shared memory of a block holds it.
template <class Element, class Value>
int run(const LinearArguments& arguments, const Device& device, void* stream) {
  if (many_tokens_shared_bytes<Value, 128>() <= device.shared_bytes_per_block) {
    return run_tile<Element, Value, 128>(arguments, device, stream);
  }
  return run_tile<Element, Value, 64>(arguments, device, stream);
}

}  // namespace

int many_tokens_mma(const LinearArguments& arguments, const Device& device, void* stream) {
  const bool float16 = arguments.element == ElementType::kFloat16;
  if (arguments.int8) {
    return float16 ? run<Float16, int8_t>(arguments, device, stream)
                   : run<BFloat16, int8_t>(arguments, device, stream);
  }
  return float16 ? run<Float16, uint16_t>(arguments, device, stream)
                 : run<BFloat16, uint16_t>(arguments, device, stream);
}

}  // namespace permllm::cuda
