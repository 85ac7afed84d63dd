#include "kernels.h"
#include "launch.h"
#include "many_tokens_mma.h"

namespace permllm::cuda {
namespace {

template <class Element, class Value, int kTokens>
__global__ void __launch_bounds__(kManyThreads<kTokens>)
    many_tokens_kernel(LinearArguments arguments) {
  extern __shared__ __align__(128) unsigned char shared[];
  many_tokens_body<Element, Value, kTokens>(arguments, blockIdx.y * kStepRows, blockIdx.x * kTokens,
                                            shared);
}

template <class Element, class Value, int kTokens>
int run_tile(const LinearArguments& arguments, const Device& device, void* stream) {
  return launch(many_tokens_kernel<Element, Value, kTokens>, many_tokens_grid<kTokens>(arguments),
                kManyThreads<kTokens>, many_tokens_shared_bytes(kTokens, sizeof(Value) == 1),
                device, stream, arguments);
}

template <class Element, class Value>
int run(const LinearArguments& arguments, int tile, const Device& device, void* stream) {
  return tile == 128 ? run_tile<Element, Value, 128>(arguments, device, stream)
                     : run_tile<Element, Value, 64>(arguments, device, stream);
}

}  // namespace

int many_tokens_mma(const LinearArguments& arguments, int tile, const Device& device,
                    void* stream) {
  const bool float16 = arguments.element == ElementType::kFloat16;
  if (arguments.int8) {
    return float16 ? run<Float16, int8_t>(arguments, tile, device, stream)
                   : run<BFloat16, int8_t>(arguments, tile, device, stream);
  }
  return float16 ? run<Float16, uint16_t>(arguments, tile, device, stream)
                 : run<BFloat16, uint16_t>(arguments, tile, device, stream);
}

}  // namespace permllm::cuda
