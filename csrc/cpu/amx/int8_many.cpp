// AMX, int8 values, any number of tokens: W8A8. A block of 64 inputs is one tile.
#include "cpu/amx/many.h"
#include "cpu/amx/quantize.h"

namespace permllm::cpu {
namespace {

template <class V>
struct Int8Products {
  using Value = V;
  using Block = permllm::cpu::Block<kAmxRows, V>;
  using Tiles = Int8WeightTile;
  static constexpr int kParts = 1;

  explicit Int8Products(const LinearArguments& arguments) : a(arguments), x(arguments) {}

  void measure(Worker& worker) const { x.measure(worker); }

  void pack(int64_t token, int64_t tokens, int64_t input, int columns, char* tile) const {
    x.pack_bytes(token, tokens, input, columns, tile);
  }

  static const void* part(const Int8WeightTile& weights, int) { return weights.rows; }

  template <int C, int A, int B>
  static void multiply_add() {
    tile::multiply_add_int8<C, A, B>();
  }

  void write(const SumTile& sums0, const SumTile& sums1, int64_t row, int64_t token) const {
    x.write(OutputColumns(a, row), row, token,
            [&](int tile, int r) { return to_float(tile == 0 ? sums0.rows[r] : sums1.rows[r]); });
  }

  const LinearArguments& a;
  QuantizedTokens<kLargest8> x;
};

}  // namespace

template <class Value>
void amx_int8_many_tokens(const LinearArguments& a, Worker& worker) {
  multiply_many_tokens<Int8Products<Value>>(a, worker);
}

template void amx_int8_many_tokens<int8_t>(const LinearArguments&, Worker&);
template void amx_int8_many_tokens<int4>(const LinearArguments&, Worker&);
template void amx_int8_many_tokens<dense8>(const LinearArguments&, Worker&);

}  // namespace permllm::cpu
