#include "decode/generated_kv.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

constexpr int64_t kFirstTokens = 64;
constexpr int64_t kLargestStep = 1024;

}  // namespace

absl::Status GeneratedKvBudget::Take(uint64_t bytes) {
  uint64_t used = used_;
  do {
    const uint64_t available = limit_ - std::min(used, limit_);
    if (bytes > available) {
      return MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_KV_MEMORY_FULL,
                       absl::StrCat("generated tokens need ", bytes, " more bytes of KV memory, ", available,
                                    " of ", limit_, " are free"),
                       {{"bytes_asked", absl::StrCat(bytes)}, {"bytes_available", absl::StrCat(available)}});
    }
  } while (!used_.compare_exchange_weak(used, used + bytes));
  return absl::OkStatus();
}

GeneratedKv::GeneratedKv(const Shape& shape, GeneratedKvBudget* budget)
    : shape_(shape),
      budget_(budget),
      token_bytes_(static_cast<uint64_t>(shape.num_kv_heads) * static_cast<uint64_t>(shape.head_dim) *
                   kernels::SizeOf(shape.dtype)),
      tensors_(2 * static_cast<size_t>(shape.num_layers)) {}

GeneratedKv::~GeneratedKv() { budget_->Return(charged_bytes_); }

absl::Status GeneratedKv::Reserve(int64_t num_tokens) {
  if (num_tokens <= capacity_tokens_) return absl::OkStatus();
  if (num_tokens > shape_.max_tokens) {
    return absl::OutOfRangeError(
        absl::StrCat(num_tokens, " generated tokens are over the limit of ", shape_.max_tokens));
  }
  const int64_t step = std::clamp(capacity_tokens_, kFirstTokens, kLargestStep);
  const int64_t capacity = std::min(std::max(num_tokens, capacity_tokens_ + step), shape_.max_tokens);
  const uint64_t new_bytes = static_cast<uint64_t>(capacity) * token_bytes_ * tensors_.size();
  HW_RETURN_IF_ERROR(budget_->Take(new_bytes - charged_bytes_));
  charged_bytes_ = new_bytes;

  // Tensor by tensor, so that only one exists twice at a time. A failure half-way leaves the grown ones
  // larger than they need be, and charged; the next call grows the rest.
  for (auto& tensor : tensors_) {
    std::unique_ptr<char[]> grown(new (std::nothrow) char[static_cast<uint64_t>(capacity) * token_bytes_]);
    if (grown == nullptr) {
      return MakeError(
          absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_KV_MEMORY_FULL,
          absl::StrCat("no memory for the KV of ", capacity, " generated tokens (", new_bytes, " bytes)"));
    }
    if (tensor != nullptr) {
      std::memcpy(grown.get(), tensor.get(), static_cast<uint64_t>(capacity_tokens_) * token_bytes_);
    }
    tensor = std::move(grown);
  }
  capacity_tokens_ = capacity;
  return absl::OkStatus();
}

}  // namespace headwater
