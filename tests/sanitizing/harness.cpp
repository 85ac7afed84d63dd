// The CPU kernels without Python and torch's threads: for sanitizers that cannot watch those.
//
// Packs random layers for every instruction set of this machine and multiplies them with random
// activations, from several threads at once. Arrays are allocated to the byte, so that a sanitizer
// sees each access outside them. Answers are held against a product in plain loops.
//
// usage: harness [plant]    plant: overflow, undefined or race, a bug of that class
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cpu/experts/experts.h"
#include "cpu/linear.h"
#include "cpu/packing/pack.h"
#include "cpu/threads/threads.h"
#include "words_of_16_bits.h"

namespace permllm::cpu {

// In place of csrc/cpu/threads/threads.cpp, whose OpenMP runtime is not instrumented.
constexpr int64_t kThreads = 3;
int64_t thread_count() { return kThreads; }

void parallel_ranges(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> workers;
  const int64_t part = ceil_div(count, kThreads);
  for (int64_t begin = part; begin < count; begin += part) {
    workers.emplace_back(body, context, begin, std::min(begin + part, count));
  }
  if (count > 0) body(context, 0, std::min(part, count));
  for (std::thread& worker : workers) worker.join();
}

}  // namespace permllm::cpu

namespace {

using namespace permllm::cpu;
using permllm::Activation;

// In the last, threads share the packing of x.
constexpr int64_t kShapes[][2] = {{1, 8},    {5, 72},    {16, 64},  {33, 200},
                                  {70, 576}, {129, 136}, {24, 3328}};
constexpr int64_t kTokens[] = {1, 2, 5, 9, 12, 13, 16, 17, 31, 33, 40, 65, 273};

// A block of exactly `bytes` bytes that begins on a cache line, as the kernels ask for.
struct Aligned {
  void* data;
  explicit Aligned(size_t bytes) {
    if (posix_memalign(&data, 64, bytes) != 0) std::abort();
  }
  ~Aligned() { std::free(data); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
};

struct Layer {
  int64_t n, k;
  ValueType type;
  std::vector<bf16> values;      // [n, k / 2], for bfloat16
  std::vector<int8_t> integers;  // the same, for int8; of even n they fit 4 bits
  std::vector<uint8_t> mask, permutation;
  std::vector<float> scale, dense, dense_bias;  // the bias: multiples of 1/16, below 4

  // Half of every `of` inputs are kept.
  Layer(int64_t n, int64_t k, ValueType type, std::mt19937& random, int of = 4)
      : n(n), k(k), type(type), mask(n * k / 8), scale(n, 1.0f), dense(n * k) {
    std::normal_distribution<float> normal;
    if (k % 64 == 0) {
      for (int64_t block = 0; block < k; block += 64) {
        std::vector<uint8_t> entries(64);
        std::iota(entries.begin(), entries.end(), 0);
        std::shuffle(entries.begin(), entries.end(), random);
        permutation.insert(permutation.end(), entries.begin(), entries.end());
      }
    }
    const bool int8 = type == ValueType::kInt8;
    for (int64_t row = 0; row < n; ++row) {
      if (int8) scale[row] = 0.01f + 0.001f * static_cast<float>(row % 7);
      dense_bias.push_back((static_cast<float>(random() % 127) - 63) / 16);
      for (int64_t group = 0; group < k; group += of) {
        std::vector<int> chosen(std::min<int64_t>(of, k - group));
        std::iota(chosen.begin(), chosen.end(), 0);
        std::shuffle(chosen.begin(), chosen.end(), random);
        chosen.resize(chosen.size() / 2);
        std::sort(chosen.begin(), chosen.end());
        for (size_t i = 0; i < chosen.size(); ++i) {
          const int64_t j = group + chosen[i];
          mask[row * k / 8 + j / 8] |= static_cast<uint8_t>(1 << (j % 8));
          const int64_t place = permutation.empty() ? j : j / 64 * 64 + permutation[j];
          float value;
          if (int8) {
            const auto any = static_cast<int8_t>(random()), step = int8_t(1 + group / 64 % 16);
            integers.push_back(n % 2 == 0 ? static_cast<int8_t>(any / 16 * step) : any);
            value = static_cast<float>(integers.back()) * scale[row];
          } else {
            values.push_back(rounded(normal(random)));
            value = widened(values.back());
          }
          dense[row * k + place] = value;
        }
      }
    }
  }

