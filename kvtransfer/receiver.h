// KvReceiver: KvTransferService over a KvStore.
#ifndef HW_KVTRANSFER_RECEIVER_H_
#define HW_KVTRANSFER_RECEIVER_H_

#include <memory>

#include <grpcpp/impl/service_type.h>

#include "base/metrics.h"
#include "kvtransfer/store.h"

namespace headwater {

// The gRPC service. `store` and `metrics` must outlive it. Payloads reach the store as raw slices, without a
// protobuf copy. Memory per stream is bounded by one message (64 MiB limit of the server) and its
// acknowledgement.
std::unique_ptr<grpc::Service> MakeKvReceiver(KvStore* store, Metrics* metrics);

}  // namespace headwater

#endif  // HW_KVTRANSFER_RECEIVER_H_
