#include "base/rpc/roles.h"

#include <algorithm>
#include <fstream>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

constexpr size_t kMostBytes = 1 << 20;

// The first error, counted from 1 as editors do.
class FirstError final : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, int column, const std::string& message) override {
    if (text.empty()) text = absl::StrCat("line ", line + 1, ", column ", column + 1, ": ", message);
  }
  std::string text;
};

bool Matches(absl::string_view pattern, absl::string_view text) {
  if (absl::ConsumePrefix(&pattern, "*")) return absl::EndsWith(text, pattern);
  if (absl::ConsumeSuffix(&pattern, "*")) return absl::StartsWith(text, pattern);
  return pattern == text;
}

template <typename Patterns>
bool AnyMatches(const Patterns& patterns, absl::string_view text) {
  return std::any_of(patterns.begin(), patterns.end(),
                     [text](const std::string& pattern) { return Matches(pattern, text); });
}

template <typename Patterns>
absl::Status CheckPatterns(const v1::RoleRule& rule, const char* field, const Patterns& patterns) {
  const auto wrong = [&](absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("rule \"", rule.name(), "\": ", field, what));
  };
  if (patterns.empty()) return wrong(": at least one is wanted");
  for (const std::string& pattern : patterns) {
    if (pattern.empty()) return wrong(": an empty one");
    const size_t star = pattern.find('*');
    const bool at_an_end = star == std::string::npos || pattern.rfind('*') == star;
    if (!at_an_end || (star != std::string::npos && star != 0 && star + 1 != pattern.size())) {
      return wrong(absl::StrCat(" \"", pattern, "\": one '*' at the beginning or the end at most"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::InvalidArgumentError("it cannot be read");
  std::string text(kMostBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad() || (!file && !file.eof())) return absl::InvalidArgumentError("it cannot be read");
  const auto bytes = static_cast<size_t>(file.gcount());
  if (bytes > kMostBytes) {
    return absl::InvalidArgumentError(absl::StrCat("it has more bytes than the limit of ", kMostBytes));
  }
  text.resize(bytes);
  return text;
}

class File final : public RolesFile {
 public:
  File(std::string path, absl::Duration refresh, std::string text, Roles roles)
      : path_(std::move(path)),
        refresh_(refresh),
        text_(std::move(text)),
        roles_(std::make_shared<const Roles>(std::move(roles))),
        looked_(SteadyNow()) {}

  bool Allows(absl::string_view spiffe_id, absl::string_view method) override {
    std::shared_ptr<const Roles> roles;
    {
      const absl::MutexLock lock(&mutex_);
      if (!path_.empty() && SteadyNow() - looked_ >= refresh_) Look();
      roles = roles_;
    }
    return roles->Allows(spiffe_id, method);
  }

 private:
  void Look() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    looked_ = SteadyNow();
    absl::StatusOr<std::string> text = ReadFile(path_);
    if (text.ok() && *text == text_) return;
    absl::StatusOr<Roles> roles = text.ok() ? Roles::Parse(*text) : text.status();
    if (roles.ok()) {
      roles_ = std::make_shared<const Roles>(*std::move(roles));
      HW_LOG(INFO).Field("file", path_) << "roles were read again";
    } else {
      HW_LOG(ERROR).Field("file", path_) << "roles stay as they were: " << roles.status().message();
    }
    if (text.ok()) text_ = *std::move(text);
  }

  const std::string path_;
  const absl::Duration refresh_;
  absl::Mutex mutex_;
  std::string text_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<const Roles> roles_ ABSL_GUARDED_BY(mutex_);
  absl::Time looked_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

Roles::Roles(v1::RolePolicy policy) : policy_(std::move(policy)) {}

absl::StatusOr<Roles> Roles::Parse(const std::string& text) {
  google::protobuf::TextFormat::Parser parser;
  FirstError error;
  parser.RecordErrorsTo(&error);
  v1::RolePolicy policy;
  if (!parser.ParseFromString(text, &policy)) return absl::InvalidArgumentError(error.text);
  if (policy.rules().empty())
    return absl::InvalidArgumentError("it has no rules: nobody could call anything");
  for (const v1::RoleRule& rule : policy.rules()) {
    HW_RETURN_IF_ERROR(CheckPatterns(rule, "principals", rule.principals()));
    HW_RETURN_IF_ERROR(CheckPatterns(rule, "methods", rule.methods()));
  }
  return Roles(std::move(policy));
}

bool Roles::Allows(absl::string_view spiffe_id, absl::string_view method) const {
  return std::any_of(policy_.rules().begin(), policy_.rules().end(), [&](const v1::RoleRule& rule) {
    return AnyMatches(rule.principals(), spiffe_id) && AnyMatches(rule.methods(), method);
  });
}

absl::StatusOr<std::unique_ptr<RolesFile>> RolesFile::Open(const std::string& path, absl::Duration refresh) {
  absl::StatusOr<std::string> text = path.empty() ? DefaultRoles() : ReadFile(path);
  absl::StatusOr<Roles> roles = text.ok() ? Roles::Parse(*text) : text.status();
  if (!roles.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("--roles=", path, ": ", roles.status().message()));
  }
  return std::unique_ptr<RolesFile>(
      std::make_unique<File>(path, refresh, *std::move(text), *std::move(roles)));
}

std::string DefaultRoles() {
  return R"(# Who may call what. The last part of a certificate's SPIFFE id is its role.
rules {
  name: "clients prefill and read tokens"
  principals: "*/client"
  principals: "*/admin"
  methods: "/headwater.v1.PrefillService/*"
  methods: "/headwater.v1.DecodeService/*"
}
rules {
  name: "admins administer"
  principals: "*/admin"
  methods: "/headwater.v1.AdminService/*"
}
rules {
  name: "workers register, form groups and send KV"
  principals: "*/worker"
  methods: "/headwater.v1.WorkerControlService/*"
  methods: "/headwater.v1.RendezvousService/*"
  methods: "/headwater.v1.KvTransferService/PushBlocks"
}
rules {
  name: "decode nodes register"
  principals: "*/decode"
  methods: "/headwater.v1.DecodeRegistryService/*"
}
rules {
  name: "the coordinator opens and ends sessions"
  principals: "*/coordinator"
  methods: "/headwater.v1.KvTransferService/OpenSession"
  methods: "/headwater.v1.KvTransferService/CommitSession"
  methods: "/headwater.v1.KvTransferService/AbortSession"
}
rules {
  name: "anybody asks for health"
  principals: "*"
  methods: "/grpc.health.v1.Health/*"
}
)";
}

}  // namespace headwater
