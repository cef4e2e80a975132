// SPDX-License-Identifier: Apache-2.0
#include "block.h"

#include <algorithm>
#include <cstring>

#include "device.h"

namespace lors::sim {

const Coordinates* coordinates = nullptr;
Block* Block::current = nullptr;
Thread* Block::thread = nullptr;

namespace {
uint32_t last_serial = 0;
}

std::string describe_site(Site site) {
  if (site.line() == 0) return "(nowhere)";
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

std::string describe_thread(const Coordinates& c) {
  auto triple = [](auto v) { return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")"; };
  const unsigned index = (c.thread.z * c.block_size.y + c.thread.y) * c.block_size.x + c.thread.x;
  return "block " + triple(c.block) + " thread " + triple(c.thread) + " = lane " + std::to_string(index % 32) + " of warp " +
         std::to_string(index / 32);
}

bool same_place(Site a, Site b) {
  return key_of(a) == key_of(b) ||
         (a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0);
}

void fail(Site site, const std::string& message) { throw Error(describe_site(site) + ": " + message); }

Block::Block(Device& device_, const Launch& launch_) : device(device_), launch(launch_), shared_(device_.shared_window()) {
  const size_t count = size_t{launch.block.x} * launch.block.y * launch.block.z;
  threads_ = std::vector<Thread>(count);
  warps_ = std::vector<Warp>((count + 31) / 32);
  for (size_t i = 0; i < count; ++i) {
    Thread& t = threads_[i];
    Warp& warp = warps_[i / 32];
    t.index = static_cast<int>(i);
    t.lane = t.index % 32;
    t.warp = &warp;
    warp.threads[i % 32] = &t;
    warp.lanes |= 1u << (i % 32);
    t.coordinates.block_size = launch.block;
    t.coordinates.grid_size = launch.grid;
    const auto x = static_cast<unsigned>(i);
    t.coordinates.thread = {x % launch.block.x, x / launch.block.x % launch.block.y, x / launch.block.x / launch.block.y};
  }
  for (Warp& warp : warps_)
    if (device.options.count) warp.log = std::make_unique<RequestLog>(device.launches.back(), warp.lanes);
  Block::current = this;
}

Block::~Block() {
  Block::current = nullptr;
  Block::thread = nullptr;
  coordinates = nullptr;
}

uint32_t Block::next_serial() { return last_serial + 1; }

void Block::run(uint3 index) {
  prepare(index);
  schedule();
  finish();
}

void Block::prepare(uint3 index) {
  serial = ++last_serial;
  epoch = 1;
  random = Random(device.random.next());
  if (launch.shared_bytes > 0) std::memset(shared_backing(0), 0xff, static_cast<size_t>(launch.shared_bytes));
  ready_.clear();
  at_barrier_.clear();
  failure_.clear();
  for (Warp& warp : warps_) warp.meetings.clear();
  for (Thread& t : threads_) {
    t.coordinates.block = index;
    t.state = Thread::State::ready;
    t.doing = "starting";
    t.site = Site();
    t.uncommitted.clear();
    t.groups.clear();
    t.seen.fill(0);
    t.seen[static_cast<size_t>(t.lane)] = 1;
    t.fiber.start(&Block::thread_main);
    ready_.push_back(&t);
  }
}

void Block::thread_main() {
  Block& block = *Block::current;
  Thread& me = *Block::thread;
  try {
    block.launch.body(block.launch.context);
    const AsyncCopy* forgotten = nullptr;
    if (!me.uncommitted.empty()) forgotten = &me.uncommitted.front();
    for (const auto& group : me.groups)
      if (!group.empty()) forgotten = &group.front();
    if (forgotten != nullptr) fail(forgotten->site, "the thread ended without waiting for this cp.async");
  } catch (const std::exception& e) {
    block.failure_ = e.what() + (" [" + block.describe(me) + "]");
  }
  me.state = Thread::State::done;
  me.doing = "ended";
  me.fiber.leave(true);
}

std::string Block::describe(const Thread& t) const { return std::string(launch.name) + ", " + describe_thread(t.coordinates); }

void Block::schedule() {
  while (!ready_.empty()) {
    std::swap(ready_[random.below(static_cast<uint32_t>(ready_.size()))], ready_.back());
    Thread& next = *ready_.back();
    ready_.pop_back();
    thread = &next;
    coordinates = &next.coordinates;
    next.fiber.resume();
    thread = nullptr;
    if (!failure_.empty()) throw Error(failure_);
  }
  const bool all_done =
      std::all_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.state == Thread::State::done; });
  if (!all_done)
    throw Error("deadlock: some threads wait for others that never come [" + std::string(launch.name) + ", block (" +
                std::to_string(threads_[0].coordinates.block.x) + "," + std::to_string(threads_[0].coordinates.block.y) + "," +
                std::to_string(threads_[0].coordinates.block.z) + ")]\n" + describe_waiting());
}

