// What attention quality a job is bound to, and the density that a time budget allows. Pure.
#ifndef HW_WORKER_QUALITY_H_
#define HW_WORKER_QUALITY_H_

#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "headwater/v1/types.pb.h"
#include "kernels/pattern/parameters.h"
#include "model/config.h"

namespace headwater {

// One bound at most; 0: no such bound.
struct QualityBound {
  double min_recall = 0;
  double max_density = 0;
  absl::Duration time_budget;

  bool any() const { return min_recall > 0 || max_density > 0 || time_budget > absl::ZeroDuration(); }
};

// INVALID_ARGUMENT, BAD_FIELD: a value outside its range (the message names both), or no bound at all.
absl::StatusOr<QualityBound> ReadQuality(const v1::Quality& quality);

// What a bound makes of a policy's parameters beside those that were `given` by name: who bounds the density
// does not want a short prompt dense.
void AddBound(const QualityBound& bound, const std::map<std::string, double>& given,
              kernels::PolicyParameters* parameters);

// How fast a worker's layers have been; a prompt's first guess is what earlier ones left.
struct ComputeSpeed {
  // FLOP a second of linear layers, and of attention by the blocks it read, search and all. The first figures
  // are those of a modest GPU.
  double linear = 250e12;
  double attention = 200e12;

  // A finished layer; times under 10 us tell nothing.
  void Add(double linear_flop, absl::Duration linear_time, double attention_flop,
           absl::Duration attention_time);
};

// FLOP of one layer over the whole prompt.
struct LayerWork {
  double linear = 0;
  double dense_attention = 0;
};

// Of a prompt on one rank; of pairs that the causal mask leaves out none.
LayerWork WorkOf(const ModelConfig& config, int64_t num_tokens);

// Time that `layers` layers take at a density.
absl::Duration PredictTime(const LayerWork& work, const ComputeSpeed& speed, int layers, double density);

// The density, at most 1, at which `layers` layers take `left`; 0 or less: not even linear layers fit.
double DensityWithin(absl::Duration left, const LayerWork& work, const ComputeSpeed& speed, int layers);

}  // namespace headwater

#endif  // HW_WORKER_QUALITY_H_
