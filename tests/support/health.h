// What grpc.health.v1 says of a service. Its messages have one field each and are spelled out.
#ifndef HW_TESTS_SUPPORT_HEALTH_H_
#define HW_TESTS_SUPPORT_HEALTH_H_

#include <chrono>
#include <string>

#include <grpcpp/generic/generic_stub.h>

#include "tests/support/dial.h"

namespace headwater::testing {

enum class Health { kServing, kNotServing, kUnknown, kSilent };

inline Health AskHealth(const std::string& address, const std::string& service) {
  grpc::GenericStub stub(DialPlaintext(address));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  std::string text = service.empty() ? "" : std::string("\x0a") + static_cast<char>(service.size()) + service;
  const grpc::Slice slice(text);
  const grpc::ByteBuffer request(&slice, 1);
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  if (status.error_code() == grpc::StatusCode::NOT_FOUND) return Health::kUnknown;
  grpc::Slice answer;
  if (!status.ok() || !response.DumpToSingleSlice(&answer).ok() || answer.size() != 2) return Health::kSilent;
  return answer.begin()[1] == 1 ? Health::kServing : Health::kNotServing;
}

}  // namespace headwater::testing

#endif  // HW_TESTS_SUPPORT_HEALTH_H_
