// The edges of gRPC's calls and slices: from the start of a batch of operations to its completion, from the
// last reaction of a served call to OnDone, and from the making of a slice to the release of its memory. The
// packaged gRPC passes them on through atomics of its own.
#include <memory>

#include <grpc/grpc.h>
#include <grpc/slice.h>
#include <grpcpp/support/callback_common.h>
#include <grpcpp/support/server_callback.h>

#include "cmake/tsan/next_definition.h"

using headwater::tsan::NextDefinition;

namespace {

// Access to a private member function, which an explicit instantiation may name.
template <typename Name, typename Name::Function kFunction>
struct Reveal {
  friend typename Name::Function Revealed(Name) { return kFunction; }
};

struct RunWithStatus {
  using Function = void (grpc::internal::CallbackWithStatusTag::*)(bool);
  friend Function Revealed(RunWithStatus);
};
template struct Reveal<RunWithStatus, &grpc::internal::CallbackWithStatusTag::Run>;

struct RunWithSuccess {
  using Function = void (grpc::internal::CallbackWithSuccessTag::*)(bool);
  friend Function Revealed(RunWithSuccess);
};
template struct Reveal<RunWithSuccess, &grpc::internal::CallbackWithSuccessTag::Run>;

struct SliceOwner {
  void (*destroy)(void*);
  void* user_data;
};

void DestroySlice(void* argument) {
  __tsan_acquire(argument);
  const std::unique_ptr<SliceOwner> owner(static_cast<SliceOwner*>(argument));
  owner->destroy(owner->user_data);
}

}  // namespace

extern "C" {

grpc_call_error grpc_call_start_batch(grpc_call* call, const grpc_op* ops, size_t nops, void* tag,
                                      void* reserved) {
  static std::atomic<void*> cache{nullptr};
  const auto real = NextDefinition<decltype(&grpc_call_start_batch)>("grpc_call_start_batch", &cache);
  __tsan_release(tag);
  return real(call, ops, nops, tag, reserved);
}

grpc_event grpc_completion_queue_next(grpc_completion_queue* queue, gpr_timespec deadline, void* reserved) {
  static std::atomic<void*> cache{nullptr};
  const auto real =
      NextDefinition<decltype(&grpc_completion_queue_next)>("grpc_completion_queue_next", &cache);
  const grpc_event event = real(queue, deadline, reserved);
  if (event.type == GRPC_OP_COMPLETE) __tsan_acquire(event.tag);
  return event;
}

grpc_event grpc_completion_queue_pluck(grpc_completion_queue* queue, void* tag, gpr_timespec deadline,
                                       void* reserved) {
  static std::atomic<void*> cache{nullptr};
  const auto real =
      NextDefinition<decltype(&grpc_completion_queue_pluck)>("grpc_completion_queue_pluck", &cache);
  const grpc_event event = real(queue, tag, deadline, reserved);
  if (event.type == GRPC_OP_COMPLETE) __tsan_acquire(event.tag);
  return event;
}

grpc_slice grpc_slice_new_with_user_data(void* data, size_t size, void (*destroy)(void*), void* user_data) {
  static std::atomic<void*> cache{nullptr};
  const auto real =
      NextDefinition<decltype(&grpc_slice_new_with_user_data)>("grpc_slice_new_with_user_data", &cache);
  auto* owner = new SliceOwner{destroy, user_data};
  __tsan_release(owner);
  return real(data, size, DestroySlice, owner);
}

// The inline functions that gRPC's threads call when a callback's batch is complete: this definition is taken
// instead of the ones that the header leaves in each object file.
void HwRunWithStatus(grpc_completion_queue_functor* tag, int ok) __asm__(
    "_ZN4grpc8internal21CallbackWithStatusTag9StaticRunEP29grpc_completion_queue_functori");
void HwRunWithStatus(grpc_completion_queue_functor* tag, int ok) {
  __tsan_acquire(tag);
  (static_cast<grpc::internal::CallbackWithStatusTag*>(tag)->*Revealed(RunWithStatus()))(ok != 0);
}

void HwRunWithSuccess(grpc_completion_queue_functor* tag, int ok) __asm__(
    "_ZN4grpc8internal22CallbackWithSuccessTag9StaticRunEP29grpc_completion_queue_functori");
void HwRunWithSuccess(grpc_completion_queue_functor* tag, int ok) {
  __tsan_acquire(tag);
  (static_cast<grpc::internal::CallbackWithSuccessTag*>(tag)->*Revealed(RunWithSuccess()))(ok != 0);
}

}  // extern "C"

// Called by whoever drops the last reference to a served call.
void grpc::internal::ServerCallbackCall::ScheduleOnDone(bool inline_ondone) {
  static std::atomic<void*> cache{nullptr};
  const auto real = NextDefinition<void (*)(ServerCallbackCall*, bool)>(
      "_ZN4grpc8internal18ServerCallbackCall14ScheduleOnDoneEb", &cache);
  __tsan_acquire(&callbacks_outstanding_);
  real(this, inline_ondone);
}
