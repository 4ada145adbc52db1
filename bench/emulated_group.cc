#include "bench/emulated_group.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "base/status_macros.h"
#include "bench/emulated_link.h"
#include "model/cuda/device_buffer.h"

namespace headwater {
namespace {

class Done final : public PendingExchange {
 public:
  absl::Status Wait() override { return absl::OkStatus(); }
};

class EmulatedCollectives final : public Collectives {
 public:
  EmulatedCollectives(int rank, int world_size) : rank_(rank), world_size_(world_size) {}
  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }

  std::unique_ptr<PendingExchange> StartExchange(int /*to*/, absl::Span<const char> send, int /*from*/,
                                                 absl::Span<char> receive) override {
    std::memcpy(receive.data(), send.data(), std::min(send.size(), receive.size()));
    return std::make_unique<Done>();
  }
  absl::Status AllGather(const void* in, uint64_t bytes, void* out) override {
    for (int rank = 0; rank < world_size_; ++rank) {
      std::memcpy(static_cast<char*>(out) + static_cast<uint64_t>(rank) * bytes, in, bytes);
    }
    return absl::OkStatus();
  }
  void Abort() override {}

 private:
  const int rank_, world_size_;
};

// bf16 between 2^-7 and 2^-5, of either sign; as f32 they are much the same.
absl::StatusOr<DeviceBuffer> Numbers() {
  std::mt19937 random(1);
  std::vector<uint16_t> values(1 << 22);
  for (uint16_t& value : values) value = static_cast<uint16_t>(0x3c00 | (random() & 0x80ff));
  const uint64_t bytes = values.size() * sizeof values[0];
  HW_ASSIGN_OR_RETURN(DeviceBuffer buffer, DeviceBuffer::Allocate(bytes, "what other ranks would send"));
  HW_RETURN_IF_ERROR(FromCuda(cudaMemcpy(buffer.data(), values.data(), bytes, cudaMemcpyHostToDevice),
                              "what other ranks would send"));
  return buffer;
}

uint64_t BytesOf(absl::Span<const DeviceParts> parts, int but) {
  uint64_t bytes = 0;
  for (size_t rank = 0; rank < parts.size(); ++rank) {
    if (static_cast<int>(rank) == but) continue;
    for (const DevicePart& part : parts[rank]) bytes += part.bytes;
  }
  return bytes;
}

class EmulatedDeviceGroup final : public DeviceGroup {
 public:
  EmulatedDeviceGroup(int rank, int world_size, const EmulatedLink& link, DeviceBuffer numbers,
                      DeviceBuffer began)
      : rank_(rank),
        world_size_(world_size),
        link_(link),
        numbers_(std::move(numbers)),
        began_(std::move(began)) {}
  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }

  absl::Status Exchange(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                        absl::string_view what, cudaStream_t stream) override {
    auto* const began = reinterpret_cast<uint64_t*>(began_.data());
    HW_RETURN_IF_ERROR(FromCuda(MarkTime(began, stream), what));
    std::vector<DevicePart> own;
    for (int rank = 0; rank < world_size_; ++rank) {
      const DeviceParts& parts = send[static_cast<size_t>(rank)];
      if (rank != rank_ && own.empty()) own.assign(parts.begin(), parts.end());
    }
    for (int rank = 0; rank < world_size_; ++rank) {
      if (rank == rank_) continue;
      for (const DevicePart& part : receive[static_cast<size_t>(rank)]) {
        HW_RETURN_IF_ERROR(Fill(part, own, what, stream));
      }
    }
    const uint64_t most = std::max(BytesOf(send, rank_), BytesOf(receive, rank_));
    const double seconds = static_cast<double>(most) / link_.bytes_per_s + link_.step_s;
    return FromCuda(WaitSince(began, static_cast<uint64_t>(1e9 * seconds), stream), what);
  }

  absl::Status Check() override { return absl::OkStatus(); }
  void Abort() override {}

 private:
  // From the parts of that size in turn: K's and V's, and what they are sent with, differ in size.
  absl::Status Fill(const DevicePart& into, const std::vector<DevicePart>& own, absl::string_view what,
                    cudaStream_t stream) {
    for (size_t tried = 0; tried < own.size(); ++tried) {
      const DevicePart& from = own[next_++ % own.size()];
      if (from.bytes == into.bytes) {
        return FromCuda(cudaMemcpyAsync(into.data, from.data, into.bytes, cudaMemcpyDeviceToDevice, stream),
                        what);
      }
    }
    for (uint64_t at = 0; at < into.bytes; at += numbers_.bytes()) {
      HW_RETURN_IF_ERROR(FromCuda(
          cudaMemcpyAsync(into.data + at, numbers_.data(), std::min(numbers_.bytes(), into.bytes - at),
                          cudaMemcpyDeviceToDevice, stream),
          what));
    }
    return absl::OkStatus();
  }

  const int rank_, world_size_;
  const EmulatedLink link_;
  const DeviceBuffer numbers_, began_;
  size_t next_ = 0;
};

}  // namespace

std::unique_ptr<Collectives> MakeEmulatedCollectives(int rank, int world_size) {
  return std::make_unique<EmulatedCollectives>(rank, world_size);
}

absl::StatusOr<std::unique_ptr<DeviceGroup>> MakeEmulatedDeviceGroup(int rank, int world_size,
                                                                     const EmulatedLink& link) {
  HW_ASSIGN_OR_RETURN(DeviceBuffer numbers, Numbers());
  HW_ASSIGN_OR_RETURN(DeviceBuffer began, DeviceBuffer::Allocate(sizeof(uint64_t), "a time"));
  return std::make_unique<EmulatedDeviceGroup>(rank, world_size, link, std::move(numbers), std::move(began));
}

}  // namespace headwater
