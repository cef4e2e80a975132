// SPDX-License-Identifier: Apache-2.0
#include "cpu_scratch.h"

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>  // TORCH_ERROR_CODE_CHECK
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

namespace lors::binding {
namespace {

// Smaller blocks go back to the C library, which keeps them without giving their pages back.
constexpr int64_t kKept = int64_t{256} << 10;
// From here on a block has huge pages, where the system has them: its first use meets 1/512 of the faults.
constexpr int64_t kHuge = int64_t{4} << 20;

int64_t page_bytes() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

class Block {
 public:
  explicit Block(int64_t bytes) : bytes_(bytes < kKept ? bytes : (bytes + page_bytes() - 1) / page_bytes() * page_bytes()) {
    const int64_t size = kept() ? bytes_ + page_bytes() : bytes_, stride = 1;  // torch aligns to 64 bytes
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &tensor_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor_, &data_));
    if (!kept()) return;
    const auto address = reinterpret_cast<uintptr_t>(data_), page = uintptr_t(page_bytes());
    data_ = reinterpret_cast<void*>((address + page - 1) / page * page);
    advise(MADV_HUGEPAGE);
  }
  ~Block() { aoti_torch_delete_tensor_object(tensor_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  bool kept() const { return bytes_ >= kKept; }
  int64_t bytes() const { return bytes_; }
  void* data() const { return data_; }

  // The system may take idle pages when memory is short. Smaller blocks are left alone: the call works page by page, and with
  // small pages it took milliseconds for a block of tens of MiB.
  void idle() const { advise(MADV_FREE); }

 private:
  // A refusal changes nothing: the block works with any pages.
  void advise(int advice) const {
    if (bytes_ >= kHuge) (void)madvise(data_, size_t(bytes_), advice);
  }

  AtenTensorHandle tensor_ = nullptr;
  void* data_ = nullptr;
  int64_t bytes_;
};

std::mutex guard;
auto& idle_blocks = *new std::vector<std::unique_ptr<Block>>;  // by size; never destroyed, as torch may be gone by then

}  // namespace

void* take_scratch(int64_t bytes, void** handle) {
  std::unique_ptr<Block> block, outgrown;
  if (bytes >= kKept) {
    const std::lock_guard lock(guard);
    auto found = std::find_if(idle_blocks.begin(), idle_blocks.end(), [&](const auto& b) { return b->bytes() >= bytes; });
    if (found != idle_blocks.end()) {
      block = std::move(*found);
      idle_blocks.erase(found);
    } else if (!idle_blocks.empty()) {  // the largest gives way to a larger one
      outgrown = std::move(idle_blocks.back());
      idle_blocks.pop_back();
    }
  }
  outgrown.reset();
  if (!block) {
    try {
      block = std::make_unique<Block>(bytes);
    } catch (const std::runtime_error&) {  // no memory: with that of the idle blocks there may be
      if (release_scratch() == 0) throw;
      block = std::make_unique<Block>(bytes);
    }
  }
  void* const data = block->data();
  *handle = block.release();
  return data;
}

void return_scratch(void* handle) {
  std::unique_ptr<Block> block(static_cast<Block*>(handle));
  if (!block->kept()) return;
  block->idle();
  const std::lock_guard lock(guard);
  const auto place =
      std::find_if(idle_blocks.begin(), idle_blocks.end(), [&](const auto& b) { return b->bytes() > block->bytes(); });
  idle_blocks.insert(place, std::move(block));
}

int64_t release_scratch() {
  std::vector<std::unique_ptr<Block>> released;
  {
    const std::lock_guard lock(guard);
    released.swap(idle_blocks);
  }
  int64_t bytes = 0;
  for (const auto& block : released) bytes += block->bytes();
  return bytes;
}

}  // namespace lors::binding
