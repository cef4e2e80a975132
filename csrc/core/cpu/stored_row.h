// SPDX-License-Identifier: Apache-2.0
// A row of a stored weight as the matmul of a few tokens without an adapter (stored_dot_kernel.h) and the expansion to dense
// (merge_kernel.h) read it: one unit of kUnit columns after the other. A Row offers
//   Row(job, n)            row n of the weight
//   begin(u)               before unit u and the others of its chunk of kChunk units
//   readable()             whether `unit` may read the units of a chunk in whole vectors
//   unit(u)                unit u, whole
//   part(u, columns)       its first columns, one by one: where the row ends, or where it is not readable
// Units are read once each, in ascending order. But for Sparse24Slots a unit has a number for each column, +0 where nothing is
// kept.
#pragma once

#include "expand.h"
#include "kernels.h"

#if defined(__AVX2__)
namespace {

constexpr int kExpanded = 32;  // columns of a unit that has a number for each
constexpr int kChunk = 16;     // units

// Called for every page of values. The hardware prefetcher stops at the end of a page and starts slowly on the next one, and it
// takes little notice of the thin stream that says where the values belong.
constexpr int64_t kPage = 4096;
inline void fetch_ahead(const void* values, const void* places) {
  const char *next_page = static_cast<const char*>(values) + kPage, *next_places = static_cast<const char*>(places) + kPage / 4;
  for (int line = 0; line < 4; ++line) _mm_prefetch(next_page + 64 * line, _MM_HINT_T0);
  for (int line = 0; line < 8; ++line) _mm_prefetch(next_places + 64 * line, _MM_HINT_T0);
}

#if defined(__AVX512VBMI2__)
// 32 elements of 16 bits.
struct Words {
  __m512i all;
};
inline Words load_words(const void* p) { return {_mm512_loadu_si512(p)}; }
// Zeros without a sign, as an addition would leave them.
inline void store_words(void* p, Words words) {
  const __mmask32 nonzero = _mm512_test_epi16_mask(words.all, _mm512_set1_epi16(0x7fff));
  _mm512_storeu_si512(p, _mm512_maskz_mov_epi16(nonzero, words.all));
}
inline Words where_words(uint32_t bits, Words words) { return {_mm512_maskz_mov_epi16(bits, words.all)}; }
#else
struct Words {
  __m256i half[2];
};
inline Words load_words(const void* p) {
  const auto* from = static_cast<const __m256i*>(p);
  return {{_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)}};
}
// Zeros without a sign, as an addition would leave them.
inline void store_words(void* p, Words words) {
  for (int i = 0; i < 2; ++i) {
    const __m256i is_zero = _mm256_cmpeq_epi16(_mm256_slli_epi16(words.half[i], 1), _mm256_setzero_si256());
    _mm256_storeu_si256(static_cast<__m256i*>(p) + i, _mm256_andnot_si256(is_zero, words.half[i]));
  }
}
inline Words where_words(uint32_t bits, Words words) {
  const __m256i lane = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  for (int i = 0; i < 2; ++i) {
    const __m256i set = _mm256_and_si256(_mm256_set1_epi16(short(bits >> (16 * i))), lane);
    words.half[i] = _mm256_and_si256(words.half[i], _mm256_cmpeq_epi16(set, lane));
  }
  return words;
}

// vpshufb controls that move packed 16-bit elements to the eight columns of a byte: by the bits of a mask, and by 2:4 metadata,
// whose first four elements are the first group's.
struct WordControls {
  alignas(64) uint8_t of_bits[256][16] = {}, of_codes[256][16] = {};
  constexpr WordControls() {
    for (unsigned byte = 0; byte < 256; ++byte) {
      fill(of_bits[byte], byte);
      fill(of_codes[byte], kSparse24Codes.placed_of_byte[byte]);
    }
  }
  static constexpr void fill(uint8_t* control, unsigned bits) {
    unsigned slot = 0;
    for (unsigned column = 0; column < 8; ++column) {
      const bool kept = bits >> column & 1;
      control[2 * column] = kept ? uint8_t(2 * slot) : 0x80;  // 0x80 gives 0
      control[2 * column + 1] = kept ? uint8_t(2 * slot + 1) : 0x80;
      slot += kept;
    }
  }
};
constexpr WordControls kWordControls;

inline __m128i word_control(const uint8_t* control) { return _mm_load_si128(reinterpret_cast<const __m128i*>(control)); }
#endif

// 32 columns as float32.
struct Floats {
  static constexpr int kVectors = kExpanded / kLanes<float>;
  Vector<float> vector[kVectors];
};

// What a unit of W is.
template <typename W>
struct UnitOf {
  using type = Words;
};
template <>
struct UnitOf<float> {
  using type = Floats;
};
template <typename W>
using Unit = typename UnitOf<W>::type;

template <typename W>
inline Unit<W> load_unit(const W* p) {
  if constexpr (std::is_same_v<W, float>) {
    Floats out;
#pragma GCC unroll 4
    for (int i = 0; i < Floats::kVectors; ++i) out.vector[i] = load<float>(p + i * kLanes<float>);
    return out;
  } else {
    return load_words(p);
  }
}

