// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

namespace lors::sim {

namespace {
constexpr int64_t kArena = int64_t{96} << 30;  // addresses, not memory
constexpr int64_t kRedZone = 4096;
constexpr int64_t kPoisonByte = 0xff;  // every float format reads it as NaN

void* reserve(int64_t bytes, int protection) {
  void* p = mmap(nullptr, static_cast<size_t>(bytes), protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}
}  // namespace

Window::Window(int64_t bytes)
    : bytes_(bytes),
      seen_(static_cast<uint8_t*>(reserve(bytes, PROT_NONE))),
      bytes_begin_(static_cast<uint8_t*>(reserve(bytes, PROT_READ | PROT_WRITE))) {}

Window::~Window() {
  munmap(seen_, static_cast<size_t>(bytes_));
  munmap(bytes_begin_, static_cast<size_t>(bytes_));
}

Memory::Memory() : window_(kArena) {}

int Memory::allocate(const std::string& name, int64_t bytes, int misalign, bool poison) {
  if (bytes < 0 || misalign < 0 || misalign >= 256) throw std::invalid_argument("bytes >= 0 and 0 <= misalign < 256, please");
  // Never a multiple of 512: CUDA promises 256.
  const int64_t begin = (used_ + kRedZone + 511) / 512 * 512 + 256 + misalign;
  if (begin + bytes + kRedZone > kArena) throw std::runtime_error("the simulated device is out of memory");
  used_ = begin + bytes + kRedZone;
  Buffer buffer;
  buffer.name = name;
  buffer.address = window_.begin() + static_cast<uint64_t>(begin);
  buffer.bytes = bytes;
  if (poison) std::memset(backing(buffer.address), kPoisonByte, static_cast<size_t>(bytes));
  buffers_.push_back(std::move(buffer));
  return static_cast<int>(buffers_.size()) - 1;
}

// The address is never reused, so that a later access is recognised as a use after release.
void Memory::release(int index) {
  Buffer& buffer = buffers_[static_cast<size_t>(index)];
  buffer.released = true;
  if (buffer.bytes > 0) std::memset(backing(buffer.address), kPoisonByte, static_cast<size_t>(buffer.bytes));
}

int Memory::find(uint64_t address, int64_t bytes, std::string* problem) const {
  auto inside = [&](const Buffer& b) {
    return !b.released && address >= b.address &&
           address + static_cast<uint64_t>(bytes) <= b.address + static_cast<uint64_t>(b.bytes);
  };
  if (static_cast<size_t>(last_found_) < buffers_.size() && inside(buffers_[static_cast<size_t>(last_found_)]))
    return last_found_;
  const auto next =
      std::upper_bound(buffers_.begin(), buffers_.end(), address, [](uint64_t a, const Buffer& b) { return a < b.address; });
  if (next != buffers_.begin() && inside(next[-1])) return last_found_ = static_cast<int>(next - buffers_.begin()) - 1;

  if (!contains(address)) {
    *problem = "the address is not device memory";
    return -1;
  }
  const Buffer* nearest = nullptr;
  if (next != buffers_.begin()) nearest = &next[-1];
  const bool nearer_to_next =
      next != buffers_.end() && (nearest == nullptr || next->address - address < static_cast<uint64_t>(kRedZone) / 2);
  if (nearer_to_next) nearest = &*next;
  if (nearest == nullptr) {
    *problem = "the address is in no buffer";
  } else if (nearest->released) {
    *problem = "'" + nearest->name + "' has been released";
  } else {
    const int64_t offset = static_cast<int64_t>(address - nearest->address);
    *problem = "out of bounds: bytes [" + std::to_string(offset) + ", " + std::to_string(offset + bytes) + ") of '" +
               nearest->name + "', which has " + std::to_string(nearest->bytes);
  }
  return -1;
}

}  // namespace lors::sim
