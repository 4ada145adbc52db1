// DecodeService: the engine's generations as gRPC streams.
#ifndef HW_DECODE_SERVICE_H_
#define HW_DECODE_SERVICE_H_

#include <memory>

#include <grpcpp/impl/service_type.h>

#include "decode/engine.h"

namespace headwater {

// `engine` must outlive the server that serves the result. Per call at most 64 tokens wait for a slow client;
// then its generation rests and others go on.
std::unique_ptr<grpc::Service> MakeDecodeService(GenerationEngine* engine);

}  // namespace headwater

#endif  // HW_DECODE_SERVICE_H_
