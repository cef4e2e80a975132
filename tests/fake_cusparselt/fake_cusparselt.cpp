// SPDX-License-Identifier: Apache-2.0
// A stand-in for libcusparseLt.so.0 that computes on the CPU, with the real one's interface. FAKE_OBJECT_BYTES says how large
// its objects are: 1024 (as 0.7.1) or 512 (as 0.8 and later), or more than anybody expects.
//
// It is stricter than the real one: objects must be aligned to 16, lie where they were made, and not reach into each other
// (each is filled to its last byte and checked at every use); all pointers of matrices must be aligned to 16; every byte of a
// workspace is written; a search leaves NaN in the output. Its compressed weight is values, then two-bit positions in an order
// of its own. FAKE_CUSPARSELT_VERSION is "major.minor.patch"; FAKE_CUSPARSELT_FAIL names functions that fail
// ("Init,MatmulSearch"); FAKE_CUSPARSELT_LAYOUT is values_first, metadata_first or tiled; FAKE_CUSPARSELT_WORKSPACE is in
// bytes; FAKE_CUSPARSELT_MILLISECONDS is what a product takes; FAKE_CUSPARSELT_WRONG makes products wrong.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "fake_stream.h"

#ifndef FAKE_OBJECT_BYTES
#define FAKE_OBJECT_BYTES 512
#endif

namespace {

enum Status {
  kSuccess,
  kNotInitialized,
  kAllocFailed,
  kInvalid,
  kArchMismatch,
  kMapping,
  kExecution,
  kInternal,
  kType,
  kPivot,
  kNotSupported
};
enum Kind : uint32_t {
  kHandle = 0x48414e44,
  kMatrix = 0x4d415452,
  kMatmul = 0x4d4d554c,
  kSelection = 0x53454c45,
  kPlan = 0x504c414e
};

std::recursive_mutex mutex;
std::map<std::string, int> calls;
int live = 0;    // objects made and not destroyed
int inside = 0;  // calls at this moment: the library is not to be entered twice
int entered_twice = 0;

std::string setting(const char* name) {
  const char* value = std::getenv((std::string("FAKE_CUSPARSELT_") + name).c_str());
  return value ? value : "";
}

struct Call {
  explicit Call(const char* name) : name(name) {
    const std::lock_guard lock(mutex);
    ++calls[name];
    if (++inside > 1) ++entered_twice;
  }
  ~Call() {
    const std::lock_guard lock(mutex);
    --inside;
  }
  bool fails() const {
    std::istringstream names(setting("FAIL"));
    for (std::string one; std::getline(names, one, ',');)
      if (one == name) return true;
    return false;
  }
  const char* name;
};

// The head of every object; the rest, to the last byte, is filled.
template <typename Body>
struct Object {
  uint32_t kind;
  const void* self;
  Body body;
};

struct Nothing {};
struct MatrixBody {
  int64_t rows, columns, leading;
  int type, order;
  bool structured;
};
struct MatmulBody {
  int operation_a, operation_b;
  const void *a, *b, *c, *d;
};
struct SelectionBody {
  const void* matmul;
  int config, split_k, split_k_mode;
};
struct PlanBody {
  const void* matmul;
  void* selection;
};

template <typename Body>
Body* make(void* at, Kind kind) {
  static_assert(sizeof(Object<Body>) <= 256);
  if (at == nullptr || reinterpret_cast<uintptr_t>(at) % 16 != 0) return nullptr;
  std::memset(at, 0xc5, FAKE_OBJECT_BYTES);
  auto* object = static_cast<Object<Body>*>(at);
  object->kind = kind;
  object->self = at;
  object->body = Body{};
  ++live;
  return &object->body;
}

template <typename Body>
Body* use(const void* at, Kind kind) {
  auto* object = static_cast<const Object<Body>*>(at);
  if (at == nullptr || object->kind != kind || object->self != at) return nullptr;
  const auto* bytes = static_cast<const unsigned char*>(at);
  for (int i = 256; i < FAKE_OBJECT_BYTES; ++i)
    if (bytes[i] != 0xc5) return nullptr;
  return const_cast<Body*>(&object->body);
}

template <typename Body>
int destroy(const void* at, Kind kind) {
  if (!use<Body>(at, kind)) return kInvalid;
  const_cast<Object<Body>*>(static_cast<const Object<Body>*>(at))->kind = 0;
  --live;
  return kSuccess;
}

bool good(const void* handle) { return use<Nothing>(handle, kHandle) != nullptr; }
bool aligned(const void* data) { return data && reinterpret_cast<uintptr_t>(data) % 16 == 0; }

double load(const void* data, int type, int64_t i) {
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (type == 14) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double value = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(fraction, -24)
                                       : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -value : value;
}

// To nearest, ties to even; what a test multiplies stays far from the ends of the range.
uint16_t rounded(double value, int type) {
  if (type == 14) {
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
    if (std::isnan(value)) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  if (std::isnan(value)) return 0x7e00;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (size >= 65520) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);
  if (size < std::ldexp(1, -14)) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  const auto fraction = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // 1024 to 2048
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + (fraction - 1024));
}

