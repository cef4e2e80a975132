// SPDX-License-Identifier: Apache-2.0
// The fuzz target with a driver of its own, for any compiler: random bytes, valid weights, and valid weights with a few bytes
// changed. Case i of a seed is always the same; where one fails, its number is printed and `--case` runs it alone.
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "layouts.h"

namespace {

uint64_t seed = 1, current = 0;

void print_case() {
  std::fprintf(stderr, "fuzz: failed in case %llu of seed %llu; rerun it with --seed %llu --case %llu\n",
               static_cast<unsigned long long>(current), static_cast<unsigned long long>(seed),
               static_cast<unsigned long long>(seed), static_cast<unsigned long long>(current));
}

enum Kind { kRandom, kValid, kMutated, kKinds };

std::vector<uint8_t> input_of(uint64_t index, Kind& kind) {
  std::seed_seq sequence{seed, index};
  std::mt19937 random(sequence);
  kind = Kind(index % kKinds);
  std::vector<uint8_t> input;
  if (kind == kRandom) {
    input.resize(random() % 4096);
    for (uint8_t& byte : input) byte = uint8_t(random());
    return input;
  }
  input = lors::fuzz::valid_input([](void* context) { return uint32_t((*static_cast<std::mt19937*>(context))()); }, &random);
  if (kind == kValid) return input;
  for (uint32_t changes = 1 + random() % 4; changes; --changes) {
    const size_t at = random() % input.size();
    switch (random() % 5) {
      case 0: input[at] = uint8_t(random()); break;
      case 1: input[at] ^= uint8_t(1u << random() % 8); break;
      case 2: input.resize(at + 1); break;
      case 3: input.insert(input.begin() + int64_t(at), uint8_t(random())); break;
      default:  // an absurd number somewhere
        for (size_t i = at; i < std::min(at + 8, input.size()); ++i) input[i] = i == at + 7 ? 0x7f : 0xff;
    }
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 60;
  uint64_t only = UINT64_MAX;
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    if (i + 1 == argc || (option != "--seconds" && option != "--seed" && option != "--case")) {
      std::fprintf(stderr, "usage: %s [--seconds S] [--seed N] [--case I]\n", argv[0]);
      return 2;
    }
    if (option == "--seconds") seconds = std::atof(argv[i + 1]);
    if (option == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 10);
    if (option == "--case") only = std::strtoull(argv[i + 1], nullptr, 10);
  }
  __sanitizer_set_death_callback(print_case);
  std::signal(SIGABRT, [](int) { print_case(); });
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  uint64_t cases[kKinds] = {}, valid[kKinds] = {};
  for (current = only == UINT64_MAX ? 0 : only; elapsed() < seconds; ++current) {
    Kind kind;
    const std::vector<uint8_t> input = input_of(current, kind);
    const bool accepted = lors::fuzz::run_one(input.data(), input.size());
    ++cases[kind];
    valid[kind] += accepted;
    if (kind == kValid && !accepted) {
      std::fprintf(stderr, "fuzz: a valid weight was refused\n");
      std::abort();
    }
    if (only != UINT64_MAX) break;
  }
  const char* const names[] = {"random bytes", "valid weights", "changed weights"};
  for (int kind = 0; kind < kKinds; ++kind)
    std::printf("%-16s %10llu cases, %10llu accepted\n", names[kind], static_cast<unsigned long long>(cases[kind]),
                static_cast<unsigned long long>(valid[kind]));
  return 0;
}
