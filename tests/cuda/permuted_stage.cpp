// permute_stage.h on the emulator, between stages that are written and read through the layout of
// CUTLASS that wgmma's descriptors are made from.
#include <cuda_runtime_api.h>

#include <map>

#include "emulated_stage.h"

static Index gridDim, blockDim;
inline void __syncthreads() {}

// clang-format off
#include "cutlass/cutlass.h"
#include "cute/tensor.hpp"
#include "cute/atom/mma_traits_sm90_gmma.hpp"
// clang-format on

namespace permllm::cuda {
namespace {

constexpr int kInputs = 128;

// As the collective builder chooses it for activations of `kTokens` x 128 inputs, which the kernel
// asserts of its own (permuted_mainloop_sm90.h).
template <class T, int kTokens, int kStages>
using Layout = decltype(cute::tile_to_shape(
    cute::GMMA::Layout_K_SW128_Atom<T>{},
    cute::make_shape(cute::Int<kTokens>{}, cute::Int<kInputs>{}, cute::Int<kStages>{}),
    cute::Step<cute::_1, cute::_2, cute::_3>{}));

// x [tokens][inputs] through stages to y [kTokens][stages of 128 inputs]. `writes`
// [kTokens][inputs] is how often each was written. Every tile of the layout is a stage, of a ring
// that is as long as the inputs.
template <class T, int kTokens, int kStages>
const char* run(const uint16_t* x, int tokens, int inputs, const uint8_t* places, uint16_t* y,
                int* writes, unsigned seed) {
  constexpr int kElements = kTokens * kInputs * kStages;
  static_assert(cute::cosize_v<Layout<T, kTokens, kStages>> == kElements);
  // Guarded memory ends at a page, so that these begin at multiples of 1024 bytes, as stages do.
  Guarded stages(2 * kElements), seen(2 * kElements), permutation(places, kInputs * kStages);
  const auto at = [&](const Guarded& ring, int token, int input) -> uint16_t& {
    const auto tensor = cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<T*>(ring.data)),
                                          Layout<T, kTokens, kStages>{});
    return reinterpret_cast<uint16_t&>(tensor(token, input % kInputs, input / kInputs));
  };
  for (int token = 0; token < kTokens; ++token) {
    for (int input = 0; input < kInputs * kStages; ++input) {  // zeros past the last, as TMA does
      const bool inside = token < tokens && input < inputs;
      at(stages, token, input) = inside ? x[int64_t{token} * inputs + input] : 0;
    }
  }
  const char* error =
      error_of([&] { permute_stages<kTokens>(stages, permutation, kStages, seen.data, seed); });
  std::map<const void*, int> stored;
  for (unsigned char* address : emulator::stored) {
    ++stored[address];
    ++stored[address + 2];
  }
  for (int token = 0; token < kTokens; ++token) {
    for (int input = 0; input < kInputs * kStages; ++input) {
      const int index = token * kInputs * kStages + input;
      y[index] = at(seen, token, input);
      writes[index] = stored[&at(stages, token, input)];
    }
  }
  return error;
}

template <class T, int kTokens>
const char* run_stages(int stages, const uint16_t* x, int tokens, int inputs, const uint8_t* places,
                       uint16_t* y, int* writes, unsigned seed) {
  const auto function = stages == 1   ? run<T, kTokens, 1>
                        : stages == 3 ? run<T, kTokens, 3>
                                      : run<T, kTokens, 8>;
  return function(x, tokens, inputs, places, y, writes, seed);
}

}  // namespace
}  // namespace permllm::cuda

extern "C" {

// `stages` is 1, 3 or 8, `tile` 32 or 64.
const char* permute_stages(int float16, int tile, int stages, const uint16_t* x, int tokens,
                           int inputs, const uint8_t* places, uint16_t* y, int* writes,
                           unsigned seed) {
  using namespace permllm::cuda;
  const auto function =
      float16      ? tile == 32 ? run_stages<cutlass::half_t, 32> : run_stages<cutlass::half_t, 64>
      : tile == 32 ? run_stages<cutlass::bfloat16_t, 32>
                   : run_stages<cutlass::bfloat16_t, 64>;
  return function(stages, x, tokens, inputs, places, y, writes, seed);
}
}
