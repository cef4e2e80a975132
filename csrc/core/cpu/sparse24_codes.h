// SPDX-License-Identifier: Apache-2.0
// The sixteen codes of 2:4 metadata (sparse24.h) and the code of each pattern of kept weights. A pattern has bit j set where
// position j of the group is kept. For any byte, valid or not, the positions in these tables lie inside the group.
#pragma once

#include <cstdint>

// In an anonymous namespace because kernels.cpp, compiled once per instruction set, includes it too.
namespace {

struct Sparse24Code {
  bool valid = false;
  uint8_t kept = 0;          // pattern of the kept weights; none for the five codes that do not occur
  uint8_t placed = 3;        // pattern of the two positions of the slots: the kept ones, and others for the fillers
  uint8_t slot[2] = {0, 1};  // the positions in `placed`, ascending
};

struct Sparse24Codes {
  Sparse24Code of_code[16];
  uint8_t of_pattern[16] = {};     // the code of a pattern; of more than two kept, the first two
  uint8_t kept_of_byte[256] = {};  // two groups at once
  uint8_t placed_of_byte[256] = {};
  constexpr Sparse24Codes() {
    for (unsigned pattern = 0; pattern < 16; ++pattern) {
      unsigned kept = 0, position[2] = {1, 0}, found = 0;
      for (unsigned j = 0; j < 4 && found < 2; ++j)
        if (pattern >> j & 1) {
          position[found++] = j;
          kept |= 1u << j;
        }
      if (found == 1) position[1] = position[0];
      const unsigned code = position[0] | position[1] << 2;
      of_pattern[pattern] = uint8_t(code);
      Sparse24Code& entry = of_code[code];
      entry.valid = true;
      entry.kept = uint8_t(kept);
      // One kept: position 3 goes to slot 1, the others to slot 0, and the filler's position is after or before it.
      const unsigned placed = found == 0 ? 3 : found == 1 ? (kept == 8 ? 9 : kept | 8) : kept;
      entry.placed = uint8_t(placed);
      int s = 0;
      for (unsigned j = 0; j < 4; ++j)
        if (placed >> j & 1) entry.slot[s++] = uint8_t(j);
    }
    for (unsigned byte = 0; byte < 256; ++byte) {
      kept_of_byte[byte] = uint8_t(of_code[byte & 15].kept | of_code[byte >> 4].kept << 4);
      placed_of_byte[byte] = uint8_t(of_code[byte & 15].placed | of_code[byte >> 4].placed << 4);
    }
  }
};
constexpr Sparse24Codes kSparse24Codes;

}  // namespace