struct Layout {
  int64_t rows, depth;  // of op(A)
  int64_t values() const { return rows * depth / 2; }
  int64_t positions_bytes() const { return (rows * depth / 8 + 255) / 256 * 256; }
  int64_t bytes() const { return 2 * values() + positions_bytes(); }
  int64_t values_at() const { return setting("LAYOUT") == "metadata_first" ? positions_bytes() : 0; }
  int64_t positions_at() const { return setting("LAYOUT") == "metadata_first" ? 0 : 2 * values(); }
  // Where slot j of row i stands among the values; in tiles of 8 rows if asked for.
  int64_t slot(int64_t i, int64_t j) const {
    const int64_t half = depth / 2;
    return setting("LAYOUT") == "tiled" ? (i / 8 * half + j) * 8 + i % 8 : i * half + j;
  }
  // Columns first, from the last row up.
  int64_t position(int64_t i, int64_t j) const { return j * rows + (rows - 1 - i); }
};

Layout layout_of(const MatrixBody& a, int operation) {
  return operation == 1 ? Layout{a.columns, a.rows} : Layout{a.rows, a.columns};
}

int multiply(const char* name, const void* handle, const void* plan, const void* alpha, const void* a, const void* b,
             const void* beta, const void* c, void* d, void* workspace, void** streams, int32_t count, bool search) {
  const Call call(name);
  if (call.fails()) return kNotSupported;
  const auto* p = use<PlanBody>(plan, kPlan);
  const auto* m = p ? use<MatmulBody>(p->matmul, kMatmul) : nullptr;
  auto* selection = p ? use<SelectionBody>(p->selection, kSelection) : nullptr;
  if (!good(handle) || !m || !selection) return kInvalid;
  const auto *A = use<MatrixBody>(m->a, kMatrix), *B = use<MatrixBody>(m->b, kMatrix), *D = use<MatrixBody>(m->d, kMatrix);
  if (!A || !B || !D || m->c != m->d || c != d || !aligned(a) || !aligned(b) || !aligned(d)) return kInvalid;
  if (count != 1 || !streams || !*streams) return kInvalid;
  auto* stream = static_cast<FakeStream*>(*streams);
  const std::string bytes = setting("WORKSPACE");
  if (!bytes.empty() && std::atoll(bytes.c_str()) > 0) {
    if (!aligned(workspace)) return kInvalid;
    std::memset(workspace, 0xee, std::atoll(bytes.c_str()) * (selection->config + 1));
  }
  const Layout layout = layout_of(*A, m->operation_a);
  const int64_t out = layout.rows, depth = layout.depth, tokens = D->columns;
  if (m->operation_b != 1 || B->rows != tokens || B->columns != depth || B->order != 2 || D->order != 1 || D->rows != out)
    return kType;
  if (search) {
    if (stream->capturing) return kExecution;
    ++stream->waits;
    selection->config = static_cast<int>((out + depth + tokens) / 8 % 3) + 1;
    for (int64_t i = 0; i < out * tokens; ++i) static_cast<uint16_t*>(d)[i] = rounded(NAN, D->type);
    return kSuccess;
  }
  const auto* base = static_cast<const char*>(a);
  const auto* positions = reinterpret_cast<const uint8_t*>(base) + layout.positions_at();
  const double scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < out; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < depth / 2; ++j) {
        const int64_t at = layout.position(i, j);
        const int64_t k = j / 2 * 4 + (positions[at / 4] >> (at % 4 * 2) & 3);
        sum += load(base + layout.values_at(), A->type, layout.slot(i, j)) * load(b, B->type, t * depth + k);
      }
      const int64_t to = t * out + i;
      double value = scale * sum + (keep != 0 ? keep * load(d, D->type, to) : 0);
      if (!setting("WRONG").empty()) value = 1.5 * value + 1;
      static_cast<uint16_t*>(d)[to] = rounded(value, D->type);
    }
  const std::string cost = setting("MILLISECONDS");
  stream->milliseconds += cost.empty() ? 0.5 : std::atof(cost.c_str());
  return kSuccess;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// For the tests: how often a function was called; objects alive; whether two threads were inside at once.
