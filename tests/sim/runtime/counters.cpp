// SPDX-License-Identifier: Apache-2.0
#include "counters.h"

#include <algorithm>
#include <bit>

namespace lors::sim {

bool SectorSet::insert(uint64_t sector) {
  const uint64_t key = sector >> 12;
  if (key != last_key_) {
    last_ = &pages_[key];  // zeroed where new; unordered_map never moves its values
    last_key_ = key;
  }
  uint64_t& word = (*last_)[sector >> 6 & 63];
  const uint64_t bit = uint64_t{1} << (sector & 63);
  const bool is_new = (word & bit) == 0;
  word |= bit;
  return is_new;
}

int bank_conflicts(const uint64_t* address, uint32_t lanes, int width) {
  const int per_phase = width == 16 ? 8 : width == 8 ? 16 : 32, words = width <= 4 ? 1 : width / 4;
  int extra = 0;
  for (int first = 0; first < 32; first += per_phase) {
    std::array<std::array<uint64_t, 32>, 32> in_bank;  // the different words of each bank
    std::array<int, 32> count{};
    int wavefronts = 0;
    for (int lane = first; lane < first + per_phase; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      for (int w = 0; w < words; ++w) {
        const uint64_t word = address[lane] / 4 + static_cast<uint64_t>(w), bank = word % 32;
        int& n = count[bank];
        auto* end = in_bank[bank].data() + n;
        if (std::find(in_bank[bank].data(), end, word) != end) continue;
        *end = word;
        wavefronts = std::max(wavefronts, ++n);
      }
    }
    if (wavefronts > 1) extra += wavefronts - 1;
  }
  return extra;
}

void RequestLog::add(Space space, Site site, int lane, uint64_t address, int width, int moved, int buffer) {
  const void* key = std::bit_cast<const void*>(site);
  auto matches = [&](const Place& place) { return place.key == key && place.space == space; };
  if (last_ >= used_places_ || !matches(places_[last_])) {
    last_ = 0;
    while (last_ < used_places_ && !matches(places_[last_])) ++last_;
    if (last_ == used_places_) {
      if (used_places_ == places_.size()) places_.emplace_back();
      Place& place = places_[used_places_++];
      place.key = key;
      place.space = space;
      place.processed = 0;
      place.reached.fill(0);
      place.used = 0;
    }
  }
  Place& place = places_[last_];
  const size_t index = place.reached[static_cast<size_t>(lane)]++ - place.processed;
  while (place.used <= index) {
    if (place.used == place.open.size()) place.open.emplace_back();
    place.open[place.used].lanes = place.open[place.used].bytes = 0;
    ++place.used;
  }
  Request& request = place.open[index];
  request.lanes |= 1u << lane;
  request.address[static_cast<size_t>(lane)] = address;
  request.width = width;
  request.buffer = buffer;
  request.bytes += static_cast<uint32_t>(moved);
  if (index + 1 == place.used && request.lanes == lanes_) {
    // Every lane has passed this request, and so all before it: the usual case, and it keeps the log short.
    for (size_t i = 0; i <= index; ++i) process(space, place.open[i]);
    place.processed += static_cast<uint32_t>(place.used);
    place.used = 0;
  }
}

void RequestLog::flush() {
  for (size_t p = 0; p < used_places_; ++p)
    for (size_t i = 0; i < places_[p].used; ++i) process(places_[p].space, places_[p].open[i]);
  used_places_ = 0;
}

void LaunchRecord::add_bulk_copy(uint64_t address, uint32_t bytes, int buffer) {
  Traffic& of = traffic[buffer];
  ++counters.bulk_copies;
  counters.bulk_bytes += bytes;
  counters.global_bytes_read += bytes;
  of.bytes_read += bytes;
  for (uint64_t sector = address >> 5; sector <= (address + bytes - 1) >> 5; ++sector) {
    ++counters.global_sectors_read;
    ++of.sectors_read;
    of.unique_sectors_read += of.read.insert(sector) ? 1 : 0;
  }
}

void RequestLog::process_global(bool is_write, const Request& request) {
  std::array<uint64_t, 64> sectors;
  size_t count = 0;
  for (uint32_t rest = request.lanes; rest != 0; rest &= rest - 1) {
    const uint64_t sector = request.address[static_cast<size_t>(std::countr_zero(rest))] >> 5;  // aligned: never two
    if (count > 0 && sectors[count - 1] == sector) continue;
    if (std::find(sectors.data(), sectors.data() + count, sector) == sectors.data() + count) sectors[count++] = sector;
  }
  Counters& c = record_.counters;
  Traffic& traffic = record_.traffic[request.buffer];
  (is_write ? c.global_sectors_written : c.global_sectors_read) += count;
  (is_write ? c.global_bytes_written : c.global_bytes_read) += request.bytes;
  (is_write ? traffic.sectors_written : traffic.sectors_read) += count;
  (is_write ? traffic.bytes_written : traffic.bytes_read) += request.bytes;
  SectorSet& known = is_write ? traffic.written : traffic.read;
  uint64_t& unique = is_write ? traffic.unique_sectors_written : traffic.unique_sectors_read;
  for (size_t i = 0; i < count; ++i) unique += known.insert(sectors[i]) ? 1 : 0;
  const auto width = static_cast<size_t>(std::countr_zero(static_cast<unsigned>(request.width)));
  (is_write ? c.stores_by_width : c.loads_by_width)[width] += static_cast<uint64_t>(std::popcount(request.lanes));
}

void RequestLog::process(Space space, const Request& request) {
  Counters& c = record_.counters;
  const auto conflicts = [&] {
    return static_cast<uint64_t>(bank_conflicts(request.address.data(), request.lanes, request.width));
  };
  switch (space) {
    case Space::global_load: ++c.global_load_requests; return process_global(false, request);
    case Space::global_store: ++c.global_store_requests; return process_global(true, request);
    case Space::copy_source: c.copy_bytes += request.bytes; return process_global(false, request);
    case Space::shared_load:
      ++c.shared_load_requests;
      c.shared_bytes_read += request.bytes;
      c.shared_load_conflicts += conflicts();
      return;
    case Space::shared_store:
      ++c.shared_store_requests;
      c.shared_bytes_written += request.bytes;
      c.shared_store_conflicts += conflicts();
      return;
    case Space::copy_target:
      ++c.copy_requests;
      c.shared_bytes_written += request.bytes;
      c.copy_conflicts += conflicts();
      return;
  }
}

}  // namespace lors::sim
