// The kernels of csrc/cuda on the emulator, behind a C interface for the tests.
#include <algorithm>

#include "guarded.h"
#include "mma_linear.h"
#include "permute.h"

namespace permllm::cuda {
namespace {

template <class Element, class Value>
void run_body(const LinearArguments& a, const MmaPlan& plan, float* partial,
              unsigned char* shared) {
  switch (plan.token_tiles) {
    case 1:
      return mma_body<Element, Value, 1>(a, plan, partial, shared);
    case 2:
      return mma_body<Element, Value, 2>(a, plan, partial, shared);
    case 4:
      return mma_body<Element, Value, 4>(a, plan, partial, shared);
    default:
      return mma_body<Element, Value, 8>(a, plan, partial, shared);
  }
}

template <class Element, class Value>
void run_linear(const LinearArguments& a, const Device& device, unsigned seed) {
  const MmaPlan plan = plan_mma(a, device);
  Guarded shared(plan.shared_bytes);
  Guarded partial(plan.splits * size_t(a.tokens) * a.padded_rows * 4);
  auto* sums = plan.splits > 1 ? reinterpret_cast<float*>(partial.data) : nullptr;
  launch_with(shared, mma_grid(a, plan), kMmaThreads, seed,
              [&] { run_body<Element, Value>(a, plan, sums, shared.data); });
  if (sums == nullptr) return;
  launch_with(shared, reduce_grid(a), kReduceThreads, seed,
              [&] { reduce_body<Element>(a, sums, plan.splits); });
}

LinearArguments sizes(int rows, int inputs, int tokens, bool int8) {
  LinearArguments a{};
  a.int8 = int8;
  a.tokens = tokens;
  a.rows = rows;
  a.inputs = inputs;
  a.padded_rows = static_cast<int>(round_up(rows, kRowMultiple));
  a.padded_inputs = static_cast<int>(round_up(inputs, kInputMultiple));
  return a;
}

}  // namespace
}  // namespace permllm::cuda

using namespace permllm::cuda;

extern "C" {

struct Layer {
  int element, int8, tokens, rows, inputs, padded_rows, padded_inputs, x_stride;
  const void *x, *values, *metadata, *permutation, *scale, *bias;
  void* y;
};

// Returns an error or null.
const char* emulate_linear(const Layer* layer, const Device* device, unsigned seed) {
  const Layer& l = *layer;
  const size_t value_bytes = l.int8 ? 1 : 2;
  Guarded x(l.x, (size_t(l.tokens - 1) * l.x_stride + l.inputs) * 2);
  Guarded y(size_t(l.tokens) * l.rows * 2);
  Guarded values(l.values, size_t(l.padded_rows) * l.padded_inputs / 2 * value_bytes);
  Guarded metadata(l.metadata, size_t(l.padded_rows) * l.padded_inputs / 8);
  Guarded permutation(l.permutation, l.permutation ? l.padded_inputs : 0);
  Guarded scale(l.scale, l.scale ? l.rows * 4 : 0);
  Guarded bias(l.bias, l.bias ? l.rows * 2 : 0);
  const LinearArguments a{static_cast<ElementType>(l.element),
                          l.int8 != 0,
                          x.data,
                          l.x_stride,
                          l.tokens,
                          values.data,
                          metadata.data,
                          l.permutation ? permutation.data : nullptr,
                          l.scale ? reinterpret_cast<const float*>(scale.data) : nullptr,
                          l.bias ? bias.data : nullptr,
                          y.data,
                          l.rows,
                          l.inputs,
                          l.padded_rows,
                          l.padded_inputs};
  const bool float16 = a.element == ElementType::kFloat16;
  const char* error = error_of([&] {
    if (a.int8) {
      float16 ? run_linear<Float16, int8_t>(a, *device, seed)
              : run_linear<BFloat16, int8_t>(a, *device, seed);
    } else {
      float16 ? run_linear<Float16, uint16_t>(a, *device, seed)
              : run_linear<BFloat16, uint16_t>(a, *device, seed);
    }
  });
  std::memcpy(l.y, y.data, size_t(l.tokens) * l.rows * 2);
  return error;
}

const char* emulate_permute(const void* x, const uint8_t* permutation, void* y, int64_t tokens,
                            int64_t columns, unsigned seed) {
  const size_t bytes = size_t(tokens) * columns * 2;
  Guarded source(x, bytes), target(bytes), places(permutation, columns),
      shared(kPermuteSharedBytes);
  const PermuteArguments a{source.data, columns, places.data, target.data, tokens, columns};
  const char* error = error_of([&] {
    launch_with(shared, permute_grid(a), kPermuteThreads, seed,
                [&] { permute_body(a, shared.data); });
  });
  std::memcpy(y, target.data, bytes);
  return error;
}

void plan(int rows, int inputs, int tokens, int int8, const Device* device, int* result) {
  const MmaPlan p = plan_mma(sizes(rows, inputs, tokens, int8 != 0), *device);
  const int values[] = {p.token_tiles, p.steps_per_split, p.splits, p.shared_bytes};
  std::copy_n(values, 4, result);
}

// Whether CUTLASS' GEMM multiplies, and whether a pass permutes in front.
void choose(int rows, int inputs, int tokens, int int8, int permuted, const Device* device,
            bool* gemm, bool* pass) {
  LinearArguments a = sizes(rows, inputs, tokens, int8 != 0);
  const uint8_t permutation{};
  a.permutation = permuted ? &permutation : nullptr;
  *gemm = takes_gemm_sm90(a, *device);
  *pass = takes_a_pass(a);
}

// Blocks in the second and third dimension of every launch for the largest sizes that the operator
// takes; `result` has room for 6.
void largest_grids(int* result) {
  const int rows = static_cast<int>(kMostRows);
  const LinearArguments a = sizes(rows, 128, 64, false);
  const PermuteArguments permuted{nullptr, 0, nullptr, nullptr, 1 << 30, kMostInputs};
  const Device device{0, 90, 132, 228 << 10};
  for (const Grid& grid :
       {mma_grid(a, plan_mma(a, device)), reduce_grid(a), permute_grid(permuted)}) {
    *result++ = static_cast<int>(grid.y);
    *result++ = static_cast<int>(grid.z);
  }
}

// Barriers and waits that have been come to: how many, and where they are.
int sites() { return static_cast<int>(emulator::sites.size()); }
const char* site(int index) {
  static std::string text;
  const emulator::Site& s = emulator::sites.at(index);
  text = s.file.substr(s.file.rfind('/') + 1) + ":" + std::to_string(s.line) + " " + s.name;
  return text.c_str();
}
void leave_out(int index) { emulator::left_out = index < 0 ? SIZE_MAX : size_t(index); }
}