API int fake_calls(const char* name) {
  const std::lock_guard lock(mutex);
  return calls[name];
}
API int fake_live() { return live; }
API int fake_entered_twice() { return entered_twice; }

API int cusparseLtGetProperty(int property, int* value) {
  const Call call("GetProperty");
  if (call.fails()) return kInvalid;
  int parts[3] = {0, 8, 1};
  std::sscanf(setting("VERSION").c_str(), "%d.%d.%d", &parts[0], &parts[1], &parts[2]);
  *value = parts[property];
  return kSuccess;
}
API int cusparseLtInit(void* handle) {
  const Call call("Init");
  if (call.fails()) return kArchMismatch;
  return make<Nothing>(handle, kHandle) ? kSuccess : kInvalid;
}
API int cusparseLtDestroy(const void* handle) { return destroy<Nothing>(handle, kHandle); }

static int matrix(const char* name, const void* handle, void* at, int64_t rows, int64_t columns, int64_t leading,
                  uint32_t alignment, int type, int order, bool structured) {
  const Call call(name);
  if (call.fails()) return kNotSupported;
  const int sides = structured ? 16 : 8;
  if (!good(handle) || alignment != 16 || rows % sides || columns % sides || !rows || !columns) return kInvalid;
  if ((type != 2 && type != 14) || leading != (order == 2 ? columns : rows)) return kType;
  auto* m = make<MatrixBody>(at, kMatrix);
  if (!m) return kInvalid;
  *m = {rows, columns, leading, type, order, structured};
  return kSuccess;
}
API int cusparseLtDenseDescriptorInit(const void* handle, void* at, int64_t rows, int64_t columns, int64_t leading,
                                      uint32_t alignment, int type, int order) {
  return matrix("DenseDescriptorInit", handle, at, rows, columns, leading, alignment, type, order, false);
}
API int cusparseLtStructuredDescriptorInit(const void* handle, void* at, int64_t rows, int64_t columns, int64_t leading,
                                           uint32_t alignment, int type, int order, int sparsity) {
  if (sparsity != 0) return kInvalid;
  return matrix("StructuredDescriptorInit", handle, at, rows, columns, leading, alignment, type, order, true);
}
API int cusparseLtMatDescriptorDestroy(const void* at) { return destroy<MatrixBody>(at, kMatrix); }

