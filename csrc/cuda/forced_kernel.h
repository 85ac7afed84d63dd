// A kernel that every product takes in place of the chosen one, so that a benchmark can time both.
// No header of CUDA or CUTLASS: tested on the host.
#pragma once

#include <array>
#include <charconv>
#include <sstream>
#include <string>

#include "kernel_choice.h"

namespace permllm::cuda {

// In the order of LinearKernel.
constexpr const char* kLinearKernelNames[] = {"few_tokens", "many_tokens_mma", "many_tokens_sm90",
                                              "many_tokens_sm90_permuting", "many_tokens_sm100"};

struct ForcedKernel {
  LinearKernel kernel;
  int tile;    // tokens, or rows of a block for few tokens; 0 as planned
  int splits;  // over inputs, for few tokens; 0 as planned
};

// Reads NAME, NAME:TILE or few_tokens:ROWS:SPLITS. Returns what is wrong with it, or nothing.
inline std::string parse_forced_kernel(const std::string& text, ForcedKernel& forced) {
  std::istringstream words(text.ends_with(':') ? text + ":" : text);  // else its end is ignored
  std::string name, word;
  std::getline(words, name, ':');
  const auto* found = std::find(std::begin(kLinearKernelNames), std::end(kLinearKernelNames), name);
  if (found == std::end(kLinearKernelNames)) {
    std::string names;
    for (const char* known : kLinearKernelNames)
      names += std::string(names.empty() ? "" : ", ") + known;
    return "it names none of the kernels " + names;
  }
  forced = {static_cast<LinearKernel>(found - std::begin(kLinearKernelNames)), 0, 0};
  const bool few = forced.kernel == LinearKernel::kFewTokens;
  std::array<int*, 2> numbers{&forced.tile, &forced.splits};
  size_t count = 0;
  while (std::getline(words, word, ':')) {
    const bool digits = !word.empty() && word.size() < 4 &&
                        word.find_first_not_of("0123456789") == std::string::npos;
    if (count == (few ? 2 : 1) || !digits) {
      return few ? "give few_tokens, few_tokens:ROWS or few_tokens:ROWS:SPLITS"
                 : "give " + name + " or " + name + ":TILE";
    }
    std::from_chars(word.data(), word.data() + word.size(), *numbers[count++]);
  }
  const auto is_one_of = [&](const auto& choices) {
    return std::any_of(std::begin(choices), std::end(choices),
                       [&](int choice) { return choice == forced.tile; });
  };
  const auto is_tile_of = [&](const auto& tiles) {
    return std::any_of(std::begin(tiles), std::end(tiles),
                       [&](const CutlassTile& tile) { return tile.tokens == forced.tile; });
  };
  const bool fits = count == 0                                       ? true
                    : few                                            ? is_one_of(kFewRows)
                    : forced.kernel == LinearKernel::kManyTokensMma  ? is_one_of(kMmaTiles)
                    : forced.kernel == LinearKernel::kManyTokensSm90 ? is_tile_of(kSm90Tiles)
                    : forced.kernel == LinearKernel::kManyTokensSm100
                        ? is_tile_of(kSm100Tiles)
                        : is_tile_of(kSm90PermutingTiles);
  if (!fits) return "it has no tile of " + std::to_string(forced.tile);
  if (count == 2 && (forced.splits < 1 || forced.splits > kLargestSplits)) {
    return "splits are from 1 to " + std::to_string(kLargestSplits);
  }
  return "";
}

// The one for few tokens permutes itself, as does the one that is named so; the others are given
// activations that a pass has permuted.
inline KernelChoice forced_choice(const ForcedKernel& forced, const LinearArguments& arguments) {
  return {forced.kernel, arguments.permutation != nullptr &&
                             forced.kernel != LinearKernel::kFewTokens &&
                             forced.kernel != LinearKernel::kManyTokensSm90Permuting};
}

// Blocks for few tokens as they are forced, and planned where they are not.
inline FewTokensPlan forced_few_tokens(const ForcedKernel& forced, const LinearArguments& arguments,
                                       const Device& device) {
  FewTokensPlan plan = forced.tile == 0 ? plan_few_tokens(arguments, device)
                                        : plan_few_tokens(arguments, device, forced.tile);
  if (forced.splits != 0) {
    const int steps = arguments.padded_inputs / kInputMultiple;
    plan.splits = forced.splits;
    plan.steps_per_split = (steps + forced.splits - 1) / forced.splits;
  }
  return plan;
}

// Why this product cannot take it on this GPU, or nothing.
inline std::string reason_not_to_force(const ForcedKernel& forced, const LinearArguments& arguments,
                                       const Device& device, const CutlassKernels& built) {
  if (forced.kernel == LinearKernel::kFewTokens) {
    const FewTokensPlan plan = forced_few_tokens(forced, arguments, device);
    const int steps = arguments.padded_inputs / kInputMultiple;
    if (plan.rows > kRowMultiple && plan.token_tiles * 8 < kFewTokens) {
      return "blocks of so many rows are for more than 32 tokens";
    }
    if (plan.shared_bytes > device.shared_bytes_per_block) return "its blocks find no room";
    if ((plan.splits - 1) * plan.steps_per_split >= steps) {
      return "of so many splits the last would have nothing";
    }
    return plan.splits > 1 && arguments.tokens > kMostBlocks ? "it has too many tokens" : "";
  }
  if (forced.kernel == LinearKernel::kManyTokensMma) {
    const int tokens = forced.tile == 0 ? 64 : forced.tile;
    return many_tokens_shared_bytes(tokens, arguments.int8) <= device.shared_bytes_per_block
               ? ""
               : "its blocks find no room";
  }
  if (arguments.int8 || arguments.rows % 8 != 0) {
    return "it has int8 values, or outputs that are no multiple of 8";
  }
  const LinearKernel there = choose_many(arguments, device, built);
  const bool permuting = forced.kernel == LinearKernel::kManyTokensSm90Permuting;
  if (permuting && arguments.permutation == nullptr) return "it has no permutation";
  const bool same = permuting || forced.kernel == LinearKernel::kManyTokensSm90
                        ? there == LinearKernel::kManyTokensSm90 ||
                              there == LinearKernel::kManyTokensSm90Permuting
                        : there == forced.kernel;
  return same ? "" : "this GPU or this build lacks it";
}

}  // namespace permllm::cuda
