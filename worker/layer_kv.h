// LayerKv: where K and V of one layer lie in a rank's buffers, and their way to the KV sender.
#ifndef HW_WORKER_LAYER_KV_H_
#define HW_WORKER_LAYER_KV_H_

#include <cstdint>

#include "absl/status/status.h"

#include "kernels/dtype.h"
#include "kvtransfer/layout.h"
#include "kvtransfer/sender.h"
#include "worker/egress.h"

namespace headwater {

struct PrefillJob;

kernels::DType WireType(v1::KvDtype dtype);

// A buffer holds the rank's K rows and then its V rows.
class LayerKv {
 public:
  // own: in the compute type; egress: in the wire type. Equal where the types are.
  struct Buffers {
    char* own = nullptr;
    char* egress = nullptr;
  };

  // Both outlive this.
  LayerKv(kernels::DType compute, const PrefillJob& job, KvSender* sender);

  char* K(char* own, int64_t row) const { return own + row * compute_row_bytes_; }
  char* V(char* own, int64_t row) const { return own + (local_tokens_ + row) * compute_row_bytes_; }

  void StartLayer(int32_t layer) {
    layer_ = layer;
    next_block_ = 0;
  }

  // Rows [row, row + count), at positions [position, position + count), have been computed: converts them to
  // the wire type and submits the blocks that are whole now. Calls must come in ascending order of rows.
  // INTERNAL, NON_FINITE: a value outside f16's range.
  absl::Status Submit(const Buffers& buffers, int64_t position, int64_t row, int64_t count, EgressRing* ring);

 private:
  absl::Status ConvertRows(const Buffers& buffers, int64_t row, int64_t count) const;

  const PrefillJob& job_;
  KvSender* const sender_;
  const kernels::DType compute_;
  const kernels::DType wire_;
  const int64_t local_tokens_;
  const int64_t row_elements_;
  const int64_t compute_row_bytes_;
  const int64_t wire_row_bytes_;
  int32_t layer_ = 0;
  int64_t next_block_ = 0;  // block of the prompt that is submitted next, if it is local
};

}  // namespace headwater

#endif  // HW_WORKER_LAYER_KV_H_
