// SPDX-License-Identifier: Apache-2.0
// The properties behind layouts.h: decompress, mask, merge and recompress agree with each other on whatever validate accepts.
#include "layouts.h"

#include <lors/bitmap.h>
#include <lors/mask.h>
#include <lors/sparse24.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "merge.h"

namespace lors::cpu {
extern const KernelTable table_baseline;
#if defined(__x86_64__)
extern const KernelTable table_avx2;
extern const KernelTable table_avx512;
#endif
}  // namespace lors::cpu

namespace lors::fuzz {
namespace {

void require(bool holds, const char* sentence) {
  if (holds) return;
  std::fprintf(stderr, "fuzz: %s\n", sentence);
  std::abort();
}
void require(const Status& status) { require(status.ok(), status.message().c_str()); }

// Hands out the input from the front; zeros once it is used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  void take(void* to, size_t bytes) {
    const size_t some = std::min(bytes, size_);
    if (some) std::memcpy(to, data_, some);
    if (bytes > some) std::memset(static_cast<uint8_t*>(to) + some, 0, bytes - some);
    data_ += some;
    size_ -= some;
  }
  template <typename T>
  T take() {
    T out;
    take(&out, sizeof(T));
    return out;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

// `count` elements on the heap and not one byte more.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count), data_(std::make_unique<T[]>(size_t(count))) {}
  Buffer(int64_t count, Input& input) : Buffer(count) { input.take(data(), bytes()); }
  T* data() const { return data_.get(); }
  size_t bytes() const { return size_t(count_) * sizeof(T); }
  bool operator==(const Buffer& other) const {
    return count_ == other.count_ && (count_ == 0 || std::memcmp(data(), other.data(), bytes()) == 0);
  }

 private:
  int64_t count_;
  std::unique_ptr<T[]> data_;
};

// The first bytes of every input.
struct Header {
  uint8_t layout = 0, dtype = 0, out_features = 0, in_features = 0, r = 0, table = 0;

