// The kernels for a layer of experts on the emulator, one after the other.
#pragma once

#include "expert_linear.h"
#include "expert_routing.h"
#include "expert_rows.h"
#include "guarded.h"

namespace permllm::cuda {

template <class Element, class Value>
void few_pairs(const StackedLinear& linear, const ExpertBlock* blocks, const FewTokensPlan& plan,
               const void* x, void* y, unsigned char* shared) {
  switch (plan.token_tiles) {
    case 1:
      return few_pairs_body<Element, Value, 1>(linear, blocks, plan, x, y, shared);
    case 2:
      return few_pairs_body<Element, Value, 2>(linear, blocks, plan, x, y, shared);
    case 4:
      return few_pairs_body<Element, Value, 4>(linear, blocks, plan, x, y, shared);
    default:
      return few_pairs_body<Element, Value, 8>(linear, blocks, plan, x, y, shared);
  }
}

// What a kernel of the sequence may find written by one before it.
struct ExpertMemory {
  Guarded &x, &ids, &weights, &gate_up_permutation, &gate_up_scale, &down_permutation, &down_scale,
      &tables, &gathered, &gate_ups, &gated, &y;
};

template <class Element>
void run_experts(const ExpertsArguments& a, const ExpertsPlan& plan, const Device& device,
                 unsigned seed, const ExpertMemory& m) {
  const auto run = [&](Grid grid, unsigned threads, int shared_bytes,
                       const std::vector<Guarded*>& inputs, Guarded& output,
                       const std::function<void(unsigned char*)>& body) {
    if (shared_bytes > device.shared_bytes_per_block) emulator::fail("too much shared memory");
    Guarded shared(shared_bytes);
    launch_after_another(grid, threads, seed, shared, inputs, output, [&] { body(shared.data); });
    seed += 1000;
  };
  const auto multiply = [&](const StackedLinear& linear, const FewTokensPlan& few, Guarded& x,
                            Guarded& scale, Guarded& y) {
    const Grid grid = expert_linear_grid(linear, plan);
    const std::vector<Guarded*> inputs{&m.tables, &scale, &x};
    if (plan.many()) {
      run(grid, kManyThreads<kManyPairs>, many_pairs_shared_bytes(linear), inputs, y,
          [&](unsigned char* shared) {
            const auto body =
                linear.int8 ? many_pairs_body<Element, int8_t> : many_pairs_body<Element, uint16_t>;
            body(linear, a.tables.blocks, x.data, y.data, shared);
          });
      return;
    }
    run(grid, few_tokens_threads(few.rows), few.shared_bytes, inputs, y,
        [&](unsigned char* shared) {
          const auto body = linear.int8 ? few_pairs<Element, int8_t> : few_pairs<Element, uint16_t>;
          body(linear, a.tables.blocks, few, x.data, y.data, shared);
        });
  };
  run(Grid{}, kRouteThreads, kRouteSharedBytes, {&m.ids}, m.tables,
      [&](unsigned char* shared) { route_body(a, plan, shared); });
  run(row_grid(plan.pairs, a.gate_up.inputs), kRowThreads, kRowSharedBytes,
      {&m.tables, &m.x, &m.gate_up_permutation}, m.gathered,
      [&](unsigned char* shared) { gather_body(a, shared); });
  multiply(a.gate_up, plan.gate_up, m.gathered, m.gate_up_scale, m.gate_ups);
  run(row_grid(plan.pairs, a.down.inputs), kRowThreads, kRowSharedBytes,
      {&m.tables, &m.gate_ups, &m.down_permutation}, m.gated,
      [&](unsigned char* shared) { gate_body<Element>(a, shared); });
  multiply(a.down, plan.down, m.gated, m.down_scale, m.gathered);
  run(row_grid(a.tokens, a.down.rows), kRowThreads, 0, {&m.tables, &m.gathered, &m.weights}, m.y,
      [&](unsigned char*) { combine_body<Element>(a); });
}

}  // namespace permllm::cuda

