// SPDX-License-Identifier: Apache-2.0
#include "cusparselt.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>

namespace lors::cusparselt {

namespace {

constexpr const char* kSoname = "libcusparseLt.so.0";
// The oldest one whose objects are known to fit an Opaque: earlier ones had 11024 bytes.
constexpr Version kOldest{0, 7, 1};

struct Meaning {
  const char* name;
  const char* words;
};

// cusparseStatus_t in its order. The library's own cusparseLtGetErrorString is newer than the oldest version served.
constexpr Meaning kMeanings[] = {
    {"CUSPARSE_STATUS_SUCCESS", "it succeeded"},
    {"CUSPARSE_STATUS_NOT_INITIALIZED", "it could not start on this device"},
    {"CUSPARSE_STATUS_ALLOC_FAILED", "it ran out of memory"},
    {"CUSPARSE_STATUS_INVALID_VALUE", "it was given a value it does not take"},
    {"CUSPARSE_STATUS_ARCH_MISMATCH", "it has no code for this device"},
    {"CUSPARSE_STATUS_MAPPING_ERROR", "memory could not be reached"},
    {"CUSPARSE_STATUS_EXECUTION_FAILED", "a kernel did not run"},
    {"CUSPARSE_STATUS_INTERNAL_ERROR", "it failed inside"},
    {"CUSPARSE_STATUS_MATRIX_TYPE_NOT_SUPPORTED", "it does not take matrices of this kind"},
    {"CUSPARSE_STATUS_ZERO_PIVOT", "it met a zero pivot"},
    {"CUSPARSE_STATUS_NOT_SUPPORTED", "it does not support this problem on this device"},
    {"CUSPARSE_STATUS_INSUFFICIENT_RESOURCES", "it found too few resources"},
};

int cuda_type(DType dtype) { return dtype == DType::bfloat16 ? kBFloat16 : kFloat16; }

}  // namespace

Library::Library(const char* wanted) {
  const std::string name = wanted ? wanted : "";
  if (name == "off") {
    problem = "cuSPARSELt is turned off (LORS_CUSPARSELT=off).";
    return;
  }
  void* opened = nullptr;
  if (name.empty()) {
    opened = dlopen(kSoname, RTLD_LAZY | RTLD_LOCAL | RTLD_NOLOAD);
    origin = opened ? std::string(kSoname) + ", loaded with torch" : kSoname;
    if (!opened) opened = dlopen(kSoname, RTLD_LAZY | RTLD_LOCAL);
  } else {
    origin = name;
    opened = dlopen(name.c_str(), RTLD_LAZY | RTLD_LOCAL);
  }
  if (!opened) {
    const char* reason = dlerror();
    problem = "cuSPARSELt could not be loaded (" + std::string(reason ? reason : origin) +
              "); install nvidia-cusparselt-cu12 or -cu13 for torch's CUDA, or name the file in LORS_CUSPARSELT.";
    return;
  }
  std::string missing;
#define LORS_CUSPARSELT_FIND(name, required, ...)                                       \
  call.name = reinterpret_cast<decltype(call.name)>(dlsym(opened, "cusparseLt" #name)); \
  if (required && !call.name && missing.empty()) missing = "cusparseLt" #name;
  LORS_CUSPARSELT_FUNCTIONS(LORS_CUSPARSELT_FIND)
#undef LORS_CUSPARSELT_FIND
  if (!missing.empty()) {
    problem = origin + " has no function " + missing + "; it is no cuSPARSELt of version " + kOldest.text() + " or later.";
    return;
  }
  int* const parts[] = {&version.major, &version.minor, &version.patch};
  for (int part = 0; part < 3; ++part)
    if (call.GetProperty(part, parts[part]) != kSuccess) {
      problem = "cuSPARSELt (" + origin + ") did not tell its version.";
      return;
    }
  if (version < kOldest)
    problem = "cuSPARSELt " + version.text() + " is too old (" + origin + "); " + kOldest.text() + " or later is needed.";
}

const Library& library() {
  static const Library* const found = new Library(std::getenv("LORS_CUSPARSELT"));
  return *found;
}

bool Opaque::fits() const {
  return std::all_of(bytes_ + kSize, bytes_ + 2 * kSize, [](unsigned char byte) { return byte == kUntouched; });
}

Status answer(const Library& library, int status, const char* function) {
  if (status == kSuccess) return {};
  const bool known = status > 0 && status < static_cast<int>(std::size(kMeanings));
  return Status::error("cuSPARSELt " + library.version.text() + " answered " +
                       (known ? std::string(kMeanings[status].name) : "status " + std::to_string(status)) + " to cusparseLt" +
                       function + (known ? std::string(": ") + kMeanings[status].words : "") + ".");
}

namespace {

// The answer to a call that has filled in `object`.
Status made(const Handle& handle, int status, const char* function, const Opaque& object) {
  if (!object.fits())
    return Status::error(
        "cuSPARSELt " + handle.library().version.text() +
        " has larger objects than this build of lors_cuda knows; set LORS_CUSPARSELT to an earlier version, or to"
        " off.");
  return answer(handle.library(), status, function);
}

}  // namespace

Handle::~Handle() {
  if (live_) call().Destroy(opaque_.get());
}

Status Handle::init() {
  const int status = call().Init(opaque_.get());
  live_ = status == kSuccess;
  return made(*this, status, "Init", opaque_);
}

Matrix::~Matrix() {
  if (live_) handle_.call().MatDescriptorDestroy(opaque_.get());
}

Status Matrix::init(int64_t rows, int64_t columns, DType dtype, int order, bool structured) {
  const Functions& call = handle_.call();
  const int64_t leading = order == kRowMajor ? columns : rows;
  const int status = structured ? call.StructuredDescriptorInit(handle_.get(), opaque_.get(), rows, columns, leading,
                                                                kAlignment, cuda_type(dtype), order, kHalf)
                                : call.DenseDescriptorInit(handle_.get(), opaque_.get(), rows, columns, leading, kAlignment,
                                                           cuda_type(dtype), order);
  live_ = status == kSuccess;
  return made(handle_, status, structured ? "StructuredDescriptorInit" : "DenseDescriptorInit", opaque_);
}

Plan::~Plan() {
  const Functions& call = handle_.call();
  if (planned_) call.MatmulPlanDestroy(plan_.get());
  if (selected_ && call.MatmulAlgSelectionDestroy) call.MatmulAlgSelectionDestroy(selection_.get());
}

Status Plan::init(int64_t rows, int64_t columns, int64_t tokens, DType dtype, bool transposed, const Algorithm* known) {
  const Functions& call = handle_.call();
  const void* handle = handle_.get();
  const int64_t out = transposed ? columns : rows, depth = transposed ? rows : columns;
  if (Status s = a_.init(rows, columns, dtype, kRowMajor, true); !s.ok()) return s;
  if (Status s = b_.init(tokens, depth, dtype, kRowMajor, false); !s.ok()) return s;
  if (Status s = d_.init(out, tokens, dtype, kColumnMajor, false); !s.ok()) return s;
  Status s = made(handle_,
                  call.MatmulDescriptorInit(handle, matmul_.get(), transposed ? kTranspose : kNonTranspose, kTranspose,
                                            a_.get(), b_.get(), d_.get(), d_.get(), kComputeFloat32),
                  "MatmulDescriptorInit", matmul_);
  if (!s.ok()) return s;
  const int selected = call.MatmulAlgSelectionInit(handle, selection_.get(), matmul_.get(), kDefaultAlgorithm);
  selected_ = selected == kSuccess;
  s = made(handle_, selected, "MatmulAlgSelectionInit", selection_);
  const auto set = [&](int attribute, int value) {
    if (s.ok())
      s = answer(handle_.library(), call.MatmulAlgSetAttribute(handle, selection_.get(), attribute, &value, sizeof value),
                 "MatmulAlgSetAttribute");
  };
  if (known) {
    set(kConfigId, known->config);
    // As torch does: what stands for "no split" is not said again.
    if (known->split_k != 1) set(kSplitK, known->split_k);
    if (known->split_k != 1 && known->split_k_mode > 0) set(kSplitKMode, known->split_k_mode);
  }
  if (!s.ok()) return s;
  const int planned = call.MatmulPlanInit(handle, plan_.get(), matmul_.get(), selection_.get());
  planned_ = planned == kSuccess;
  return made(handle_, planned, "MatmulPlanInit", plan_);
}

Status Plan::search(const void* a, const void* b, void* d, void* workspace, void* stream, Algorithm& found) {
  const Functions& call = handle_.call();
  const float one = 1, zero = 0;
  Status s =
      answer(handle_.library(), call.MatmulSearch(handle_.get(), plan_.get(), &one, a, b, &zero, d, d, workspace, &stream, 1),
             "MatmulSearch");
  const auto get = [&](int attribute, int& value) {
    if (s.ok())
      s = answer(handle_.library(),
                 call.MatmulAlgGetAttribute(handle_.get(), selection_.get(), attribute, &value, sizeof value),
                 "MatmulAlgGetAttribute");
  };
  get(kConfigId, found.config);
  get(kSplitK, found.split_k);
  get(kSplitKMode, found.split_k_mode);
  return s;
}

Status Plan::workspace_bytes(size_t& bytes) const {
  return answer(handle_.library(), handle_.call().MatmulGetWorkspace(handle_.get(), plan_.get(), &bytes), "MatmulGetWorkspace");
}

Status Plan::run(const void* a, const void* b, void* d, bool add, void* workspace, void* stream) const {
  const float alpha = 1, beta = add ? 1 : 0;
  return answer(handle_.library(),
                handle_.call().Matmul(handle_.get(), plan_.get(), &alpha, a, b, &beta, d, d, workspace, &stream, 1), "Matmul");
}

}  // namespace lors::cusparselt
