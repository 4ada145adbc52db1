// Which queries of a prompt are looked at to estimate recall, and what their recalls say. Pure.
#ifndef HW_WORKER_RECALL_SAMPLES_H_
#define HW_WORKER_RECALL_SAMPLES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"

namespace headwater {

// `count` positions of a prompt, ascending, one from each of as many stretches of equal length (apart by at
// most one token), so that each token stands for as many others. The same request, layer and sizes give the
// same ones. Fewer where the prompt has fewer tokens.
std::vector<int64_t> SampleRows(const std::string& request_id, int32_t layer, int64_t num_tokens,
                                int32_t count);

// What recalls of sampled queries say of one group of heads.
struct RecallEstimate {
  double mean = 1;
  double p1 = 1;     // first percentile: the smallest of up to 100 values
  double error = 0;  // standard error of the mean
};

// recalls: [rows, heads]; of heads [first, first + count). Rows are independent of each other, heads of a row
// are not: the error is that of the rows' means. Of one row it is not known, and 0.
RecallEstimate EstimateRecall(absl::Span<const float> recalls, int32_t heads, int32_t first, int32_t count);

// The first percentile by nearest rank; 1 of none.
double FirstPercentile(std::vector<float> values);

// Queries of a layer that can be sampled for at most `share` of the time of its attention at `density`, up to
// `most`; 0: not enough of them to tell anything (8). pack: query heads of a KV head.
int32_t AffordableRows(int64_t num_tokens, double density, double share, int32_t pack, int32_t most);

}  // namespace headwater

#endif  // HW_WORKER_RECALL_SAMPLES_H_
