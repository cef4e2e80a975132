// SPDX-License-Identifier: Apache-2.0
// Streams and events of the fake CUDA runtime, defined: included by one source of a program. Waiting under capture fails, as it
// does on a device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>

#include "../../fake_cusparselt/fake_stream.h"

struct FakeEvent {
  FakeStream* stream;
  double milliseconds;
};

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ++stream->waits;
  return stream->capturing ? cudaErrorInvalidDevice : cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  std::memcpy(to, from, bytes);
  return stream ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new FakeEvent{nullptr, 0};
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  *event = {stream, stream->milliseconds};
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaStreamSynchronize(event->stream); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = static_cast<float>(end->milliseconds - begin->milliseconds);
  return cudaSuccess;
}
