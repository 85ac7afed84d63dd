// The kernels of csrc/cuda on the emulator, behind a C interface for the tests.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "few_tokens.h"
#include "many_tokens_mma.h"
#include "permute.h"

namespace permllm::cuda {
namespace {

// Bytes that end where accessible memory ends: reading or writing past them is a fault.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    bytes_ = bytes;
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) emulator::fail("out of memory");
    mprotect(base_ + mapped_ - page, page, PROT_NONE);
    data = base_ + mapped_ - page - bytes;
    poison();
  }
  Guarded(const void* source, size_t bytes) : Guarded(bytes) { std::memcpy(data, source, bytes); }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  void poison() { std::memset(data, 0xff, bytes_); }

  unsigned char* data;

 private:
  unsigned char* base_;
  size_t bytes_;
  size_t mapped_;
};

template <class Element, class Value>
void few_tokens(const LinearArguments& a, const FewTokensPlan& plan, float* partial,
                unsigned char* shared) {
  switch (plan.token_tiles) {
    case 1:
      return few_tokens_body<Element, Value, 1>(a, plan, partial, shared);
    case 2:
      return few_tokens_body<Element, Value, 2>(a, plan, partial, shared);
    case 4:
      return few_tokens_body<Element, Value, 4>(a, plan, partial, shared);
    default:
      return few_tokens_body<Element, Value, 8>(a, plan, partial, shared);
  }
}

template <class Element, class Value>
void run_few(const LinearArguments& a, const Device& device, unsigned seed,
             const std::function<void()>& hide_x, const std::function<void()>& show_x) {
  const FewTokensPlan plan = plan_few_tokens(a, device);
  if (plan.shared_bytes > device.shared_bytes_per_block) emulator::fail("too much shared memory");
  Guarded shared(plan.shared_bytes);
  Guarded partial(plan.splits * size_t(a.tokens) * a.padded_rows * 4);
  auto* sums = plan.splits > 1 ? reinterpret_cast<float*>(partial.data) : nullptr;
  const int tokens = 8 * plan.token_tiles;
  const Index grid{unsigned(a.padded_rows / kStepRows), unsigned(plan.splits),
                   unsigned((a.tokens + tokens - 1) / tokens)};
  emulator::launch(
      grid, kFewThreads, seed,
      [&] {
        shared.poison();
        hide_x();
      },
      show_x, [&] { few_tokens<Element, Value>(a, plan, sums, shared.data); });
  if (sums == nullptr) return;
  const Index reduce{unsigned((a.padded_rows / 8 + kReduceThreads - 1) / kReduceThreads),
                     unsigned(a.tokens), 1};
  emulator::launch(
      reduce, kReduceThreads, seed, [] {}, [] {},
      [&] { reduce_body<Element>(a, sums, plan.splits); });
}

template <class Element, class Value, int kTokens>
void run_many_tile(const LinearArguments& a, unsigned seed, const std::function<void()>& hide_x,
                   const std::function<void()>& show_x) {
  Guarded shared(many_tokens_shared_bytes<Value, kTokens>());
  const Index grid{unsigned((a.tokens + kTokens - 1) / kTokens),
                   unsigned(a.padded_rows / kStepRows), 1};
  emulator::launch(
      grid, kManyThreads<kTokens>, seed,
      [&] {
        shared.poison();
        hide_x();
      },
      show_x, [&] { many_tokens_body<Element, Value, kTokens>(a, shared.data); });
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

// kernel: 0 few tokens, else the token tile of the many-token kernel.
void emulate_linear(const Layer* layer, int kernel, const Device* device, unsigned seed) {
  const Layer& l = *layer;
  const size_t value_bytes = l.int8 ? 1 : 2;
  const size_t x_bytes = (size_t(l.tokens - 1) * l.x_stride + l.inputs) * 2;
  Guarded x(l.x, x_bytes), y(size_t(l.tokens) * l.rows * 2);
  Guarded values(l.values, size_t(l.padded_rows) * l.padded_inputs / 2 * value_bytes);
  Guarded metadata(l.metadata, size_t(l.padded_rows) * l.padded_inputs / 8);
  Guarded permutation(l.permutation ? l.permutation : l.metadata,
                      l.permutation ? l.padded_inputs : 0);
  Guarded scale(l.scale ? l.scale : l.metadata, l.scale ? l.rows * 4 : 0);
  Guarded bias(l.bias ? l.bias : l.metadata, l.bias ? l.rows * 2 : 0);
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
  const auto hide_x = [&] { x.poison(); };
  const auto show_x = [&] { std::memcpy(x.data, l.x, x_bytes); };
  const auto run = [&]<class Element, class Value>() {
    if (kernel == 0) return run_few<Element, Value>(a, *device, seed, hide_x, show_x);
    if (kernel == 64) return run_many_tile<Element, Value, 64>(a, seed, hide_x, show_x);
    return run_many_tile<Element, Value, 128>(a, seed, hide_x, show_x);
  };
  const bool float16 = a.element == ElementType::kFloat16;
  if (a.int8) {
    float16 ? run.operator()<Float16, int8_t>() : run.operator()<BFloat16, int8_t>();
  } else {
    float16 ? run.operator()<Float16, uint16_t>() : run.operator()<BFloat16, uint16_t>();
  }
  std::memcpy(l.y, y.data, size_t(l.tokens) * l.rows * 2);
}

void emulate_permute(const void* x, const uint8_t* permutation, void* y, int64_t tokens,
                     int64_t columns, int element_bytes, unsigned seed) {
  const size_t bytes = size_t(tokens) * columns * element_bytes;
  Guarded source(x, bytes), target(bytes), places(permutation, columns),
      shared(kPermuteSharedBytes);
  const PermuteArguments a{source.data, columns, places.data, target.data, tokens, columns};
  const int64_t lanes = columns * element_bytes / 16;
  const Index grid{unsigned((tokens + kPermuteTokens - 1) / kPermuteTokens),
                   unsigned((lanes + kPermuteThreads - 1) / kPermuteThreads), 1};
  emulator::launch(
      grid, kPermuteThreads, seed,
      [&] {
        shared.poison();
        source.poison();
      },
      [&] { std::memcpy(source.data, x, bytes); },
      [&] {
        if (element_bytes == 1) permute_body<uint8_t>(a, shared.data);
        if (element_bytes == 2) permute_body<uint16_t>(a, shared.data);
        if (element_bytes == 4) permute_body<uint32_t>(a, shared.data);
      });
  std::memcpy(y, target.data, bytes);
}

void plan(int rows, int inputs, int tokens, int int8, const Device* device, int* result) {
  LinearArguments a{};
  a.int8 = int8;
  a.tokens = tokens;
  a.rows = rows;
  a.inputs = inputs;
  a.padded_rows = static_cast<int>(round_up(rows, kRowMultiple));
  a.padded_inputs = static_cast<int>(round_up(inputs, kInputMultiple));
  const FewTokensPlan p = plan_few_tokens(a, *device);
  const int values[] = {p.token_tiles, p.steps_per_split, p.splits, p.panel_steps, p.shared_bytes};
  std::copy_n(values, 5, result);
}
}
