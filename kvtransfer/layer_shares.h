// LayerShares: what a sender's acknowledged blocks add up to, layer by layer.
#ifndef HW_KVTRANSFER_LAYER_SHARES_H_
#define HW_KVTRANSFER_LAYER_SHARES_H_

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/time/time.h"

#include "kvtransfer/digest.h"

namespace headwater {

// Of a set of blocks.
struct KvShare {
  KvDigest digest;
  uint64_t bytes = 0;
  uint64_t blocks = 0;
};

// Of one layer's blocks: the first one's submission and the last acknowledgement so far.
struct KvLayerTimes {
  absl::Time first_submitted = absl::InfiniteFuture();
  absl::Time last_acked = absl::InfinitePast();
};

// Not thread-safe. `layer` is below num_layers.
class LayerShares {
 public:
  explicit LayerShares(uint32_t num_layers) : layers_(num_layers) {}

  void Submitted(uint32_t layer, absl::Time now) {
    Layer& one = layers_[layer];
    ++one.open;
    one.times.first_submitted = std::min(one.times.first_submitted, now);
  }
  void Acked(uint32_t layer, uint64_t block_index, uint64_t bytes, uint32_t crc32c, absl::Time now) {
    Layer& one = layers_[layer];
    one.times.last_acked = now;
    --one.open;
    ++one.share.blocks;
    one.share.bytes += bytes;
    one.share.digest.Add(block_index, bytes, crc32c);
  }

  // Of the layers below `layer` (at most num_layers); nullopt: one of their submitted blocks is not
  // acknowledged.
  std::optional<KvShare> Below(uint32_t layer) const {
    KvShare sum;
    for (uint32_t i = 0; i < layer; ++i) {
      if (layers_[i].open > 0) return std::nullopt;
      sum.digest.Merge(layers_[i].share.digest);
      sum.bytes += layers_[i].share.bytes;
      sum.blocks += layers_[i].share.blocks;
    }
    return sum;
  }
  std::vector<KvLayerTimes> Times() const {
    std::vector<KvLayerTimes> times;
    for (const Layer& layer : layers_) times.push_back(layer.times);
    return times;
  }

 private:
  struct Layer {
    uint64_t open = 0;
    KvShare share;
    KvLayerTimes times;
  };
  std::vector<Layer> layers_;
};

}  // namespace headwater

#endif  // HW_KVTRANSFER_LAYER_SHARES_H_