API int cusparseLtMatmulDescriptorInit(const void* handle, void* at, int operation_a, int operation_b, const void* a,
                                       const void* b, const void* c, const void* d, int compute) {
  const Call call("MatmulDescriptorInit");
  if (call.fails()) return kNotSupported;
  const auto* A = use<MatrixBody>(a, kMatrix);
  if (!good(handle) || !A || !A->structured || !use<MatrixBody>(b, kMatrix) || !use<MatrixBody>(c, kMatrix) || compute != 2)
    return kInvalid;
  auto* m = make<MatmulBody>(at, kMatmul);
  if (!m) return kInvalid;
  --live;  // there is no function to destroy it
  *m = {operation_a, operation_b, a, b, c, d};
  return kSuccess;
}
API int cusparseLtMatmulAlgSelectionInit(const void* handle, void* at, const void* matmul, int algorithm) {
  const Call call("MatmulAlgSelectionInit");
  if (call.fails()) return kNotSupported;
  if (!good(handle) || !use<MatmulBody>(matmul, kMatmul) || algorithm != 0) return kInvalid;
  auto* s = make<SelectionBody>(at, kSelection);
  if (!s) return kInvalid;
  *s = {matmul, 0, 1, 0};
  if (FAKE_OBJECT_BYTES == 1024) --live;  // as in 0.7.1, which has no function to destroy it
  return kSuccess;
}
#if FAKE_OBJECT_BYTES != 1024
API int cusparseLtMatmulAlgSelectionDestroy(const void* at) { return destroy<SelectionBody>(at, kSelection); }
#endif
static int* attribute_of(const void* at, int attribute, size_t bytes) {
  auto* s = use<SelectionBody>(at, kSelection);
  if (!s || bytes != sizeof(int)) return nullptr;
  return attribute == 0 ? &s->config : attribute == 3 ? &s->split_k : attribute == 4 ? &s->split_k_mode : nullptr;
}
API int cusparseLtMatmulAlgSetAttribute(const void*, void* at, int attribute, const void* data, size_t bytes) {
  const Call call("MatmulAlgSetAttribute");
  int* field = attribute_of(at, attribute, bytes);
  if (!field || call.fails()) return kInvalid;
  std::memcpy(field, data, bytes);
  return *field > 3 ? kInvalid : kSuccess;
}
API int cusparseLtMatmulAlgGetAttribute(const void*, const void* at, int attribute, void* data, size_t bytes) {
  const Call call("MatmulAlgGetAttribute");
  const int* field = attribute_of(at, attribute, bytes);
  if (!field || call.fails()) return kInvalid;
  std::memcpy(data, field, bytes);
  return kSuccess;
}
API int cusparseLtMatmulPlanInit(const void* handle, void* at, const void* matmul, const void* selection) {
  const Call call("MatmulPlanInit");
  if (call.fails()) return kNotSupported;
  if (!good(handle) || !use<MatmulBody>(matmul, kMatmul) || !use<SelectionBody>(selection, kSelection)) return kInvalid;
  auto* p = make<PlanBody>(at, kPlan);
  if (!p) return kInvalid;
  *p = {matmul, const_cast<void*>(selection)};
  return kSuccess;
}
API int cusparseLtMatmulPlanDestroy(const void* at) { return destroy<PlanBody>(at, kPlan); }
API int cusparseLtMatmulGetWorkspace(const void*, const void* plan, size_t* bytes) {
  const Call call("MatmulGetWorkspace");
  const auto* p = use<PlanBody>(plan, kPlan);
  const auto* selection = p ? use<SelectionBody>(p->selection, kSelection) : nullptr;
  if (!selection || call.fails()) return kInvalid;
  *bytes = static_cast<size_t>(std::atoll(setting("WORKSPACE").c_str())) * (selection->config + 1);
  return kSuccess;
}
API int cusparseLtMatmul(const void* handle, const void* plan, const void* alpha, const void* a, const void* b,
                         const void* beta, const void* c, void* d, void* workspace, void** streams, int32_t count) {
  return multiply("Matmul", handle, plan, alpha, a, b, beta, c, d, workspace, streams, count, false);
}
API int cusparseLtMatmulSearch(const void* handle, void* plan, const void* alpha, const void* a, const void* b,
                               const void* beta, const void* c, void* d, void* workspace, void** streams, int32_t count) {
  return multiply("MatmulSearch", handle, plan, alpha, a, b, beta, c, d, workspace, streams, count, true);
}
API int cusparseLtSpMMACompressedSize2(const void* handle, const void* at, size_t* compressed, size_t* scratch) {
  const Call call("SpMMACompressedSize2");
  const auto* a = use<MatrixBody>(at, kMatrix);
  if (!good(handle) || !a || call.fails()) return kInvalid;
  *compressed = layout_of(*a, 0).bytes();
  *scratch = 512;
  return kSuccess;
}
API int cusparseLtSpMMACompress2(const void* handle, const void* at, int is_a, int operation, const void* dense,
                                 void* compressed, void* scratch, void* stream) {
  const Call call("SpMMACompress2");
  if (call.fails()) return kExecution;
  const auto* a = use<MatrixBody>(at, kMatrix);
  if (!good(handle) || !a || is_a != 1 || !aligned(dense) || !aligned(compressed) || !scratch || !stream) return kInvalid;
  std::memset(scratch, 0xee, 512);
  const Layout layout = layout_of(*a, operation);
  auto* base = static_cast<char*>(compressed);
  std::memset(base, 0, layout.bytes());
  auto* values = reinterpret_cast<uint16_t*>(base + layout.values_at());
  auto* positions = reinterpret_cast<uint8_t*>(base) + layout.positions_at();
  const auto* source = static_cast<const uint16_t*>(dense);
  for (int64_t i = 0; i < layout.rows; ++i)
    for (int64_t g = 0; g < layout.depth / 4; ++g) {
      const auto element = [&](int p) {
        return operation == 1 ? source[(4 * g + p) * layout.rows + i] : source[i * layout.depth + 4 * g + p];
      };
      std::vector<int> kept;
      for (int p = 0; p < 4; ++p)
        if (element(p) & 0x7fff) kept.push_back(p);
      // A lone value stands where this library likes it, which is not where ours does.
      if (kept.size() == 1) kept.insert(kept[0] > 0 ? kept.begin() : kept.end(), kept[0] > 0 ? 0 : 1);
      if (kept.empty()) kept = {2, 3};
      for (int slot = 0; slot < 2; ++slot) {
        const int64_t j = 2 * g + slot, bit = layout.position(i, j);
        values[layout.slot(i, j)] = element(kept[slot]);
        positions[bit / 4] |= static_cast<uint8_t>(kept[slot] << (bit % 4 * 2));
      }
    }
  return kSuccess;
}