void Block::finish() {
  for (Warp& warp : warps_)
    if (warp.log) warp.log->flush();
  ++device.launches.back().counters.blocks;
}

// Runs of neighbouring threads that do the same.
std::string Block::describe_waiting() const {
  std::string text;
  for (size_t i = 0; i < threads_.size();) {
    const Thread& t = threads_[i];
    size_t end = i + 1;
    while (end < threads_.size() && std::strcmp(threads_[end].doing, t.doing) == 0 && same_place(threads_[end].site, t.site))
      ++end;
    text += "  threads " + std::to_string(i) + " to " + std::to_string(end - 1) + ": " + t.doing;
    if (t.state == Thread::State::waiting) text += " at " + describe_site(t.site);
    text += "\n";
    i = end;
  }
  return text;
}

void Block::abandon(const std::string& message) {
  Thread& me = *thread;
  failure_ = describe_site(me.site) + ": " + message + " [" + describe(me) + "; the line is that of the last checked access]";
  me.state = Thread::State::done;
  me.fiber.leave(true);
  __builtin_unreachable();
}

void Block::pause() {
  ready_.push_back(thread);
  thread->fiber.leave(false);
}

void Block::pause_sometimes() {
  if (device.options.preempt > 0 && random.chance(device.options.preempt)) pause();
}

void Block::wait(const char* doing, Site site) {
  thread->state = Thread::State::waiting;
  thread->doing = doing;
  thread->site = site;
  thread->fiber.leave(false);
}

void Block::wake(Thread& t) {
  t.state = Thread::State::ready;
  t.doing = "running";
  ready_.push_back(&t);
}

void Block::barrier(Site site) {
  if (at_barrier_.empty()) barrier_site_ = site;
  if (!same_place(barrier_site_, site))
    fail(site, "__syncthreads here, while thread " + std::to_string(at_barrier_.front()->index) +
                   " waits at the __syncthreads of " + describe_site(barrier_site_));
  at_barrier_.push_back(thread);
  if (at_barrier_.size() < threads_.size()) return wait("__syncthreads", site);
  ++epoch;
  ++device.launches.back().counters.barriers;
  for (Warp& warp : warps_)
    if (warp.log) warp.log->flush();
  Thread* const me = thread;
  for (Thread* t : at_barrier_)
    if (t != me) wake(*t);
  at_barrier_.clear();
  pause();
}

void Block::meet(const char* name, uint32_t mask, void* operand, CollectiveBody body, Site site) {
  Thread& me = *thread;
  Warp& warp = *me.warp;
  me.site = site;
  if ((mask >> me.lane & 1) == 0) fail(site, std::string(name) + " with a mask that does not name the calling lane");
  if ((mask & ~warp.lanes) != 0) fail(site, std::string(name) + " with a mask that names lanes the warp does not have");
  auto meeting =
      std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](const Rendezvous& r) { return (r.mask & mask) != 0; });
  if (meeting == warp.meetings.end()) {
    Rendezvous fresh;
    fresh.mask = mask;
    fresh.name = name;
    fresh.site = site;
    warp.meetings.push_back(fresh);
    meeting = warp.meetings.end() - 1;
  } else if (meeting->mask != mask || std::strcmp(meeting->name, name) != 0 || !same_place(meeting->site, site)) {
    fail(site, std::string("divergent warp: ") + name + " here, while other lanes wait in " + meeting->name + " at " +
                   describe_site(meeting->site) + (meeting->mask != mask ? " with another mask" : ""));
  }
  meeting->operands[static_cast<size_t>(me.lane)] = operand;
  meeting->arrived |= 1u << me.lane;
  if (meeting->arrived != mask) return wait(name, site);

  if (body != nullptr) body(meeting->operands.data(), mask);
  warp.meetings.erase(meeting);
  if (mask == warp.lanes && warp.log) warp.log->flush();
  for (uint32_t lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1) && warp.threads[lane] != &me) wake(*warp.threads[lane]);
  pause();
}

}  // namespace lors::sim
