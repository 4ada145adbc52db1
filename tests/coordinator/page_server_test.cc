// The live page's HTTP: what it answers, with which headers, and what slow or odd clients get.
#include "coordinator/page/page_server.h"

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <nlohmann/json.hpp>
#include <sys/socket.h>
#include <unistd.h>

#include "coordinator/coordinator_server.h"
#include "coordinator/flags.h"
#include "tests/support/http.h"

namespace headwater::testing {
namespace {

// One server for all tests. The source answers between the calls that a test
// makes, never beside them.
class PageServerTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto server = PageServer::Start("127.0.0.1:0", []() -> absl::StatusOr<Snapshot> {
      ++asked_;
      if (!error_.ok()) return error_;
      return Snapshot();
    });
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = server->release();
    address_ = server_->address();
  }
  static void TearDownTestSuite() { delete server_; }

  static inline std::atomic<int> asked_{0};
  static inline absl::Status error_;
  static inline PageServer* server_ = nullptr;
  static inline std::string address_;
};

TEST_F(PageServerTest, ServesThePageAndTheState) {
  const HttpResponse page = GetHttp(address_, "/");
  EXPECT_EQ(page.status, 200);
  EXPECT_EQ(page.headers.at("Content-Type"), "text/html; charset=utf-8");
  EXPECT_EQ(page.headers.at("Content-Length"), absl::StrCat(page.body.size()));
  EXPECT_TRUE(absl::StartsWith(page.body, "<!doctype html>"));
  EXPECT_TRUE(absl::EndsWith(page.body, "</html>\n"));
  // Style and scripts are in it, and nothing comes from elsewhere.
  EXPECT_FALSE(absl::StrContains(page.body, "/*page."));
  EXPECT_TRUE(absl::StrContains(page.body, "prefers-color-scheme"));
  EXPECT_TRUE(absl::StrContains(page.body, "fetch('state.json'"));
  EXPECT_FALSE(absl::StrContains(page.body, "https://"));
  EXPECT_FALSE(absl::StrContains(page.body, "innerHTML"));

  const HttpResponse state = GetHttp(address_, "/state.json?at=1");
  EXPECT_EQ(state.status, 200);
  EXPECT_EQ(state.headers.at("Content-Type"), "application/json; charset=utf-8");
  EXPECT_EQ(nlohmann::json::parse(state.body)["workers"]["total"], 0);
}

