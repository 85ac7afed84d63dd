// AMX, bfloat16 values, any number of tokens.
#include "cpu/amx/many.h"

namespace permllm::cpu {
namespace {

template <class V>
struct Bf16Products {
  using Value = V;
  using Block = permllm::cpu::Block<kAmxRows, V>;
  using Tiles = WeightTiles;
  static constexpr int kParts = 2;

  explicit Bf16Products(const LinearArguments& arguments) : a(arguments) {}

  static void measure(Worker&) {}

  void pack(int64_t token, int64_t tokens, int64_t input, int columns, char* tiles) const {
    pack_activations(a, token, tokens, input, columns, tiles);
  }

  static const void* part(const WeightTiles& weights, int half) { return weights.half[half]; }

  template <int C, int A, int B>
  static void multiply_add() {
    tile::multiply_add<C, A, B>();
  }

  void write(const SumTile& sums0, const SumTile& sums1, int64_t row, int64_t token) const {
    const OutputColumns out(a, row);
    store_outputs(sums0, sums1, token, smaller(a.m - token, kTileColumns), out);
  }

  const LinearArguments& a;
};

}  // namespace

template <class Value>
void amx_many_tokens(const LinearArguments& a, Worker& worker) {
  multiply_many_tokens<Bf16Products<Value>>(a, worker);
}

template void amx_many_tokens<bf16>(const LinearArguments&, Worker&);
template void amx_many_tokens<bf12>(const LinearArguments&, Worker&);
template void amx_many_tokens<dense12>(const LinearArguments&, Worker&);

}  // namespace permllm::cpu