  template <class Real>
  std::vector<Real> bias() const {
    std::vector<Real> found(n);
    for (int64_t row = 0; row < n; ++row) set(found[row], dense_bias[row]);
    return found;
  }
};

// Largest error, as a share of the sum of the magnitudes that were added.
template <class Real>
double error_of(const Layer& layer, const std::vector<Real>& x, const Real* y, int64_t m) {
  double largest = 0;
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t row = 0; row < layer.n; ++row) {
      double sum = layer.dense_bias[row], magnitude = std::abs(sum) + 1e-3;
      for (int64_t j = 0; j < layer.k; ++j) {
        const double product = double{widened(x[t * layer.k + j])} * layer.dense[row * layer.k + j];
        sum += product;
        magnitude += std::abs(product);
      }
      largest = std::max(largest, std::abs(widened(y[t * layer.n + row]) - sum) / magnitude);
    }
  }
  return largest;
}

// Every number of tokens, with x and y of a type.
template <class Real>
int check_type(const PackedLayout& layout, const Layer& layer, const void* blob,
               const std::vector<int32_t>& places, std::mt19937& random) {
  const bool int8 = layer.type == ValueType::kInt8;
  const std::vector<Real> bias = layer.bias<Real>();
  int calls = 0;
  for (const int64_t m : kTokens) {
    std::normal_distribution<float> normal;
    std::vector<Real> x(m * layer.k);
    for (Real& entry : x) set(entry, normal(random));
    std::vector<Real> y(m * layer.n);
    LinearOf<Real> arguments{};
    arguments.x = x.data();
    arguments.x_stride = layer.k;
    arguments.m = m;
    arguments.packed = blob;
    arguments.n = layer.n;
    arguments.k = layer.k;
    arguments.bias = bias.data();
    arguments.y = y.data();
    arguments.behind = layout.behind(blob);
    if (int8) arguments.scale = layer.scale.data();
    linear(layout.isa, layout.type, arguments, places.empty() ? nullptr : places.data());
    const double error = error_of(layer, x, y.data(), m);
    if (error > (int8 ? 0.02 : 0.005)) {
      std::printf("wrong answer: %s, %s, %ld x %ld, %ld tokens, off by %g\n", name(layout.isa),
                  int8 ? "int8" : "bfloat16", layer.n, layer.k, m, error);
      std::exit(1);
    }
    std::vector<int32_t> gather(layer.k);
    std::iota(gather.rbegin(), gather.rend(), 0);
    linear(layout.isa, layout.type, arguments, gather.data());
    calls += 2;
  }
  return calls;
}

int check(Isa isa, const Layer& layer, bool short_blob, std::mt19937& random) {
  const bool int8 = layer.type == ValueType::kInt8;
  PackArguments pack_arguments{};
  pack_arguments.values = int8 ? static_cast<const void*>(layer.integers.data())
                               : static_cast<const void*>(layer.values.data());
  pack_arguments.type = layer.type;
  pack_arguments.mask = layer.mask.data();
  const bool permuted = !layer.permutation.empty(), undone = undoes_permutation(isa);
  pack_arguments.permutation = permuted && undone ? layer.permutation.data() : nullptr;
  pack_arguments.block_size = 64;
  pack_arguments.group = kBlockInputs;
  pack_arguments.n = layer.n;
  pack_arguments.k = layer.k;
  const Packing packing = choose_packing(isa, pack_arguments);
  const PackedLayout& layout = packing.layout;
  Aligned packed(layout.bytes());
  if (pack(packing, pack_arguments, packed.data).row >= 0) std::abort();

  const int64_t given = short_blob ? layout.block_bytes() / 2 : layout.bytes();
  Aligned blob(given);
  std::memcpy(blob.data, packed.data, given);
  std::vector<int32_t> places;  // of the permuted channels, for kernels that do not undo
  for (int64_t j = 0; permuted && !undone && j < layer.k; ++j) {
    places.push_back(static_cast<int32_t>(j / 64 * 64 + layer.permutation[j]));
  }
  return check_type<bf16>(layout, layer, blob.data, places, random) +
         check_type<fp16>(layout, layer, blob.data, places, random);
}