  int64_t N() const { return out_features % 10; }
  int64_t K() const { return layout % 2 ? in_features : 4 * int64_t(in_features); }  // a 2:4 row has whole groups
  DType type() const { return DType(dtype % 4); }
};

const cpu::KernelTable& table_of(const Header& header) {
#if defined(__x86_64__)
  if (header.table % 3 == 1 && __builtin_cpu_supports("avx2")) return cpu::table_avx2;
  if (header.table % 3 == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
    return cpu::table_avx512;
#endif
  return cpu::table_baseline;
}

struct Case {
  Case(const Header& header, Input& input)
      : N(header.N()),
        K(header.K()),
        r(1 + header.r % 3),
        size(dtype_size(header.type())),
        dtype(header.type()),
        table(table_of(header)),
        lora_A(r * K),
        lora_B(N * r) {
    const uint8_t seed = input.take<uint8_t>();
    for (int64_t i = 0; i < r * K; ++i) lora_A.data()[i] = float((i * 7 + seed) % 13 - 6);
    for (int64_t i = 0; i < N * r; ++i) lora_B.data()[i] = float((i * 5 + seed) % 11 - 5) / 8;
  }

  MergeArgs merge_args(Layout layout, const void* weight, const uint32_t* mask, void* merged) const {
    MergeArgs out;
    out.out_features = N;
    out.in_features = K;
    out.r = r;
    out.lora_A = lora_A.data();
    out.lora_B = lora_B.data();
    out.weight_layout = layout;
    out.weight = weight;
    out.weight_dtype = out.merged_dtype = out.round_to = dtype;
    out.mask = mask;
    out.merged = merged;
    return out;
  }

  int64_t N, K, r, size;
  DType dtype;
  const cpu::KernelTable& table;
  Buffer<float> lora_A, lora_B;
};

// -0.0 is what validate accepts in a kept slot and compress never stores.
void drop_signs_of_zeros(const Case& c, Buffer<uint8_t>& values) {
  for (size_t at = 0; at < values.bytes(); at += size_t(c.size)) {
    uint8_t* element = values.data() + at;
    const bool is_zero =
        std::all_of(element, element + c.size - 1, [](uint8_t byte) { return byte == 0; }) && (element[c.size - 1] & 0x7f) == 0;
    if (is_zero) element[c.size - 1] = 0;
  }
}

bool run_sparse24(const Case& c, Input& input) {
  const int64_t N = c.N, K = c.K, bytes = N * sparse24_metadata_bytes(K);
  Buffer<uint8_t> metadata(bytes, input), values(N * K / 2 * c.size, input);
  int64_t report[2];
  require(sparse24_validate({N, K, values.data(), c.dtype, metadata.data(), report}, nullptr));
  require((report[0] == 0) == (report[1] == INT64_MAX) && report[0] >= 0 && report[0] <= bytes, "a report contradicts itself");
  require(report[0] == 0 || (report[1] >= 0 && report[1] < bytes), "the first offender is not in the metadata");
  if (report[0]) return false;

  Buffer<uint8_t> dense(N * K * c.size), again(N * K / 2 * c.size), metadata_again(bytes);
  Buffer<uint32_t> mask(N * mask_words(K));
  require(sparse24_decompress({N, K, values.data(), c.dtype, metadata.data(), dense.data()}, nullptr));
  require(sparse24_mask({N, K, metadata.data(), mask.data()}, nullptr));
  Sparse24Report inspected;
  require(sparse24_inspect({N, K, dense.data(), c.dtype, mask.data(), &inspected}, nullptr));
  require(inspected.offending_groups == 0, "a valid weight has an offending group");

  Buffer<uint8_t> merged(N * K * c.size), merged_dense(N * K * c.size), slots(N * K / 2 * c.size),
      slots_want(N * K / 2 * c.size);
  MergeArgs merge = c.merge_args(Layout::sparse24, values.data(), nullptr, merged.data());
  merge.metadata = metadata.data();
  require(merge_with(c.table, merge, nullptr));
  require(merge_with(c.table, c.merge_args(Layout::dense, dense.data(), mask.data(), merged_dense.data()), nullptr));
  require(merged == merged_dense, "the merge from 2:4 differs from the dense merge");
  std::copy(values.data(), values.data() + values.bytes(), slots.data());
  merge.weight = merge.merged = slots.data();
  merge.merged_layout = Layout::sparse24;
  require(merge_with(c.table, merge, nullptr));
  require(sparse24_compress({N, K, merged_dense.data(), c.dtype, mask.data(), slots_want.data(), nullptr}, nullptr));
  require(slots == slots_want, "the merge in place differs from the compressed dense merge");

  require(sparse24_compress({N, K, dense.data(), c.dtype, mask.data(), again.data(), metadata_again.data()}, nullptr));
  drop_signs_of_zeros(c, values);
  require(metadata == metadata_again && values == again, "2:4 does not survive the round trip");
  return true;
}

bool run_bitmap(const Case& c, Input& input) {
  const int64_t N = c.N, K = c.K, words = mask_words(K), count = input.take<int64_t>();
  Buffer<int64_t> offsets(N + 1, input), offsets_again(N + 1);
  Buffer<uint32_t> bits(N * words, input), nonzero(N * words);
  int64_t report[2];
  require(bitmap_validate({N, K, count, bits.data(), offsets.data(), report}, nullptr));
  require((report[0] == 0) == (report[1] == INT64_MAX) && report[0] >= 0 && report[0] <= std::max<int64_t>(N, 1),
          "a report contradicts itself");
  if (report[0]) return false;
  require(count >= 0 && count <= N * K, "a valid count is beyond the weight");

  Buffer<uint8_t> values(count * c.size, input), dense(N * K * c.size), again(count * c.size), dense_again(N * K * c.size);
  require(bitmap_offsets({N, K, bits.data(), offsets_again.data()}, nullptr));
  require(offsets == offsets_again, "valid offsets are not those of the bits");
  require(bitmap_decompress({N, K, values.data(), c.dtype, bits.data(), offsets.data(), dense.data()}, nullptr));
  require(mask_nonzero({N, K, dense.data(), c.dtype, nonzero.data()}, nullptr));
  for (int64_t i = 0; i < N * words; ++i)
    require((nonzero.data()[i] & ~bits.data()[i]) == 0, "a weight off the mask is not zero");

  Buffer<uint8_t> merged(N * K * c.size), merged_dense(N * K * c.size);
  MergeArgs merge = c.merge_args(Layout::bitmap, values.data(), bits.data(), merged.data());
  merge.row_offsets = offsets.data();
  require(merge_with(c.table, merge, nullptr));
  require(merge_with(c.table, c.merge_args(Layout::dense, dense.data(), bits.data(), merged_dense.data()), nullptr));
  require(merged == merged_dense, "the merge from a bitmap differs from the dense merge");

  require(bitmap_compress({N, K, dense.data(), c.dtype, bits.data(), offsets.data(), again.data()}, nullptr));
  drop_signs_of_zeros(c, values);
  require(values == again, "a bitmap does not survive the round trip");
  return true;
}

}  // namespace

bool run_one(const uint8_t* data, size_t size) {
  Input input(data, size);
  const auto header = input.take<Header>();
  const Case c(header, input);
  return header.layout % 2 ? run_bitmap(c, input) : run_sparse24(c, input);
}

std::vector<uint8_t> valid_input(uint32_t (*draw)(void* context), void* context) {
  const auto below = [&](uint32_t bound) { return draw(context) % bound; };
  std::vector<uint8_t> out;
  const auto put = [&](const void* from, size_t bytes) {
    const auto* begin = static_cast<const uint8_t*>(from);
    out.insert(out.end(), begin, begin + bytes);
  };
  Header header;
  uint8_t* const fields = reinterpret_cast<uint8_t*>(&header);
  for (size_t i = 0; i < sizeof(header); ++i) fields[i] = uint8_t(below(256));
  put(&header, sizeof(header));
  out.push_back(uint8_t(below(256)));
  const int64_t N = header.N(), K = header.K(), size = dtype_size(header.type());
  if (header.layout % 2 == 0) {
    std::vector<uint8_t> values;
    const uint8_t two[] = {0x4, 0x8, 0xc, 0x9, 0xd, 0xe}, one[] = {0x0, 0x5, 0xa, 0xf};
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; k += 4) {
        const uint32_t kept = below(3), code = kept == 2 ? two[below(6)] : kept == 1 ? one[below(4)] : 1;
        if (k % 8) {
          out.back() = uint8_t(out.back() | code << 4);
        } else {
          out.push_back(uint8_t(code));
        }
        for (uint32_t s = 0; s < 2; ++s)
          for (int64_t i = 0; i < size; ++i)
            values.push_back(uint8_t(kept == 2 || (kept == 1 && s == (code == 0xf)) ? below(256) : 0));
      }
    put(values.data(), values.size());
    return out;
  }
  std::vector<int64_t> offsets = {0};
  std::vector<uint32_t> bits;
  const uint32_t density = below(4);
  for (int64_t n = 0; n < N; ++n) {
    offsets.push_back(offsets.back());
    for (int64_t k = 0; k < K; k += 32) {
      uint32_t word = density == 0 ? 0 : density == 1 ? draw(context) & draw(context) : density == 2 ? draw(context) : ~0u;
      if (K - k < 32) word &= (1u << (K - k)) - 1;
      bits.push_back(word);
      offsets.back() += std::popcount(word);
    }
  }
  put(&offsets.back(), sizeof(int64_t));
  put(offsets.data(), offsets.size() * sizeof(int64_t));
  put(bits.data(), bits.size() * sizeof(uint32_t));
  for (int64_t i = 0; i < offsets.back() * size; ++i) out.push_back(uint8_t(below(256)));
  return out;
}

}  // namespace lors::fuzz
