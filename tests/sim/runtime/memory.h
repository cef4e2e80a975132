// SPDX-License-Identifier: Apache-2.0
// Device memory. Kernels see addresses in a range without pages; the bytes are elsewhere, at the same offset. So a raw access
// faults, whatever instruction the compiler chose for it, and only the runtime can access the bytes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lors::sim {

// A range of addresses that faults, and the pages behind it.
class Window {
 public:
  explicit Window(int64_t bytes);
  ~Window();
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  uint64_t begin() const { return reinterpret_cast<uint64_t>(seen_); }
  bool contains(uint64_t address) const { return address - begin() < static_cast<uint64_t>(bytes_); }
  uint8_t* backing(uint64_t address) const { return bytes_begin_ + (address - begin()); }

 private:
  int64_t bytes_;
  uint8_t* seen_;
  uint8_t* bytes_begin_;
};

struct Buffer {
  std::string name;
  uint64_t address = 0;
  int64_t bytes = 0;
  bool released = false;
};

class Memory {
 public:
  Memory();
  // `misalign` bytes past an address that is a multiple of 256 and of no more. `poison`: filled with NaN patterns; without
  // it a huge buffer costs only the pages that are touched.
  int allocate(const std::string& name, int64_t bytes, int misalign, bool poison);
  void release(int buffer);
  const std::vector<Buffer>& buffers() const { return buffers_; }
  bool contains(uint64_t address) const { return window_.contains(address); }
  uint8_t* backing(uint64_t address) const { return window_.backing(address); }
  // The buffer that holds [address, address + bytes), or -1 and an error message in `problem`.
  int find(uint64_t address, int64_t bytes, std::string* problem) const;

 private:
  Window window_;
  int64_t used_ = 0;
  std::vector<Buffer> buffers_;  // by address
  mutable int last_found_ = 0;
};

}  // namespace lors::sim
