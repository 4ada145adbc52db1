// Good assignments for a golden model.
#ifndef HW_TESTS_WORKER_ASSIGNMENTS_H_
#define HW_TESTS_WORKER_ASSIGNMENTS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "headwater/v1/worker.pb.h"
#include "model/model.h"
#include "worker/assignment.h"
#include "worker/cpu_backend.h"

namespace headwater::testing {

class AssignmentFixture {
 public:
  AssignmentFixture();

  const Model& model() const { return *model_; }
  const std::shared_ptr<const Model>& shared_model() const { return model_; }
  // A backend that lives as long as this.
  CpuBackend* NewBackend(uint64_t budget_bytes = 1 << 30);
  // Worker "w<rank>", with a backend of its own.
  AssignmentContext context(int rank = 1, uint64_t budget_bytes = 1 << 30);
  // A zigzag plan of `world` ranks, blocks of 16 tokens, f32; request "r1", epoch 3.
  v1::PrefillAssignment Make(int64_t tokens, int world, int rank) const;

 private:
  std::shared_ptr<const Model> model_;
  std::vector<std::unique_ptr<CpuBackend>> backends_;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_ASSIGNMENTS_H_