TEST_F(PageServerTest, EveryAnswerCarriesTheHeadersThatKeepItIn) {
  const std::string long_line(20'000, 'x');
  for (const HttpResponse& response :
       {GetHttp(address_, "/"), GetHttp(address_, "/state.json"), GetHttp(address_, "/nothing"),
        GetHttp(address_, "/", "POST"), GetHttp(address_, "/", "GET", "evil.example"),
        GetHttp(address_, "/" + long_line), AskHttp(address_, "nonsense\r\n\r\n")}) {
    ASSERT_NE(response.status, 0);
    EXPECT_EQ(response.headers.at("Cache-Control"), "no-store") << response.status;
    EXPECT_EQ(response.headers.at("X-Content-Type-Options"), "nosniff");
    EXPECT_EQ(response.headers.at("Referrer-Policy"), "no-referrer");
    EXPECT_EQ(response.headers.at("Cross-Origin-Resource-Policy"), "same-origin");
    const std::string& policy = response.headers.at("Content-Security-Policy");
    for (const char* part :
         {"default-src 'none'", "script-src 'sha256-", "style-src 'sha256-", "connect-src 'self'",
          "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"}) {
      EXPECT_TRUE(absl::StrContains(policy, part)) << policy;
    }
    EXPECT_FALSE(absl::StrContains(policy, "unsafe")) << policy;
    EXPECT_EQ(response.headers.count("Server"), 0u);
    EXPECT_EQ(response.headers.count("Access-Control-Allow-Origin"), 0u);
  }
}

TEST_F(PageServerTest, OnlyGetAndHeadOfTwoPathsAreAnswered) {
  for (const char* target : {"/", "/state.json"}) {
    const HttpResponse head = GetHttp(address_, target, "HEAD");
    EXPECT_EQ(head.status, 200);
    EXPECT_NE(head.headers.at("Content-Length"), "0");
    EXPECT_EQ(head.body, "");
    for (const char* method : {"POST", "PUT", "DELETE", "OPTIONS", "PATCH"}) {
      const HttpResponse response = GetHttp(address_, target, method);
      EXPECT_EQ(response.status, 405) << method;
      EXPECT_EQ(response.headers.at("Allow"), "GET, HEAD");
    }
  }
  for (const char* target : {"/index.html", "/metrics", "/state.json/", "//", "/..%2f..%2fetc/passwd"}) {
    EXPECT_EQ(GetHttp(address_, target).status, 404) << target;
  }
  for (const char* method : {"BREW", "CONNECT"})
    EXPECT_GE(GetHttp(address_, "/", method).status, 400) << method;
}

TEST_F(PageServerTest, HostsOfOtherNamesAreRefused) {
  for (const char* host : {"localhost", "LOCALHOST:9080", "127.0.0.1", "10.1.2.3:9080", "[::1]:9080"}) {
    EXPECT_EQ(GetHttp(address_, "/state.json", "GET", host).status, 200) << host;
  }
  for (const char* host : {"evil.example", "127.0.0.1.evil.example:9080", "localhost.evil.example", ""}) {
    const int status = GetHttp(address_, "/state.json", "GET", host).status;
    EXPECT_TRUE(status == 421 || status == 400) << host << " " << status;
  }
}

TEST_F(PageServerTest, OversizedRequestsAreRefused) {
  const std::string filler(20'000, 'x');
  for (const std::string& request :
       {absl::StrCat("GET /", filler, " HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        absl::StrCat("GET / HTTP/1.1\r\nHost: localhost\r\nX-Filler: ", filler, "\r\n\r\n")}) {
    const int status = AskHttp(address_, request).status;
    EXPECT_TRUE(status == 413 || status == 414 || status == 400 || status == 431) << status;
  }
  EXPECT_EQ(GetHttp(address_, "/").status, 200);
}

TEST_F(PageServerTest, AFailingSourceIs503) {
  absl::SleepFor(absl::Milliseconds(250));  // what was answered before is no longer fresh
  error_ = absl::UnavailableError("busy");
  EXPECT_EQ(GetHttp(address_, "/state.json").status, 503);
  EXPECT_EQ(GetHttp(address_, "/").status, 200);
  error_ = absl::OkStatus();
  EXPECT_EQ(GetHttp(address_, "/state.json").status, 200) << "an error is not kept";
}

TEST_F(PageServerTest, ManyViewersAreOneToTheSource) {
  const int before = asked_;
  for (int i = 0; i < 20; ++i) EXPECT_EQ(GetHttp(address_, "/state.json").status, 200);
  EXPECT_LT(asked_ - before, 20);
}

TEST_F(PageServerTest, SlowClientsAreDroppedAndOthersAnswered) {
  // More than there are threads: each sends half a request.
  std::vector<int> slow;
  for (int i = 0; i < 6; ++i) {
    slow.push_back(ConnectHttp(address_));
    ASSERT_GE(slow.back(), 0);
    ASSERT_EQ(send(slow.back(), "GET / HT", 8, MSG_NOSIGNAL), 8);
  }
  const absl::Time start = absl::Now();
  EXPECT_EQ(GetHttp(address_, "/").status, 200);
  EXPECT_LT(absl::Now() - start, absl::Seconds(8));
  for (const int fd : slow) {
    EXPECT_NE(ParseHttp(ReadAll(fd)).status, 200);
    close(fd);
  }
  EXPECT_LT(absl::Now() - start, absl::Seconds(9));
}

TEST(PageServerEndTest, AClientThatDoesNotReadHoldsNobodyUp) {
  // More than the sockets' buffers hold.
  Snapshot large;
  large.workers.resize(40'000);
  auto server = PageServer::Start("127.0.0.1:0", [&] { return large; });
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string address = (*server)->address();
  const auto ask = [&] {
    const int fd = ConnectHttp(address);
    const std::string request = "GET /state.json HTTP/1.1\r\nHost: localhost\r\n\r\n";
    EXPECT_EQ(send(fd, request.data(), request.size(), MSG_NOSIGNAL), static_cast<ssize_t>(request.size()));
    return fd;
  };
  // As many as there are threads.
  std::vector<int> deaf;
  for (int i = 0; i < 4; ++i) deaf.push_back(ask());
  absl::SleepFor(absl::Milliseconds(300));
  absl::Time start = absl::Now();
  EXPECT_EQ(GetHttp(address, "/").status, 200);
  EXPECT_LT(absl::Now() - start, absl::Seconds(8));
  // Nor does one hold up the server's end.
  deaf.push_back(ask());
  absl::SleepFor(absl::Milliseconds(300));
  start = absl::Now();
  server->reset();
  EXPECT_LT(absl::Now() - start, absl::Seconds(8));
  for (const int fd : deaf) close(fd);
}

TEST(PageServerAddressTest, EmptyIsOff) {
  const auto server = PageServer::Start("", [] { return Snapshot(); });
  ASSERT_TRUE(server.ok());
  EXPECT_EQ((*server)->address(), "");
}

TEST(PageServerAddressTest, OddAddressesAreRefused) {
  for (const char* address :
       {"9080", "127.0.0.1", "127.0.0.1:", ":9080", "127.0.0.1:9080s", "127.0.0.1:9080,9081", "host:9080"}) {
    const auto server = PageServer::Start(address, [] { return Snapshot(); });
    EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument) << address;
  }
}

TEST(PageServerAddressTest, ATakenPortIsNamed) {
  const auto first = PageServer::Start("127.0.0.1:0", [] { return Snapshot(); });
  ASSERT_TRUE(first.ok());
  const auto second = PageServer::Start((*first)->address(), [] { return Snapshot(); });
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(absl::StrContains(second.status().message(), (*first)->address())) << second.status();
}

TEST(PageOfCoordinatorTest, IsOffUnlessAskedFor) {
  CoordinatorFlags flags;
  std::string help;
  ASSERT_TRUE(ParseCoordinatorFlags({}, &flags, &help).ok());
  EXPECT_EQ(flags.page, "");
  const auto without = CoordinatorServer::Start({}, {"127.0.0.1:0", "", "", nullptr});
  ASSERT_TRUE(without.ok()) << without.status();
  EXPECT_EQ((*without)->page_address(), "");

  const auto with = CoordinatorServer::Start({}, {"127.0.0.1:0", "", "", nullptr, "127.0.0.1:0"});
  ASSERT_TRUE(with.ok()) << with.status();
  const HttpResponse state = GetHttp((*with)->page_address(), "/state.json");
  EXPECT_EQ(state.status, 200);
  EXPECT_EQ(nlohmann::json::parse(state.body)["draining"], false);
  (*with)->BeginDrain();
  absl::SleepFor(absl::Milliseconds(250));
  EXPECT_EQ(nlohmann::json::parse(GetHttp((*with)->page_address(), "/state.json").body)["draining"], true);
  (*with)->Stop(absl::ZeroDuration());
}

}  // namespace
}  // namespace headwater::testing