constexpr uint32_t vector_bits(uint32_t bits, int i) { return bits >> (i * kLanes<float>)&((1u << kLanes<float>)-1); }

template <typename W>
struct DenseRow {
  static constexpr int kUnit = kExpanded;
  const W* weight;
  const uint32_t* mask;  // null: all is kept

  DenseRow(const lors::cpu::MergeJob& job, int64_t n)
      : weight(static_cast<const W*>(job.weight) + n * job.in_features),
        mask(job.mask ? job.mask + n * lors::mask_words(job.in_features) : nullptr) {}
  void begin(int64_t) {}
  bool readable() const { return true; }
  Unit<W> unit(int64_t u) const {
    Unit<W> out = load_unit(weight + u * kUnit);
    if (!mask) return out;
    if constexpr (std::is_same_v<W, float>) {
#pragma GCC unroll 4
      for (int i = 0; i < Floats::kVectors; ++i) out.vector[i] = where_bits<float>(vector_bits(mask[u], i), out.vector[i]);
      return out;
    } else {
      return where_words(mask[u], out);
    }
  }
  Unit<W> part(int64_t u, int64_t columns) const {
    W out[kUnit] = {};
    for (int64_t j = 0; j < columns; ++j)
      if (!mask || mask[u] >> j & 1) out[j] = weight[u * kUnit + j];
    return load_unit(out);
  }
};

#if defined(__AVX512F__)
struct PlacedOfCode {
  alignas(16) uint8_t placed[16] = {};
  constexpr PlacedOfCode() {
    for (int code = 0; code < 16; ++code) placed[code] = kSparse24Codes.of_code[code].placed;
  }
};
constexpr PlacedOfCode kPlacedOfCode;
#endif

template <typename W>
struct Sparse24Row {
  static constexpr int kUnit = kExpanded;
  const W* slots;
  const uint8_t* metadata;
  int64_t bytes;
#if defined(__AVX512F__)
  alignas(64) uint32_t placed[kChunk];  // the two columns of each group that the slots belong to; fillers are +0
#endif

  Sparse24Row(const lors::cpu::MergeJob& job, int64_t n)
      : slots(static_cast<const W*>(job.weight) + n * (job.in_features / 2)),
        metadata(job.metadata + n * lors::sparse24_metadata_bytes(job.in_features)),
        bytes(lors::sparse24_metadata_bytes(job.in_features)) {}
  void begin(int64_t u) {
    if (u * kUnit / 2 * int64_t(sizeof(W)) % kPage == 0) fetch_ahead(slots + u * (kUnit / 2), metadata + u * (kUnit / 8));
#if defined(__AVX512F__)
    const int64_t first = u * (kUnit / 8), left = bytes - first;
    const __mmask64 inside = left < 64 ? (__mmask64(1) << left) - 1 : ~__mmask64(0);
    const auto* placed_of_code = reinterpret_cast<const __m128i*>(kPlacedOfCode.placed);
    const __m512i table = _mm512_maskz_broadcast_i32x4(0xffff, _mm_load_si128(placed_of_code));
    const __m512i codes = _mm512_maskz_loadu_epi8(inside, metadata + first), nibble = _mm512_set1_epi8(15);
    const __m512i even = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, nibble));
    const __m512i odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
    _mm512_store_si512(placed, _mm512_or_si512(even, _mm512_slli_epi16(odd, 4)));
#endif
  }
  bool readable() const { return true; }
  Unit<W> unit(int64_t u) const {
    const W* p = slots + u * (kUnit / 2);
    if constexpr (std::is_same_v<W, float>) {
      Floats out;
#pragma GCC unroll 4
      for (int i = 0; i < Floats::kVectors; ++i) {
#if defined(__AVX512F__)
        out.vector[i] = expand(load_half(p + i * kLanes<float> / 2), vector_bits(placed[u % kChunk], i));
#else
        const uint32_t bits = kSparse24Codes.placed_of_byte[metadata[u * (kUnit / 8) + i]];
        out.vector[i] = where_bits<float>(bits, expand(load_half(p + i * kLanes<float> / 2), bits));
#endif
      }
      return out;
    } else {
#if defined(__AVX512VBMI2__)
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      return {expand_words(_mm512_castsi256_si512(packed), placed[u % kChunk])};
#else
      Words out;
      const uint8_t* codes = metadata + u * (kUnit / 8);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i));
        const __m256i control =
            _mm256_inserti128_si256(_mm256_castsi128_si256(word_control(kWordControls.of_codes[codes[2 * i]])),
                                    word_control(kWordControls.of_codes[codes[2 * i + 1]]), 1);
        // Each half has its four elements twice: a control reads the first of them.
        out.half[i] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(_mm256_castsi128_si256(packed), 0x50), control);
      }
      return out;
