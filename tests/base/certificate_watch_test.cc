#include "base/rpc/certificate_watch.h"

#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>

#include "absl/time/clock.h"
#include "gtest/gtest.h"

#include "base/log.h"
#include "tests/support/certificates.h"

namespace headwater {
namespace {

using ::headwater::testing::CertificateAuthority;
using ::headwater::testing::IdentityFiles;
using ::headwater::testing::Issued;
using ::headwater::testing::SpiffeId;

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

bool Eventually(const std::function<bool()>& condition) {
  const absl::Time end = absl::Now() + absl::Seconds(20);
  while (!condition() && absl::Now() < end) absl::SleepFor(absl::Milliseconds(10));
  return condition();
}

TEST(MemoryFileTest, WhoeverOpensItReadsWhatWasPutLast) {
  MemoryFile file;
  ASSERT_TRUE(file.Put("first", 1).ok());
  const std::string path = file.path();
  std::ifstream earlier(path);
  ASSERT_TRUE(file.Put(std::string(100'000, 'x'), 2).ok());
  EXPECT_EQ(file.path(), path);
  EXPECT_EQ(ReadAll(path), std::string(100'000, 'x'));
  std::string word;
  earlier >> word;
  EXPECT_EQ(word, "first") << "a reader does not see the file change";
}

class CertificateWatchTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const TransportOptions options = files_.options();
    auto started =
        CertificateWatch::Start({options.cert, options.key, options.ca}, "worker", absl::Milliseconds(50));
    ASSERT_TRUE(started.ok()) << started.status();
    watch_ = *std::move(started);
  }

  const CertificateAuthority authority_{"ours"};
  IdentityFiles files_{authority_, "worker"};
  std::shared_ptr<CertificateWatch> watch_;
};

TEST_F(CertificateWatchTest, ANewCertificateAndNewAuthoritiesAreTaken) {
  const std::string first = watch_->info().serial;
  EXPECT_FALSE(first.empty());
  const absl::Time end = absl::FromUnixSeconds(absl::ToUnixSeconds(absl::Now())) + absl::Hours(48);
  const Issued issued = authority_.Issue({SpiffeId("worker")}, absl::Now() - absl::Hours(1), end);
  const CertificateAuthority next("next");
  files_.Rewrite(issued, authority_.pem() + next.pem());
  ASSERT_TRUE(Eventually([&] { return watch_->info().not_after == end; }));
  EXPECT_EQ(watch_->info().spiffe_id, SpiffeId("worker"));
  EXPECT_EQ(ReadAll(watch_->identity_path()), issued.cert + "\n" + issued.key);
  EXPECT_EQ(ReadAll(watch_->ca_path()), authority_.pem() + next.pem());
  EXPECT_EQ(watch_->failures(), 0);
}

TEST_F(CertificateWatchTest, WhatCannotBeUsedIsCountedAndTheOldOneStays) {
  const Issued right = authority_.Issue({SpiffeId("worker")});
  const Issued other = authority_.Issue({SpiffeId("worker")});
  const absl::Time now = absl::Now();
  const struct {
    const char* name;
    Issued issued;
    std::string ca;
  } cases[] = {
      {"no certificate", {"no PEM", right.key}, authority_.pem()},
      {"half a certificate", {right.cert.substr(0, right.cert.size() / 2), right.key}, authority_.pem()},
      {"no key", {right.cert, ""}, authority_.pem()},
      {"another's key", {right.cert, other.key}, authority_.pem()},
      {"expired", authority_.Issue({SpiffeId("worker")}, now - absl::Hours(2), now - absl::Hours(1)),
       authority_.pem()},
      {"not yet valid", authority_.Issue({SpiffeId("worker")}, now + absl::Hours(1), now + absl::Hours(2)),
       authority_.pem()},
      {"another role", authority_.Issue({SpiffeId("decode")}), authority_.pem()},
      {"no authority", right, ""},
  };
  const absl::Time until = watch_->info().not_after;
  const std::string identity = ReadAll(watch_->identity_path()), ca = ReadAll(watch_->ca_path());
  const int64_t problems = NumLogProblems();
  for (const auto& c : cases) {
    SCOPED_TRACE(c.name);
    const int64_t before = watch_->failures();
    files_.Rewrite(c.issued, c.ca);
    EXPECT_TRUE(Eventually([&] { return watch_->failures() >= before + 2; }));
    EXPECT_EQ(watch_->info().not_after, until);
    EXPECT_EQ(ReadAll(watch_->identity_path()), identity);
    EXPECT_EQ(ReadAll(watch_->ca_path()), ca);
  }
  const int64_t before = watch_->failures();
  std::filesystem::remove(files_.directory() + "/now");
  EXPECT_TRUE(Eventually([&] { return watch_->failures() >= before + 2; })) << "gone";
  EXPECT_EQ(NumLogProblems(), problems + 1) << "one warning, until something is taken";

  files_.Rewrite(right, authority_.pem());
  EXPECT_TRUE(Eventually([&] { return ReadAll(watch_->identity_path()) == right.cert + "\n" + right.key; }));
}

// The files did not change: that it ends is what the metric says, and no failure to read.
TEST_F(CertificateWatchTest, ACertificateThatEndsInUseIsNoFailure) {
  const absl::Time end = absl::FromUnixSeconds(absl::ToUnixSeconds(absl::Now()) + 2);
  files_.Rewrite(authority_.Issue({SpiffeId("worker")}, end - absl::Hours(1), end), authority_.pem());
  ASSERT_TRUE(Eventually([&] { return watch_->info().not_after == end; }));
  absl::SleepFor(end + absl::Milliseconds(500) - absl::Now());
  EXPECT_EQ(watch_->failures(), 0);
  EXPECT_EQ(watch_->info().not_after, end);
}

}  // namespace
}  // namespace headwater
