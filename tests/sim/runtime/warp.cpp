// SPDX-License-Identifier: Apache-2.0
// Warp collectives: shuffles, votes, ldmatrix, mma. Fragment layouts are those of the PTX ISA.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "cluster.h"
#include "device.h"

namespace lors::sim {

namespace {

Counters& counters() { return Device::current->launches.back().counters; }

template <typename Visit>
void for_lanes(uint32_t mask, Visit visit) {
  for (; mask != 0; mask &= mask - 1) visit(static_cast<uint32_t>(std::countr_zero(mask)));
}

// Orders everything the lanes did before for each of them.
void synchronise(void* const*, uint32_t mask) {
  const Warp& warp = *Block::thread->warp;
  std::array<uint32_t, 32> all{};
  Known known;
  for_lanes(mask, [&](uint32_t lane) {
    for (size_t i = 0; i < 32; ++i) all[i] = std::max(all[i], warp.threads[lane]->seen[i]);
    learn(known, warp.threads[lane]->known);
  });
  for_lanes(mask, [&](uint32_t lane) {
    warp.threads[lane]->seen = all;
    warp.threads[lane]->known = known;
    ++warp.threads[lane]->seen[lane];
  });
  ++counters().warp_syncs;
}

float to_float(uint16_t bits, bool is_bfloat16) {
  if (is_bfloat16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

struct MultiplyOperand {
  float* c;
  const uint32_t *a, *b;
};

int exponent_of(double x) { return static_cast<int>(std::bit_cast<uint64_t>(x) >> 52 & 0x7ff) - 1023; }

// x without what lies below 2^last, towards zero. x is 0 or a normal number.
double truncate(double x, int last) {
  const int dropped = 52 - (exponent_of(x) - last);
  if (dropped <= 0) return x;
  if (dropped > 52) return 0;
  return std::bit_cast<double>(std::bit_cast<uint64_t>(x) & ~uint64_t{0} << dropped);
}

// c + the sum of a[k] b[k] for 16 k, in `cores`' arithmetic: see TensorCores. Infinities and NaNs are plain sums.
double multiply_add(double c, const double* a, const double* b, TensorCores cores) {
  const int products = cores == TensorCores::ampere ? 8 : 16, extra_bits = cores == TensorCores::ampere ? 1 : 2;
  for (int k = 0; k < 16; k += products) {
    double terms[17] = {c}, plain = c, sum = 0;
    for (int i = 0; i < products; ++i) plain += terms[i + 1] = a[k + i] * b[k + i];
    if (cores == TensorCores::rounded || !std::isfinite(plain)) {
      c = plain;
      continue;
    }
    int top = exponent_of(0);
    for (int i = 0; i <= products; ++i) top = std::max(top, exponent_of(terms[i]));
    for (int i = 0; i <= products; ++i) sum += truncate(terms[i], top - 23 - extra_bits);
    c = truncate(sum, std::max(exponent_of(sum), -126) - 23);
  }
  return c;
}

template <bool kBfloat16>
void multiply_fragments(void* const* operands, uint32_t) {
  double A[16][16], B[8][16], C[16][8];  // B by columns
  for (size_t lane = 0; lane < 32; ++lane) {
    const auto& operand = *static_cast<const MultiplyOperand*>(operands[lane]);
    const size_t g = lane / 4, t = lane % 4 * 2;
    for (size_t half = 0; half < 2; ++half) {
      const auto element = [&](uint32_t pair) {
        return static_cast<double>(to_float(static_cast<uint16_t>(pair >> (16 * half)), kBfloat16));
      };
      for (size_t i = 0; i < 4; ++i) A[g + i % 2 * 8][t + i / 2 * 8 + half] = element(operand.a[i]);
      for (size_t i = 0; i < 2; ++i) B[g][t + i * 8 + half] = element(operand.b[i]);
    }
    for (size_t i = 0; i < 4; ++i) C[g + i / 2 * 8][t + i % 2] = static_cast<double>(operand.c[i]);
  }
  for (size_t m = 0; m < 16; ++m)
    for (size_t n = 0; n < 8; ++n) C[m][n] = multiply_add(C[m][n], A[m], B[n], Device::current->options.tensor_cores);
  for (size_t lane = 0; lane < 32; ++lane) {
    float* c = static_cast<const MultiplyOperand*>(operands[lane])->c;
    for (size_t i = 0; i < 4; ++i) c[i] = static_cast<float>(C[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  }
}

struct MatrixOperand {
  uint32_t* r;
  std::array<uint8_t, 16> row;  // the row this lane gave the address of
  uint64_t address;
};

template <bool kTransposed>
void distribute_matrices(void* const* operands, uint32_t) {
  std::array<uint64_t, 32> address;
  uint16_t matrix[4][8][8];
  for (size_t lane = 0; lane < 32; ++lane) {
    const auto& operand = *static_cast<const MatrixOperand*>(operands[lane]);
    std::memcpy(matrix[lane / 8][lane % 8], operand.row.data(), 16);
    address[lane] = operand.address;
  }
  for (size_t lane = 0; lane < 32; ++lane)
    for (size_t i = 0; i < 4; ++i) {
      const size_t g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = kTransposed ? matrix[i][t][g] : matrix[i][g][t];
      const uint32_t high = kTransposed ? matrix[i][t + 1][g] : matrix[i][g][t + 1];
      static_cast<const MatrixOperand*>(operands[lane])->r[i] = low | high << 16;
    }
  ++counters().ldmatrix;
  counters().ldmatrix_conflicts += static_cast<uint64_t>(bank_conflicts(address.data(), ~0u, 16));
}

}  // namespace

int lane() { return Block::thread->lane; }

void block_barrier(Site site) { Block::current->barrier(site); }

void collective(const char* name, uint32_t mask, void* operand, CollectiveBody body, Site site) {
  // Without a body it is __syncwarp: the one collective that also orders memory.
  Block::current->meet(name, mask, operand, body == nullptr ? synchronise : body, site);
}

// Both are instructions of whole warps.
void cluster_arrive(Site site) {
  Block& block = *Block::current;
  block.meet("barrier.cluster.arrive", Block::thread->warp->lanes, nullptr, nullptr, site);
  block.cluster.arrive(*Block::thread, site);
}

void cluster_wait(Site site) {
  Block& block = *Block::current;
  block.meet("barrier.cluster.wait", Block::thread->warp->lanes, nullptr, nullptr, site);
  block.cluster.wait(site);
}

void shuffle(void* const* operands, uint32_t mask) {
  for_lanes(mask, [&](uint32_t lane) {
    auto& operand = *static_cast<ShuffleOperand*>(operands[lane]);
    const auto source = static_cast<uint32_t>(operand.source) & 31;
    const bool takes_part = (mask >> source & 1) != 0;
    operand.result = takes_part ? static_cast<const ShuffleOperand*>(operands[source])->value : ~uint64_t{0};
  });
  ++counters().shuffles;
}

void ballot(void* const* operands, uint32_t mask) {
  uint32_t votes = 0;
  for_lanes(mask, [&](uint32_t lane) { votes |= uint32_t{static_cast<VoteOperand*>(operands[lane])->vote} << lane; });
  for_lanes(mask, [&](uint32_t lane) { static_cast<VoteOperand*>(operands[lane])->ballot = votes; });
  ++counters().votes;
}

void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bfloat16, Site site) {
  MultiplyOperand operand{c, a, b};
  Block::current->meet("mma", ~0u, &operand, is_bfloat16 ? multiply_fragments<true> : multiply_fragments<false>, site);
  if (lane() == 0) ++counters().mma;
}

// Each lane reads the row whose address it gave, so that errors name that lane; then the rows are distributed.
void load_matrices(uint32_t (&r)[4], uint32_t row, bool transposed, Site site) {
  MatrixOperand operand{r, {}, row};
  read_shared_row(operand.row.data(), row, site);
  Block::current->meet(transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, &operand,
                       transposed ? distribute_matrices<true> : distribute_matrices<false>, site);
}

}  // namespace lors::sim
