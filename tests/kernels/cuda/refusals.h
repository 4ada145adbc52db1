// Tests of what an operation refuses before it touches a device: they run without a GPU.
#ifndef HW_TESTS_KERNELS_CUDA_REFUSALS_H_
#define HW_TESTS_KERNELS_CUDA_REFUSALS_H_

#include <cstdint>
#include <functional>
#include <ostream>
#include <string>

#include "gtest/gtest.h"

#include "kernels/status.h"

namespace headwater::kernels {

// Never dereferenced.
inline void* const kAligned = reinterpret_cast<void*>(uintptr_t{1} << 20);
inline void* const kMisaligned = reinterpret_cast<void*>((uintptr_t{1} << 20) + 8);

struct Refusal {
  const char* name;
  std::function<Status()> call;
  StatusCode code;
  const char* says;
};

inline std::ostream& operator<<(std::ostream& out, const Refusal& refusal) { return out << refusal.name; }

class RefusalTest : public ::testing::TestWithParam<Refusal> {};

TEST_P(RefusalTest, NamesTheValue) {
  const Status status = GetParam().call();

  EXPECT_EQ(status.code(), GetParam().code) << status.message();
  EXPECT_NE(status.message().find(GetParam().says), std::string::npos) << status.message();
}

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_REFUSALS_H_
