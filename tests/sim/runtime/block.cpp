// SPDX-License-Identifier: Apache-2.0
#include "block.h"

#include <algorithm>
#include <cstring>

#include "cluster.h"
#include "device.h"

namespace lors::sim {

const Coordinates* coordinates = nullptr;
Block* Block::current = nullptr;
Thread* Block::thread = nullptr;

std::string describe_site(Site site) {
  if (site.line() == 0) return "(nowhere)";
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

std::string describe_index(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string describe_thread(const Coordinates& c) {
  const unsigned index = (c.thread.z * c.block_size.y + c.thread.y) * c.block_size.x + c.thread.x;
  return "block " + describe_index(c.block) + " thread " + describe_index(c.thread) + " = lane " + std::to_string(index % 32) +
         " of warp " + std::to_string(index / 32);
}

bool same_place(Site a, Site b) {
  return key_of(a) == key_of(b) ||
         (a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0);
}

void fail(Site site, const std::string& message) { throw Error(describe_site(site) + ": " + message); }

Block::Block(Cluster& cluster_, uint32_t rank_)
    : cluster(cluster_),
      device(cluster_.device),
      launch(cluster_.launch),
      rank(rank_),
      shared_(cluster_.device.shared_window()) {
  const size_t count = launch.threads();
  threads_ = std::vector<Thread>(count);
  warps_ = std::vector<Warp>((count + 31) / 32);
  for (size_t i = 0; i < count; ++i) {
    Thread& t = threads_[i];
    Warp& warp = warps_[i / 32];
    t.index = static_cast<int>(i);
    t.lane = t.index % 32;
    t.block = this;
    t.warp = &warp;
    warp.threads[i % 32] = &t;
    warp.lanes |= 1u << (i % 32);
    t.coordinates.block_size = launch.block;
    t.coordinates.grid_size = launch.grid;
    t.coordinates.cluster_rank = rank;
    t.coordinates.cluster_size = launch.cluster;
    const auto x = static_cast<unsigned>(i);
    t.coordinates.thread = {x % launch.block.x, x / launch.block.x % launch.block.y, x / launch.block.x / launch.block.y};
  }
  for (Warp& warp : warps_)
    if (device.options.count) warp.log = std::make_unique<RequestLog>(device.launches.back(), warp.lanes);
}

void Block::prepare(uint3 index, uint32_t serial_) {
  serial = serial_;
  epoch = 1;
  live_ = static_cast<uint32_t>(threads_.size());
  if (launch.shared_bytes > 0) std::memset(shared_backing(0), 0xff, static_cast<size_t>(launch.shared_bytes));
  at_barrier_.clear();
  mbarriers.clear();
  visitors.clear();
  for (Warp& warp : warps_) warp.meetings.clear();
  for (Thread& t : threads_) {
    t.coordinates.block = index;
    t.state = Thread::State::ready;
    t.doing = "starting";
    t.site = Site();
    t.waits_for = nullptr;
    t.uncommitted.clear();
    t.groups.clear();
    t.seen.fill(0);
    t.seen[static_cast<size_t>(t.lane)] = 1;
    t.known = nullptr;
    t.in_cluster_barrier = false;
    t.fiber.start(&Block::thread_main);
    cluster.make_ready(t);
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
    if (me.in_cluster_barrier) fail(me.site, "the thread ended between arrive and wait of a barrier of the cluster");
    if (--block.live_ == 0) block.check_end();
    block.cluster.thread_ended(me);
  } catch (const std::exception& e) {
    block.cluster.fail_run(e.what() + (" [" + block.describe(me) + "]"));
  }
  me.state = Thread::State::done;
  me.doing = "ended";
  me.fiber.leave(true);
}

// When the last thread ends, so does the shared memory: nobody may be using it.
void Block::check_end() {
  for (const MBarrier& mbarrier : mbarriers) {
    if (mbarrier.bytes < 0)
      fail(mbarrier.copy_site,
           "bulk copies brought " + std::to_string(-mbarrier.bytes) + " bytes more than expect_tx announced");
    if (mbarrier.copied > mbarrier.waited)
      fail(mbarrier.copy_site, "the block ended, and nobody has waited for the mbarrier of this bulk copy");
  }
  if (visitors.empty()) return;
  Knowledge known = cluster.nothing();
  for (Thread& t : threads_) release(t, known);
  for (const auto& [visitor, last] : visitors)
    if (!known.covers(last.serial - cluster.first_serial, last.thread, last.epoch, last.clock))
      fail(last.site, "block " + describe_index(threads_[0].coordinates.block) +
                          " may have ended before this access to its shared memory: its threads have to wait in a barrier of "
                          "the cluster that the reader passes afterwards");
}

std::string Block::describe(const Thread& t) const { return std::string(launch.name) + ", " + describe_thread(t.coordinates); }

void Block::finish() {
  for (Warp& warp : warps_)
    if (warp.log) warp.log->flush();
  ++device.launches.back().counters.blocks;
}

// Runs of neighbouring threads that do the same.
std::string Block::describe_waiting() const {
  std::string text = "block " + describe_index(threads_[0].coordinates.block) + "]\n";
  for (size_t i = 0; i < threads_.size();) {
    const Thread& t = threads_[i];
    const auto same = [&](const Thread& other) {
      return std::strcmp(other.doing, t.doing) == 0 && same_place(other.site, t.site) && other.waits_for == t.waits_for;
    };
    size_t end = i + 1;
    while (end < threads_.size() && same(threads_[end])) ++end;
    text += "  threads " + std::to_string(i) + " to " + std::to_string(end - 1) + ": " + t.doing;
    if (t.state == Thread::State::waiting) text += " at " + describe_site(t.site);
    if (t.waits_for != nullptr) {
      const MBarrier& m = *t.waits_for;
      text += " for the mbarrier at byte " + std::to_string(m.offset) + ": phase " + std::to_string(m.phase) + ", " +
              std::to_string(m.pending) + " of " + std::to_string(m.count) + " arrivals and " + std::to_string(m.bytes) +
              " announced bytes missing";
    }
    text += "\n";
    i = end;
  }
  return text;
}

void Block::abandon(const std::string& message) {
  Thread& me = *thread;
  cluster.fail_run(describe_site(me.site) + ": " + message + " [" + describe(me) +
                   "; the line is that of the last checked access]");
  me.state = Thread::State::done;
  me.fiber.leave(true);
  __builtin_unreachable();
}

void Block::pause() {
  cluster.make_ready(*thread);
  thread->fiber.leave(false);
}

void Block::pause_sometimes() {
  if (device.options.preempt > 0 && cluster.random.chance(device.options.preempt)) pause();
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
  t.waits_for = nullptr;
  cluster.make_ready(t);
}

void release(Thread& thread, Knowledge& to) {
  Block& block = *thread.block;
  to.learn_epoch(block.rank, block.epoch);
  for (uint32_t lane = 0; lane < 32; ++lane)
    if (thread.warp->lanes >> lane & 1)
      to.learn_clock(block.rank, static_cast<uint32_t>(thread.warp->threads[lane]->index), thread.seen[lane]);
  if (thread.known) to.join(*thread.known);
  ++thread.seen[static_cast<size_t>(thread.lane)];
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
  Known all;
  for (const Thread* t : at_barrier_) learn(all, t->known);
  Thread* const me = thread;
  for (Thread* t : at_barrier_) {
    t->known = all;
    if (t != me) wake(*t);
  }
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