extern "C" {

struct Stack {
  int int8, rows, inputs, padded_rows, padded_inputs;
  const void *values, *metadata, *permutation, *scale;
};

struct Experts {
  int element, tokens, choices, experts, x_stride, activation;
  const void *x, *ids, *weights;
  Stack gate_up, down;
  void* y;
};

// Returns an error or null; `blocks` gets the number of blocks that had pairs.
const char* emulate_experts(const Experts* experts, const permllm::cuda::Device* device,
                            unsigned seed, int* blocks) {
  using namespace permllm::cuda;
  const Experts& e = *experts;
  const auto bytes_of = [&](const Stack& s) {
    return size_t(e.experts) * s.padded_rows * s.padded_inputs;
  };
  const auto permutation = [&](const Stack& s) {
    return s.permutation ? size_t(e.experts) * s.padded_inputs : 0;
  };
  const auto scale = [&](const Stack& s) { return s.scale ? size_t(e.experts) * s.rows * 4 : 0; };
  const size_t pairs = size_t(e.tokens) * e.choices;
  Guarded x(e.x, (size_t(e.tokens - 1) * e.x_stride + e.gate_up.inputs) * 2);
  Guarded ids(e.ids, pairs * 4), weights(e.weights, pairs * 4);
  const auto value_bytes = [&](const Stack& s) { return bytes_of(s) / 2 * (s.int8 ? 1 : 2); };
  Guarded values[] = {Guarded(e.gate_up.values, value_bytes(e.gate_up)),
                      Guarded(e.down.values, value_bytes(e.down))};
  Guarded metadata[] = {Guarded(e.gate_up.metadata, bytes_of(e.gate_up) / 8),
                        Guarded(e.down.metadata, bytes_of(e.down) / 8)};
  Guarded permutations[] = {Guarded(e.gate_up.permutation, permutation(e.gate_up)),
                            Guarded(e.down.permutation, permutation(e.down))};
  Guarded scales[] = {Guarded(e.gate_up.scale, scale(e.gate_up)),
                      Guarded(e.down.scale, scale(e.down))};
  const auto stacked = [&](const Stack& s, int i) {
    return StackedLinear{s.int8 != 0,
                         values[i].data,
                         metadata[i].data,
                         s.permutation ? permutations[i].data : nullptr,
                         s.scale ? reinterpret_cast<const float*>(scales[i].data) : nullptr,
                         s.rows,
                         s.inputs,
                         s.padded_rows,
                         s.padded_inputs};
  };
  ExpertsArguments a{};
  a.element = static_cast<ElementType>(e.element);
  a.x = x.data;
  a.x_stride = e.x_stride;
  a.tokens = e.tokens;
  a.choices = e.choices;
  a.experts = e.experts;
  a.activation = static_cast<permllm::Activation>(e.activation);
  a.ids = reinterpret_cast<const int*>(ids.data);
  a.weights = reinterpret_cast<const float*>(weights.data);
  a.gate_up = stacked(e.gate_up, 0);
  a.down = stacked(e.down, 1);
  const ExpertsPlan plan = plan_experts(a, *device);
  Guarded tables(plan.table_ints() * 4);
  Guarded gathered(pairs * a.gate_up.inputs * 2), gate_ups(pairs * a.gate_up.rows * 2);
  Guarded gated(pairs * a.down.inputs * 2);
  Guarded y(size_t(e.tokens) * a.down.rows * 2);
  a.tables = tables_at(reinterpret_cast<int*>(tables.data), plan);
  a.gathered = gathered.data;
  a.gate_ups = gate_ups.data;
  a.gated = gated.data;
  a.outputs = gathered.data;  // as the operator has it
  a.y = y.data;
  const ExpertMemory memory{
      x,         ids,    weights,  permutations[0], scales[0], permutations[1],
      scales[1], tables, gathered, gate_ups,        gated,     y};
  const char* error = error_of([&] {
    a.element == ElementType::kFloat16 ? run_experts<Float16>(a, plan, *device, seed, memory)
                                       : run_experts<BFloat16>(a, plan, *device, seed, memory);
  });
  *blocks = 0;
  for (int b = 0; b < plan.blocks; ++b) *blocks += a.tables.blocks[b].count > 0;
  std::memcpy(e.y, y.data, size_t(e.tokens) * a.down.rows * 2);
  return error;
}
}
