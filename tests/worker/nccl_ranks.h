// Two ranks of a group over GPUs as two threads of the test, and the memory that they exchange.
#ifndef HW_TESTS_WORKER_NCCL_RANKS_H_
#define HW_TESTS_WORKER_NCCL_RANKS_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "model/cuda/device_buffer.h"
#include "tests/worker/rendezvous_server.h"
#include "worker/cuda/nccl_group.h"

// The one way to skip a test for want of a second GPU.
#define HW_REQUIRE_TWO_GPUS()                                               \
  do {                                                                      \
    int hw_devices = 0;                                                     \
    if (cudaGetDeviceCount(&hw_devices) != cudaSuccess || hw_devices < 2) { \
      (void)cudaGetLastError();                                             \
      GTEST_SKIP() << "needs two GPUs, there are " << hw_devices;           \
    }                                                                       \
  } while (0)

namespace headwater::testing {

// Runs `body` for rank 0 and rank 1 on a thread each, on the device of that number.
void OnTwoRanks(const std::function<void(int rank)>& body);
// Within it: waits for the other rank. Device memory is made before and exchanged after: making some may wait
// for the other device where that can reach it.
void Meet();

struct NcclPair {
  std::unique_ptr<NcclGroup> ranks[2];
};

NcclOptions PairOptions(const std::string& name, int rank, absl::Duration timeout);
// A group that is formed; fails the test, and returns null groups, if it is not.
NcclPair MakeNcclPair(const RendezvousServer& server, absl::Duration timeout);

class Stream {
 public:
  Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { (void)cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }
  // Whether it becomes idle within `timeout`.
  bool BecomesIdle(absl::Duration timeout) const;

 private:
  cudaStream_t stream_ = nullptr;
};

// Parts that lie in one allocation, a byte apart, at odd addresses; bytes around them tell of strangers.
class PartsMemory {
 public:
  explicit PartsMemory(const std::vector<uint64_t>& sizes);
  const DeviceParts& parts() const { return parts_; }

  // Bytes that depend on `seed`, the part and the place.
  void Fill(uint32_t seed);
  // Names the first byte that is not as Fill(seed) by the sender left it, or that changed between the parts.
  std::string Difference(uint32_t seed) const;

 private:
  std::vector<char> Expected(uint32_t seed) const;

  std::vector<uint64_t> sizes_;
  DeviceBuffer memory_;
  DeviceParts parts_;
};

// Rank `rank` of two: `parts` for or from the other one.
std::vector<DeviceParts> ForPeer(int rank, const DeviceParts& parts);

// Calls Check() until the stream is idle or the group has ended.
absl::Status CheckUntilIdle(NcclGroup* group, const Stream& stream);
// Calls Check() until it fails; OK: it did not within `timeout`.
absl::Status CheckUntilError(NcclGroup* group, absl::Duration timeout);

// Forms a group of this process and lets it exchange something: nothing of an earlier one is in the way.
void ExpectThatANewGroupWorks(const RendezvousServer& server);

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_NCCL_RANKS_H_