#endif
    }
  }
  Unit<W> part(int64_t u, int64_t columns) const {
    W out[kUnit] = {};
    for (int64_t j = 0; j < columns; j += 4) {
      const int64_t group = u * (kUnit / 4) + j / 4;
      const Sparse24Code& code = kSparse24Codes.of_code[metadata[group / 2] >> (group % 2 * 4) & 15];
      for (int s = 0; s < 2; ++s) out[j + code.slot[s]] = slots[2 * group + s];
    }
    return load_unit(out);
  }
};

#if defined(__AVX512VBMI2__)
// 32 slots of bfloat16 as they are stored, and which of the unit's 64 columns each belongs to.
struct Slots {
  __m512i values, columns;
};
// By slot: the bit of a unit's codes at which its position starts, and the first column of its group.
struct BitsAndGroups {
  alignas(64) uint8_t bit[64] = {};
  alignas(64) uint16_t group[32] = {};
  constexpr BitsAndGroups() {
    for (int i = 0; i < 32; ++i) {
      bit[2 * i] = uint8_t(2 * i);
      group[i] = uint16_t(i / 2 * 4);
    }
  }
};
constexpr BitsAndGroups kOfSlot;

struct Sparse24Slots {
  static constexpr int kUnit = 64;
  const bfloat16* slots;
  const uint8_t* metadata;
  int64_t bytes;

  Sparse24Slots(const lors::cpu::MergeJob& job, int64_t n)
      : slots(static_cast<const bfloat16*>(job.weight) + n * (job.in_features / 2)),
        metadata(job.metadata + n * lors::sparse24_metadata_bytes(job.in_features)),
        bytes(lors::sparse24_metadata_bytes(job.in_features)) {}
  void begin(int64_t u) const {
    if (u * kUnit / 2 * int64_t(sizeof(bfloat16)) % kPage == 0)
      fetch_ahead(slots + u * (kUnit / 2), metadata + u * (kUnit / 8));
  }
  bool readable() const { return true; }
  Slots unit(int64_t u) const {
    uint64_t codes;
    std::memcpy(&codes, metadata + u * (kUnit / 8), 8);
    return {_mm512_loadu_si512(slots + u * (kUnit / 2)), columns_of(codes)};
  }
  Slots part(int64_t u, int64_t columns) const {
    const int64_t first = u * (kUnit / 8);
    uint64_t codes = 0;
    std::memcpy(&codes, metadata + first, size_t(bytes - first));
    const __mmask32 inside = (1u << (columns / 2)) - 1;
    return {_mm512_maskz_loadu_epi16(inside, slots + u * (kUnit / 2)), columns_of(codes)};
  }

 private:
  // For each slot, in sixteen bits: the first column of its group + the position in two bits of the codes.
  static __m512i columns_of(uint64_t codes) {
    const __m512i repeated = _mm512_set1_epi64(int64_t(codes));
    const __m512i position = _mm512_maskz_multishift_epi64_epi8(~__mmask64(0), _mm512_load_si512(kOfSlot.bit), repeated);
    constexpr int kAndOr = 0xea;  // (a & b) | c
    return _mm512_ternarylogic_epi32(position, _mm512_set1_epi16(3), _mm512_load_si512(kOfSlot.group), kAndOr);
  }
};
#endif

template <typename W>
struct BitmapRow {
  static constexpr int kUnit = kExpanded;
  const W *values, *end;  // the next unit's first; beyond those of all rows
  const uint32_t* mask;

  BitmapRow(const lors::cpu::MergeJob& job, int64_t n)
      : values(static_cast<const W*>(job.weight) + job.cursors[n]),
        end(static_cast<const W*>(job.weight) + job.value_count),
        mask(job.mask + n * lors::mask_words(job.in_features)) {}
  void begin(int64_t u) const {
    if (u * kUnit / 2 * int64_t(sizeof(W)) % kPage == 0) fetch_ahead(values, mask + u);  // as if half were kept
  }
  bool readable() const { return end - values >= kChunk * kUnit; }
  Unit<W> unit(int64_t u) {
    const uint32_t bits = mask[u];
    if constexpr (std::is_same_v<W, float>) {
      Floats out;
#pragma GCC unroll 4
      for (int i = 0; i < Floats::kVectors; ++i) {
        const uint32_t kept = vector_bits(bits, i);
        out.vector[i] = where_bits<float>(kept, load_bitmap<float>(values, kept));
      }
      return out;
    } else {
#if defined(__AVX512VBMI2__)
      const Words out = {expand_words(_mm512_loadu_si512(values), bits)};
      values += __builtin_popcount(bits);
      return out;
#else
      __m128i part[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint32_t byte = bits >> (8 * i) & 255;
        part[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)),
                                   word_control(kWordControls.of_bits[byte]));
        values += __builtin_popcount(byte);
      }
      return {{_mm256_set_m128i(part[1], part[0]), _mm256_set_m128i(part[3], part[2])}};
#endif
    }
  }
  Unit<W> part(int64_t u, int64_t columns) {
    W out[kUnit] = {};
    for (int64_t j = 0; j < columns; ++j)
      if (mask[u] >> j & 1) out[j] = *values++;
    return load_unit(out);
  }
};

}  // namespace
#endif
