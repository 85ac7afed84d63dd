#include "cpu/memory/weight_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#include "cpu/memory/huge_pages.h"
#include "cpu/memory/poison.h"

namespace permllm::cpu {
namespace {

constexpr size_t kSegment = size_t{256} << 20;
constexpr size_t kAlignment = 64;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// Addresses that weights take one after the other. What a weight leaves is not taken again before
// all are gone: models come and go as a whole.
class Segment {
 public:
  explicit Segment(size_t bytes)
      : bytes_(bytes), begin_(static_cast<char*>(allocate_huge(bytes))), users_(bytes / kHugePage) {
    poison(begin_, bytes_);
  }

  bool has_room(size_t bytes) const { return bytes + kRedZone <= bytes_ - used_; }
  bool holds(const char* data) const { return data >= begin_ && data < begin_ + bytes_; }
  bool empty() const { return weights_ == 0; }

  void unmap() {
    unpoison(begin_, bytes_);
    release_huge(begin_, bytes_);
  }

  void* take(size_t bytes) {
    char* data = begin_ + used_;
    for (size_t page = page_of(data); page <= page_of(data + bytes - 1); ++page) ++users_[page];
    used_ += bytes + kRedZone;
    ++weights_;
    unpoison(data, bytes);
    return data;
  }

  void give_back(char* data, size_t bytes) {
    poison(data, bytes);
    for (size_t page = page_of(data); page <= page_of(data + bytes - 1); ++page) {
      if (--users_[page] == 0) madvise(begin_ + page * kHugePage, kHugePage, MADV_DONTNEED);
    }
    --weights_;
  }

 private:
  size_t page_of(const char* data) const { return (data - begin_) / kHugePage; }

  size_t bytes_;
  char* begin_;
  std::vector<uint32_t> users_;  // weights in every page
  size_t used_ = 0;
  size_t weights_ = 0;
};

std::mutex guard;

// Never destroyed: tensors are released until the process ends.
std::vector<Segment>& segments() {
  static auto* all = new std::vector<Segment>;
  return *all;
}

// Where the system does not let so many addresses be mapped, as many as are needed.
Segment new_segment(size_t bytes) {
  const size_t needed = round_up(bytes + kRedZone, kHugePage);
  if (needed < kSegment) {
    try {
      return Segment(kSegment);
    } catch (const std::bad_alloc&) {
    }
  }
  return Segment(needed);
}

}  // namespace

void* allocate_weight(size_t bytes) {
  const size_t size = round_up(bytes, kAlignment);
  const std::lock_guard<std::mutex> lock(guard);
  std::vector<Segment>& all = segments();
  auto found = std::find_if(all.begin(), all.end(), [&](auto& s) { return s.has_room(size); });
  if (found == all.end()) found = all.insert(found, new_segment(size));
  return found->take(size);
}

void release_weight(void* data, size_t bytes) {
  if (data == nullptr) return;
  auto* begin = static_cast<char*>(data);
  const std::lock_guard<std::mutex> lock(guard);
  std::vector<Segment>& all = segments();
  const auto found = std::find_if(all.begin(), all.end(), [&](auto& s) { return s.holds(begin); });
  found->give_back(begin, round_up(bytes, kAlignment));
  if (!found->empty()) return;
  found->unmap();
  all.erase(found);
}

}  // namespace permllm::cpu
