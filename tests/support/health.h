// What a process says of itself: by HTTP on its health port, by grpc.health.v1 on its main port.
#ifndef HW_TESTS_SUPPORT_HEALTH_H_
#define HW_TESTS_SUPPORT_HEALTH_H_

#include <chrono>
#include <string>

#include <grpcpp/generic/generic_stub.h>

#include "tests/support/dial.h"
#include "tests/support/http.h"

namespace headwater::testing {

enum class Health { kServing, kNotServing, kUnknown, kSilent };

// path: "/livez" or "/readyz".
inline Health AskHealth(const std::string& address, const std::string& path) {
  const HttpResponse response = GetHttp(address, path, "GET", "localhost", 5);
  if (response.status == 200) return Health::kServing;
  if (response.status == 503) return Health::kNotServing;
  return response.status == 404 ? Health::kUnknown : Health::kSilent;
}

// Of service "". The messages have one field each and are spelled out.
inline Health AskGrpcHealth(const std::string& address) {
  grpc::GenericStub stub(DialPlaintext(address));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  const grpc::ByteBuffer request(static_cast<const grpc::Slice*>(nullptr), 0);
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  grpc::Slice answer;
  if (!status.ok() || !response.DumpToSingleSlice(&answer).ok() || answer.size() != 2) return Health::kSilent;
  return answer.begin()[1] == 1 ? Health::kServing : Health::kNotServing;
}

}  // namespace headwater::testing

#endif  // HW_TESTS_SUPPORT_HEALTH_H_