// The rows of an output head: int8 values, or bfloat16 in 12 bits; those of a layer, zeros and all.
int check_dense(Isa isa, ValueType type, const Layer& layer, std::mt19937& random) {
  const int64_t size = layer.n * layer.k;
  std::vector<int8_t> integers(size);
  std::vector<bf16> words(size);
  for (int64_t i = 0; i < size; ++i) {
    integers[i] = static_cast<int8_t>(std::lround(layer.dense[i] / layer.scale[i / layer.k]));
    words[i] = rounded(layer.dense[i]);
  }
  const Packing packing = type == ValueType::kDense8
                              ? Packing{{isa, type, layer.n, layer.k}, {}, {}}
                              : choose_dense_packing(isa, words.data(), layer.n, layer.k);
  if (packing.layout.type != type) return 0;  // too many values have no 12 bits
  Aligned packed(packing.layout.bytes());
  if (type == ValueType::kDense8) {
    pack_dense_int8(packing.layout, integers.data(), packed.data);
  } else {
    pack_dense(packing, words.data(), packed.data);
  }
  return check_type<bf16>(packing.layout, layer, packed.data, {}, random) +
         check_type<fp16>(packing.layout, layer, packed.data, {}, random);
}

// The packed weights of some layers alike, one after the other, as multiply_experts takes them.
struct Stack {
  std::vector<Layer> layers;
  std::vector<int64_t> headers;
  std::vector<PackedLayout> layouts;
  std::vector<float> scales;
  std::unique_ptr<Aligned> packed;

  Stack(Isa isa, int64_t n, int64_t k, ValueType type, int64_t experts, std::mt19937& random) {
    std::vector<Packing> packings;
    std::vector<PackArguments> arguments;
    int64_t bytes = 0;
    layers.reserve(experts);
    for (int64_t expert = 0; expert < experts; ++expert) {
      const int of =
          has_lanes(isa) || has_groups(isa) ? 4 << 2 * (expert % 3) : 4;  // whose blocks are others
      const Layer& layer = layers.emplace_back(n, k, type, random, of);
      const void* values = type == ValueType::kInt8
                               ? static_cast<const void*>(layer.integers.data())
                               : static_cast<const void*>(layer.values.data());
      arguments.push_back({values, type, layer.mask.data(), nullptr, 64, kBlockInputs, n, k});
      packings.push_back(choose_packing(isa, arguments.back()));
      const PackedLayout& layout = packings.back().layout;
      headers.insert(headers.end(), {kLayoutVersion, static_cast<int64_t>(isa), layout.rows(), n, k,
                                     static_cast<int64_t>(layout.type), layout.strays, bytes});
      scales.insert(scales.end(), layer.scale.begin(), layer.scale.end());
      layouts.push_back(layout);
      bytes += ceil_div(layout.bytes(), 64) * 64;
    }
    packed = std::make_unique<Aligned>(bytes);
    for (int64_t expert = 0; expert < experts; ++expert) {
      pack(packings[expert], arguments[expert], place(expert));
    }
  }

  char* place(int64_t expert) const {
    return static_cast<char*>(packed->data) + headers[(expert + 1) * StackedLinear::kHeader - 1];
  }

  StackedLinear linear() const {
    const bool int8 = layers[0].type == ValueType::kInt8;
    return {place(0),    headers.data(), nullptr, int8 ? scales.data() : nullptr,
            layers[0].n, layers[0].k};
  }

  // What a row of x and an expert give.
  template <class Real>
  std::vector<Real> multiply(int64_t expert, const Real* x) const {
    std::vector<Real> y(layers[0].n);
    LinearOf<Real> a{};
    a.x = x;
    a.x_stride = a.k = layers[0].k;
    a.m = 1;
    a.packed = place(expert);
    a.n = layers[0].n;
    a.y = y.data();
    a.behind = layouts[expert].behind(a.packed);
    if (layers[0].type == ValueType::kInt8) a.scale = layers[expert].scale.data();
    permllm::cpu::linear(layouts[expert].isa, layouts[expert].type, a, nullptr);
    return y;
  }
};

double activated(double gate, Activation activation) {
  if (activation == Activation::kRelu2) return gate < 0 ? 0 : gate * gate;
  const double cubic = std::sqrt(8 / M_PI) * (gate + 0.044715 * gate * gate * gate);
  return gate / (1 + std::exp(activation == Activation::kGeluTanh ? -cubic : -gate));
}

