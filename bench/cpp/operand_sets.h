// SPDX-License-Identifier: Apache-2.0
// The operands of calls.h on a device: filled, poisoned, and so many sets of them that no cache holds all; and the rate of a
// copy, to compare with. Without a benchmark library.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "calls.h"

namespace lors::bench {

constexpr double kBatchSeconds = 0.005;
constexpr int kWarmups = 3;
constexpr int64_t kMostBytes = int64_t{8} << 30;  // of all operand sets of one call together

// A device offers: Host, host(), allocate(bytes), release(pointer), upload(to, from, bytes), download(to, from, bytes),
// copy(to, from, bytes) as a device copy, seconds(function) for what the function queues, and cache_bytes().

inline uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// What an operand holds before its first call, as the `period` elements that repeat through it: drawing hundreds of millions
// of random values would take longer than measuring with them. `stream` tells the operands of a call apart.
constexpr int64_t kPeriod = 1048583;  // a prime: no row, tile or power of two lines up with it

inline std::vector<unsigned char> pattern_of_layout(const Operand& operand, size_t stream) {
  std::mt19937_64 engine(stream);
  const size_t count = std::min(operand.count, kPeriod), size = operand.element_size();
  std::vector<unsigned char> bytes(count * size);
  for (size_t i = 0; i < count; ++i) {
    constexpr unsigned char pairs[] = {0x4, 0x8, 0xc, 0x9, 0xd, 0xe};  // the six codes with two kept
    uint64_t element = pairs[engine() % 6] | pairs[engine() % 6] << 4;
    if (operand.fill == Fill::offsets) element = i * operand.step;
    if (operand.fill == Fill::half_bits)
      for (element = 0; std::popcount(element) < 16;) element |= uint64_t{1} << engine() % 32;
    std::memcpy(&bytes[i * size], &element, size);
  }
  return bytes;
}

inline std::vector<unsigned char> pattern_of(const Operand& operand, size_t stream) {
  if (operand.fill == Fill::codes || operand.fill == Fill::half_bits || operand.fill == Fill::offsets)
    return pattern_of_layout(operand, stream);
  static const auto random = [] {
    std::mt19937 engine(1);
    std::normal_distribution<float> normal;
    std::pair<std::vector<float>, std::vector<unsigned char>> out{std::vector<float>(kPeriod),
                                                                  std::vector<unsigned char>(kPeriod)};
    for (float& value : out.first) value = normal(engine);
    for (unsigned char& bit : out.second) bit = engine() >> 31;
    return out;
  }();
  const auto& [values, mask] = random;
  const size_t count = std::min(operand.count, kPeriod), size = operand.element_size();
  std::vector<unsigned char> bytes(count * size, operand.fill == Fill::sum ? 0 : 0xff);
  for (size_t i = 0; i < count; ++i) {
    const size_t at = (i + stream * 131071) % kPeriod;
    const float value = operand.fill == Fill::sparse && !mask[at] ? 0.0f : values[at];
    if (operand.fill != Fill::normal && operand.fill != Fill::sparse) {
      break;
    } else if (operand.dtype == DType::bfloat16) {
      const uint16_t bits = bfloat16_bits(value);
      std::memcpy(&bytes[i * size], &bits, 2);
    } else {
      std::memcpy(&bytes[i * size], &value, 4);
    }
  }
  return bytes;
}

template <typename Device>
void fill(Device& device, void* to, const Operand& operand, size_t stream) {
  const std::vector<unsigned char> pattern = pattern_of(operand, stream);
  const int64_t period = static_cast<int64_t>(pattern.size());
  device.upload(to, pattern.data(), period);
  for (int64_t at = period; at < operand.bytes(); at += period)
    device.copy(static_cast<char*>(to) + at, to, std::min(period, operand.bytes() - at));
}

// How many values of a poisoned float32 or bfloat16 output are NaN.
inline int64_t count_nan(const std::vector<unsigned char>& bytes, DType dtype) {
  int64_t found = 0;
  const size_t size = dtype_size(dtype);
  for (size_t i = 0; i < bytes.size(); i += size) {
    uint32_t bits = 0;
    std::memcpy(&bits, &bytes[i], size);
    if (size == 2) bits <<= 16;
    found += (bits & 0x7fffffff) > 0x7f800000;
  }
  return found;
}

// Sets of operands, used in rotation: so many that together they are three times the size of the last-level cache, or `most`.
template <typename Device>
class OperandSets {
 public:
  OperandSets(Device& device, const std::vector<Operand>& operands, int64_t most = 1 << 20) : device_(device) {
    int64_t bytes = 0;
    for (const Operand& operand : operands) bytes += operand.bytes();
    const int64_t wanted = (3 * device.cache_bytes() + bytes - 1) / bytes;
    sets_.resize(std::clamp<int64_t>(wanted, 1, std::min(most, std::max<int64_t>(1, kMostBytes / bytes))));
    for (size_t i = 0; i < operands.size(); ++i) {
      for (auto& set : sets_) {
        set.push_back(device.allocate(operands[i].bytes()));
        fill(device, set[i], operands[i], i);
      }
    }
  }
  ~OperandSets() {
    for (const auto& set : sets_)
      for (void* const operand : set) device_.release(operand);
  }
  OperandSets(const OperandSets&) = delete;
  OperandSets& operator=(const OperandSets&) = delete;

  void* const* next() { return sets_[turn_++ % sets_.size()].data(); }
  void* const* first() const { return sets_.front().data(); }
  size_t size() const { return sets_.size(); }

 private:
  Device& device_;
  std::vector<std::vector<void*>> sets_;
  size_t turn_ = 0;
};

// Bytes read plus bytes written per second by a copy that no cache holds; measured once, the median of several batches.
template <typename Device>
double copy_rate(Device& device) {
  static const double rate = [&] {
    const Operand operand{std::max(3 * device.cache_bytes(), int64_t{64} << 20) / 4, DType::float32, Fill::normal, 0};
    void* const from = device.allocate(operand.bytes());
    void* const to = device.allocate(operand.bytes());
    fill(device, from, operand, 0);
    const auto batch = [&](int64_t copies) {
      return device.seconds([&] {
        for (int64_t i = 0; i < copies; ++i) device.copy(to, from, operand.bytes());
      });
    };
    for (int i = 0; i < kWarmups; ++i) batch(1);
    const int64_t copies = static_cast<int64_t>(kBatchSeconds / batch(1)) + 1;
    std::vector<double> seconds;
    for (int i = 0; i < 11; ++i) seconds.push_back(batch(copies) / static_cast<double>(copies));
    device.release(from);
    device.release(to);
    std::nth_element(seconds.begin(), seconds.begin() + 5, seconds.end());
    return 2.0 * static_cast<double>(operand.bytes()) / seconds[5];
  }();
  return rate;
}

// The first call, with every output poisoned: its error, or what it left unwritten.
template <typename Device>
Status poisoned_call(Device& device, const Call<typename Device::Host>& call, void* const* operands) {
  Status status = call.run(operands, device.host());
  for (size_t i = 0; status.ok() && i < call.operands.size(); ++i) {
    if (call.operands[i].fill != Fill::poison) continue;
    std::vector<unsigned char> bytes(call.operands[i].bytes());
    device.download(bytes.data(), operands[i], call.operands[i].bytes());
    if (const int64_t unwritten = count_nan(bytes, call.operands[i].dtype))
      status = Status::error(std::to_string(unwritten) + " values of operand " + std::to_string(i) +
                             " were not written, or are NaN");
  }
  return status;
}

}  // namespace lors::bench
