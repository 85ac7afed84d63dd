// The kernels of csrc/cuda on the emulator, behind a C interface for the tests.
#include <algorithm>

#include "emulated_experts.h"
#include "emulated_stage.h"
#include "few_tokens.h"
#include "forced_kernel.h"
#include "guarded.h"
#include "kernel_choice.h"
#include "many_tokens_mma.h"
#include "permute.h"

namespace permllm::cuda {
namespace {

template <class Element, class Value>
void few_tokens(const LinearArguments& a, const FewTokensPlan& plan, float* partial,
                unsigned char* shared) {
  const int row = static_cast<int>(blockIdx.y) * plan.rows;
  const int split = static_cast<int>(blockIdx.z);
  const int token = static_cast<int>(blockIdx.x) * plan.token_tiles * 8;
  switch (plan.token_tiles) {
    case 1:
      return few_tokens_body<Element, Value, 1>(a, plan, partial, row, split, token, shared);
    case 2:
      return few_tokens_body<Element, Value, 2>(a, plan, partial, row, split, token, shared);
    case 4:
      return few_tokens_body<Element, Value, 4>(a, plan, partial, row, split, token, shared);
  }
  switch (plan.rows) {
    case 192:
      return few_tokens_body<Element, Value, 8, 192>(a, plan, partial, row, split, token, shared);
    case 256:
      return few_tokens_body<Element, Value, 8, 256>(a, plan, partial, row, split, token, shared);
    default:
      return few_tokens_body<Element, Value, 8, 128>(a, plan, partial, row, split, token, shared);
  }
}

// What a kernel reads that the one before may have written, and what it writes.
struct Memory {
  std::vector<Guarded*> inputs;
  Guarded& y;
};

template <class Element, class Value>
void run_few(const LinearArguments& a, const Device& device, int block_rows, unsigned seed,
             Memory memory) {
  const FewTokensPlan plan =
      block_rows == 0 ? plan_few_tokens(a, device) : plan_few_tokens(a, device, block_rows);
  if (plan.shared_bytes > device.shared_bytes_per_block) emulator::fail("too much shared memory");
  Guarded shared(plan.shared_bytes);
  Guarded partial(plan.splits * size_t(a.tokens) * a.padded_rows * 4);
  auto* sums = plan.splits > 1 ? reinterpret_cast<float*>(partial.data) : nullptr;
  launch_after_another(few_tokens_grid(a, plan), few_tokens_threads(plan.rows), seed, shared,
                       memory.inputs, sums == nullptr ? memory.y : partial,
                       [&] { few_tokens<Element, Value>(a, plan, sums, shared.data); });
  if (sums == nullptr) return;
  memory.inputs.push_back(&partial);
  launch_after_another(reduce_grid(a), kReduceThreads, seed, shared, memory.inputs, memory.y,
                       [&] { reduce_body<Element>(a, sums, plan.splits); });
}

template <class Element, class Value, int kTokens>
void run_many_tile(const LinearArguments& a, unsigned seed, const Memory& memory) {
  Guarded shared(many_tokens_shared_bytes(kTokens, sizeof(Value) == 1));
  launch_after_another(many_tokens_grid<kTokens>(a), kManyThreads<kTokens>, seed, shared,
                       memory.inputs, memory.y, [&] {
                         many_tokens_body<Element, Value, kTokens>(
                             a, blockIdx.y * kStepRows, blockIdx.x * kTokens, shared.data);
                       });
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

// kernel: 0 few tokens, in blocks of `block_rows` or 0 as planned, else the token tile of the
// many-token kernel. Returns an error or null.
const char* emulate_linear(const Layer* layer, int kernel, int block_rows, const Device* device,
                           unsigned seed) {
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
  const Memory memory{{&x, &permutation, &scale, &bias}, y};
  const auto run = [&]<class Element, class Value>() {
    if (kernel == 0) return run_few<Element, Value>(a, *device, block_rows, seed, memory);
    if (kernel == 64) return run_many_tile<Element, Value, 64>(a, seed, memory);
    return run_many_tile<Element, Value, 128>(a, seed, memory);
  };
  const bool float16 = a.element == ElementType::kFloat16;
  const char* error = error_of([&] {
    if (a.int8) {
      float16 ? run.operator()<Float16, int8_t>() : run.operator()<BFloat16, int8_t>();
    } else {
      float16 ? run.operator()<Float16, uint16_t>() : run.operator()<BFloat16, uint16_t>();
    }
  });
  std::memcpy(l.y, y.data, size_t(l.tokens) * l.rows * 2);
  return error;
}

const char* emulate_permute(const void* x, const uint8_t* permutation, void* y, int64_t tokens,
                            int64_t columns, int element_bytes, unsigned seed) {
  const size_t bytes = size_t(tokens) * columns * element_bytes;
  Guarded source(x, bytes), target(bytes), places(permutation, columns),
      shared(kPermuteSharedBytes);
  const PermuteArguments a{source.data, columns, places.data, target.data, tokens, columns};
  const char* error = error_of([&] {
    launch_after_another(permute_grid(a, element_bytes), kPermuteThreads, seed, shared,
                         {&source, &places}, target, [&] {
                           if (element_bytes == 1) permute_body<uint8_t>(a, shared.data);
                           if (element_bytes == 2) permute_body<uint16_t>(a, shared.data);
                           if (element_bytes == 4) permute_body<uint32_t>(a, shared.data);
                         });
  });
  std::memcpy(y, target.data, bytes);
  return error;
}

// x [stages][kStageBytes] as it lies in shared memory, permuted to y. `tile` is 32 or 64.
const char* emulate_stages(const void* x, const uint8_t* permutation, void* y, int tile, int count,
                           unsigned seed) {
  const size_t bytes = size_t(count) * (tile == 32 ? kStageBytes<32> : kStageBytes<64>);
  Guarded stages(x, bytes), places(permutation, size_t(count) * kPermutationBlock);
  const auto permute = tile == 32 ? permute_stages<32> : permute_stages<64>;
  return error_of([&] { permute(stages, places, count, static_cast<unsigned char*>(y), seed); });
}

void plan(int rows, int inputs, int tokens, int int8, int permuted, int block_rows,
          const Device* device, int* result) {
  LinearArguments a = sizes(rows, inputs, tokens, int8);
  const uint8_t permutation{};
  a.permutation = permuted ? &permutation : nullptr;
  const FewTokensPlan p =
      block_rows == 0 ? plan_few_tokens(a, *device) : plan_few_tokens(a, *device, block_rows);
  const int values[] = {p.rows, p.token_tiles, p.steps_per_split, p.splits, p.shared_bytes};
  std::copy_n(values, 5, result);
}

// The kernel that the operator takes, with its tile: of tokens, 0 for few tokens; and whether a
// pass in front of it permutes.
int choose(int rows, int inputs, int tokens, int int8, int permuted, const Device* device,
           const CutlassKernels* built, int* tile, bool* passes) {
  LinearArguments a = sizes(rows, inputs, tokens, int8);
  const uint8_t permutation{};
  a.permutation = permuted ? &permutation : nullptr;
  const auto [kernel, passed] = choose_kernel(a, *device, *built);
  *passes = passed;
  *tile = kernel == LinearKernel::kFewTokens ? 0 : tile_of(kernel, a, *device).tokens;
  return static_cast<int>(kernel);
}

// The clocks of the kernel for few tokens, as it is planned, and of that for many; with a pass
// where one permutes in front. Returns the latter kernel, with its tile.
int clocks(int rows, int inputs, int tokens, int int8, int permuted, const Device* device,
           const CutlassKernels* built, int64_t* few, int64_t* many, int* tile) {
  LinearArguments a = sizes(rows, inputs, tokens, int8);
  const uint8_t permutation{};
  a.permutation = permuted ? &permutation : nullptr;
  const FewTokensClocks planned = planned_few_tokens_clocks(a, *device);
  *few = permuted ? std::min(planned.permuting, planned.after_pass) : planned.permuting;
  const LinearKernel kernel = choose_many(a, *device, *built);
  *many = many_tokens_clocks(kernel, a, *device);
  *tile = tile_of(kernel, a, *device).tokens;
  return static_cast<int>(kernel);
}

// What is wrong with a kernel that is to be forced, in itself or for such a product, or nothing;
// else how it is forced, in `result`: the kernel, its tile and splits, of few tokens as planned.
const char* force(const char* text, int rows, int inputs, int tokens, int int8, int permuted,
                  const Device* device, const CutlassKernels* built, int* result) {
  static std::string reason;
  ForcedKernel forced{};
  reason = parse_forced_kernel(text, forced);
  if (!reason.empty()) return reason.c_str();
  LinearArguments a = sizes(rows, inputs, tokens, int8);
  const uint8_t permutation{};
  a.permutation = permuted ? &permutation : nullptr;
  reason = reason_not_to_force(forced, a, *device, *built);
  result[0] = static_cast<int>(forced.kernel);
  if (forced.kernel == LinearKernel::kFewTokens) {
    const FewTokensPlan plan = forced_few_tokens(forced, a, *device);
    result[1] = plan.rows;
    result[2] = plan.splits;
  } else {
    result[1] = forced.tile;
    result[2] = forced.splits;
  }
  return reason.c_str();
}

// Blocks in the second and third dimension of every launch for the largest sizes that the operator
// takes; `result` has room for 14.
void largest_grids(int* result) {
  const int rows = static_cast<int>(kMostRows);
  const int columns = static_cast<int>(kMostRowBytes / 4);
  const LinearArguments many = sizes(rows, 128, 1 << 30, false);
  const LinearArguments few = sizes(rows, 128, kMostCompared, false);
  const PermuteArguments permuted{nullptr, 0, nullptr, nullptr, 1 << 30, columns};
  const Device device{90, 132, 227 << 10, 228 << 10, 0, false};
  ExpertsArguments most{};
  most.tokens = kMostPairs;
  most.choices = 1;
  most.experts = kMostExperts;
  StackedLinear stack{};
  stack.padded_rows = rows;
  const ExpertsPlan experts = plan_experts(most, Device{80, 58, 99 << 10, 100 << 10, 0, false});
  for (const Grid& grid :
       {many_tokens_grid<64>(many), many_tokens_grid<128>(many),
        few_tokens_grid(few, plan_few_tokens(few, device)), reduce_grid(few),
        permute_grid(permuted, 4), row_grid(1, rows), expert_linear_grid(stack, experts)}) {
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