// Experts of a layer against the products of one token and one expert after the other.
template <class Real>
int check_experts(Isa isa, ValueType type, std::mt19937& random) {
  constexpr int64_t kExperts = 3, kChoices = 2, kHidden = 136, kInner = 72;
  const Stack gate_up(isa, 2 * kInner, kHidden, type, kExperts, random);
  const Stack up_alone(isa, kInner, kHidden, type, kExperts, random);
  const Stack down(isa, kHidden, kInner, type, kExperts, random);
  int calls = 0;
  // The last have more choices than are in memory at a time, and some of their tokens are checked.
  for (const int64_t tokens : {1, 3, 50, 1600}) {
    std::normal_distribution<float> normal(0.0f, 0.1f);
    std::vector<Real> x(tokens * kHidden), y(tokens * kHidden);
    std::vector<int32_t> ids;
    std::vector<float> weights;
    for (Real& entry : x) set(entry, normal(random));
    for (int64_t i = 0; i < tokens * kChoices; ++i) {
      ids.push_back(static_cast<int32_t>(random() % (kExperts + 1)) - 1);
      weights.push_back(0.25f + static_cast<float>(random() % 3));
    }
    const Routing routing = route(ids.data(), weights.data(), tokens, kChoices, kExperts);
    const auto activation = static_cast<Activation>(calls % permllm::kActivations);
    const Stack& first = has_gate(activation) ? gate_up : up_alone;
    multiply_experts<Real>(
        {x.data(), kHidden, tokens, first.linear(), down.linear(), activation, y.data()}, routing);
    double difference = 0, magnitude = 1e-6;
    for (int64_t token = 0; token < tokens; token += tokens > 50 ? 199 : 1) {
      std::vector<double> sums(kHidden);
      for (int64_t choice = token * kChoices; choice < (token + 1) * kChoices; ++choice) {
        if (ids[choice] < 0) continue;
        const std::vector<Real> products = first.multiply(ids[choice], &x[token * kHidden]);
        std::vector<Real> inner(kInner);
        for (int64_t i = 0; i < kInner; ++i) {
          const double gate = activated(widened(products[i]), activation);
          set(inner[i], has_gate(activation) ? gate * widened(products[kInner + i]) : gate);
        }
        const std::vector<Real> found = down.multiply(ids[choice], inner.data());
        for (int64_t i = 0; i < kHidden; ++i) sums[i] += weights[choice] * widened(found[i]);
      }
      for (int64_t i = 0; i < kHidden; ++i) {
        difference += std::pow(sums[i] - widened(y[token * kHidden + i]), 2);
        magnitude += std::pow(sums[i], 2);
      }
    }
    const double error = std::sqrt(difference / magnitude);
    if (error > (type == ValueType::kInt8 ? 0.03 : 0.006)) {
      std::printf("wrong answer: %s, experts, %ld tokens, off by %g\n", name(isa), tokens, error);
      std::exit(1);
    }
    ++calls;
  }
  return calls;
}

int sweep(Isa isa, bool short_blob, unsigned seed) {
  std::mt19937 random(seed);
  int calls = 0;
  for (const auto& [n, k] : kShapes) {
    for (const ValueType type : {ValueType::kBfloat16, ValueType::kInt8}) {
      if (!has_kernel(isa, type)) continue;
      const Layer layer(n, k, type, random);
      calls += check(isa, layer, short_blob, random);
      for (const int of : {16, 64}) {
        calls += check(isa, Layer(n, k, type, random, of), short_blob, random);
      }
      const ValueType dense = type == ValueType::kInt8 ? ValueType::kDense8 : ValueType::kDense12;
      if (has_kernel(isa, dense)) calls += check_dense(isa, dense, layer, random);
    }
  }
  for (const ValueType type : {ValueType::kBfloat16, ValueType::kInt8}) {
    if (!has_kernel(isa, type)) continue;
    calls += check_experts<bf16>(isa, type, random) + check_experts<fp16>(isa, type, random);
  }
  return calls;
}

// Two threads write the same element.
void race() {
  int64_t shared = 0;
  std::thread other([&] { ++shared; });
  ++shared;
  other.join();
  std::printf("%ld\n", shared);
}

}  // namespace

int main(int count, char** words) {
  const std::string plant = count > 1 ? words[1] : "";
  if (plant == "race") race();
  volatile int bits = 31;
  if (plant == "undefined") std::printf("%d\n", 1 << (bits + 1));
  int calls = 0, instruction_sets = 0;
  std::istringstream names(supported_names());
  for (std::string word; std::getline(names, word, ',');) {
    const Isa isa = select(word);
    ++instruction_sets;
    int of_thread[2] = {0, 0};
    std::thread other([&] { of_thread[1] = sweep(isa, plant == "overflow", 1); });
    of_thread[0] = sweep(isa, plant == "overflow", 2);
    other.join();
    calls += of_thread[0] + of_thread[1];
  }
  std::printf("harness: %d calls, %d instruction sets (%s)\n", calls, instruction_sets,
              supported_names().c_str());
  return 0;
}
