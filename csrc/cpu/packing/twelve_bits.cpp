#include "cpu/packing/twelve_bits.h"

#include <algorithm>
#include <cstring>

#include "cpu/threads/threads.h"

namespace permllm::cpu {

Packing find_strays(const PackedLayout& layout, const bf16* values, int64_t count) {
  const int64_t group_rows = layout.rows(), groups = ceil_div(layout.n, group_rows);
  Packing packing{layout, std::vector<uint8_t>(groups * group_rows),
                  std::vector<int32_t>(groups + 1)};
  std::vector<int64_t> strays(groups);
  parallel_for(groups, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * group_rows; row < std::min(end * group_rows, layout.n); ++row) {
      const UpperByte upper = upper_byte(values + row * count, count);
      packing.largest[row] = upper.largest;
      strays[row / group_rows] += upper.strays;
    }
  });
  for (int64_t group = 0; group < groups; ++group) {
    packing.layout.strays += strays[group];
    if (packing.layout.strays > layout.most_strays()) {
      return {{layout.isa, ValueType::kBfloat16, layout.n, layout.k}, {}, {}};
    }
    packing.first_stray[group + 1] = static_cast<int32_t>(packing.layout.strays);
  }
  return packing;
}

Stray* write_tables(const Packing& packing, char* behind) {
  std::memcpy(behind, packing.largest.data(), packing.largest.size());
  behind += packing.largest.size();
  const size_t bytes = packing.first_stray.size() * sizeof(int32_t);
  std::memcpy(behind, packing.first_stray.data(), bytes);
  return reinterpret_cast<Stray*>(behind + bytes);
}

}  // namespace permllm::cpu
