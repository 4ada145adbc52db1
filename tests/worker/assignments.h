// Good assignments for a golden model.
#ifndef HW_TESTS_WORKER_ASSIGNMENTS_H_
#define HW_TESTS_WORKER_ASSIGNMENTS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "headwater/v1/worker.pb.h"
#include "model/model.h"
#include "worker/assignment.h"

namespace headwater::testing {

class AssignmentFixture {
 public:
  AssignmentFixture();

  const Model& model() const { return *model_; }
  // Worker "w<rank>" with a budget of 1 GiB.
  AssignmentContext context(int rank = 1) const;
  // A zigzag plan of `world` ranks, blocks of 16 tokens, f32; request "r1", epoch 3.
  v1::PrefillAssignment Make(int64_t tokens, int world, int rank) const;

 private:
  std::unique_ptr<Model> model_;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_ASSIGNMENTS_H_
