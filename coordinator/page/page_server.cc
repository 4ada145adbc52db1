#include "coordinator/page/page_server.h"

#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include <openssl/sha.h>

#include "base/clock.h"
#include "base/http_server.h"
#include "base/status_macros.h"
#include "coordinator/page/page_files.h"
#include "coordinator/page/snapshot_json.h"

namespace headwater {
namespace {

constexpr absl::Duration kFresh = absl::Milliseconds(200);

// 'sha256-...' of an inline style or script.
std::string HashSource(const std::string& text) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest);
  return absl::StrCat(
      "'sha256-",
      absl::Base64Escape(absl::string_view(reinterpret_cast<const char*>(digest), sizeof(digest))), "'");
}

// Whether the request names an address or "localhost".
bool IsHost(absl::string_view header) {
  const absl::string_view host = HttpHostOf(header);
  return IsHttpAddress(host) || absl::EqualsIgnoreCase(host, "localhost");
}

class Page final : public PageServer {
 public:
  explicit Page(Source source) : source_(std::move(source)) {}

  absl::Status Listen(const std::string& address) {
    const std::string script = absl::StrCat(kPagePartsJs, kPageJs);
    html_ = absl::StrReplaceAll(kPageHtml, {{"/*page.css*/", kPageCss}, {"/*page.js*/", script}});
    const std::string headers = absl::StrCat(
        "Content-Security-Policy: default-src 'none'; style-src ", HashSource(kPageCss), "; script-src ",
        HashSource(script),
        "; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n"
        "Cross-Origin-Resource-Policy: same-origin\r\nReferrer-Policy: no-referrer\r\n"
        "X-Content-Type-Options: nosniff\r\n");
    HW_ASSIGN_OR_RETURN(
        server_, HttpServer::Start(address, {.what = "page",
                                             .headers = headers,
                                             .handler = [this](const HttpRequest& r) { return Answer(r); }}));
    return absl::OkStatus();
  }

  const std::string& address() const override { return server_->address(); }

 private:
  HttpAnswer Answer(const HttpRequest& request) {
    if (!IsHost(request.host)) return {.status = 421};
    if (request.path == "/") return {.type = "text/html", .body = html_};
    if (request.path != "/state.json") return {.status = 404};
    const std::shared_ptr<const std::string> state = State();
    if (state == nullptr) return {.status = 503};
    return {.type = "application/json", .body = *state};
  }

  // Null: the source failed.
  std::shared_ptr<const std::string> State() {
    absl::MutexLock lock(&mutex_);
    const absl::Time now = Clock::Real()->Now();
    if (state_ != nullptr && now >= state_at_ && now - state_at_ < kFresh) return state_;
    state_ = nullptr;
    const absl::StatusOr<Snapshot> snapshot = source_();
    if (snapshot.ok()) state_ = std::make_shared<const std::string>(SnapshotJson(*snapshot));
    state_at_ = now;
    return state_;
  }

  const Source source_;
  std::string html_;
  absl::Mutex mutex_;
  std::shared_ptr<const std::string> state_ ABSL_GUARDED_BY(mutex_);
  absl::Time state_at_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<HttpServer> server_;  // goes first: its threads ask for the state
};

}  // namespace

absl::StatusOr<std::unique_ptr<PageServer>> PageServer::Start(const std::string& address, Source source) {
  auto page = std::make_unique<Page>(std::move(source));
  HW_RETURN_IF_ERROR(page->Listen(address));
  return page;
}

}  // namespace headwater
