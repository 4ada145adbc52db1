// What holds of every HTTP server of ours; page_server_test has what slow and odd clients get.
#include "base/http_server.h"

#include <stdexcept>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"

#include "tests/support/http.h"

namespace headwater::testing {
namespace {

absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& address) {
  return HttpServer::Start(
      address,
      {.what = "test", .headers = "X-Ours: 1\r\n", .handler = [](const HttpRequest& request) -> HttpAnswer {
         if (request.path == "/throw") throw std::runtime_error("no");
         if (request.path == "/host") return {.body = std::string(request.host)};
         if (request.path == "/busy") return {.status = 503};
         return {.status = 404, .body = "nothing here\n"};
       }});
}

TEST(HttpServerTest, AnswersWhatItsHandlerSays) {
  const auto server = Start("127.0.0.1:0");
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string& address = (*server)->address();
  const HttpResponse host = GetHttp(address, "/host?x=1", "GET", "here:1");
  EXPECT_EQ(host.status, 200);
  EXPECT_EQ(host.body, "here:1");
  EXPECT_EQ(host.headers.at("X-Ours"), "1");
  EXPECT_EQ(host.headers.at("Content-Type"), "text/plain; charset=utf-8");
  EXPECT_EQ(GetHttp(address, "/busy").body, "Service Unavailable");
  EXPECT_EQ(GetHttp(address, "/nothing").body, "nothing here\n");
  EXPECT_EQ(GetHttp(address, "/throw").status, 500);
  EXPECT_EQ(GetHttp(address, "/throw").body, "Internal Server Error");
  // The length is that of the body which HEAD leaves out.
  const HttpResponse head = GetHttp(address, "/nothing", "HEAD");
  EXPECT_EQ(head.headers.at("Content-Length"), "13");
  EXPECT_EQ(head.body, "");
}

TEST(HttpServerTest, OtherMethodsAreRefusedWhereThereIsSomething) {
  const auto server = Start("127.0.0.1:0");
  ASSERT_TRUE(server.ok()) << server.status();
  for (const char* const method : {"POST", "PUT", "DELETE", "OPTIONS"}) {
    const HttpResponse refused = GetHttp((*server)->address(), "/host", method);
    EXPECT_EQ(refused.status, 405) << method;
    EXPECT_EQ(refused.headers.at("Allow"), "GET, HEAD") << method;
    EXPECT_EQ(GetHttp((*server)->address(), "/nothing", method).status, 404) << method;
  }
}

TEST(HttpServerTest, AddressesThatAreNone) {
  for (const char* const address :
       {"localhost:80", "127.0.0.1", "127.0.0.1:", ":80", "127.0.0.1:80s", "127.0.0.1:80,127.0.0.1:81"}) {
    const absl::Status status = Start(address).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << address;
    EXPECT_TRUE(absl::StrContains(status.message(), "is not ADDRESS:PORT")) << status;
  }
  for (const char* const address : {"127.0.0.1:65536", "127.0.0.1:99999999999"}) {
    EXPECT_EQ(Start(address).status(),
              absl::InvalidArgumentError(
                  absl::StrCat("test address ", address, ": its port is not one from 0 to 65535")));
  }
  const auto none = Start("");
  ASSERT_TRUE(none.ok());
  EXPECT_EQ((*none)->address(), "");
}

TEST(HttpServerTest, EndsSoonAndTakesNobodyAfterwards) {
  auto server = Start("127.0.0.1:0");
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string address = (*server)->address();
  EXPECT_EQ(GetHttp(address, "/host").status, 200);
  const absl::Time begin = absl::Now();
  server->reset();
  EXPECT_LE(absl::Now() - begin, absl::Seconds(1));
  EXPECT_EQ(ConnectHttp(address), -1);
}

}  // namespace
}  // namespace headwater::testing
