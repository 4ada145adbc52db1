// Command line of headwater-decode.
#ifndef HW_DECODE_OPTIONS_H_
#define HW_DECODE_OPTIONS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

#include "base/config/config.h"
#include "base/rpc/transport.h"

namespace headwater {

// Default of --kv_budget with --sink=verify; checksums of a cache of kMaxBlocks blocks take half of it.
inline constexpr uint64_t kVerifyBudgetBytes = uint64_t{1} << 30;

// What the flags say; decode/options.cc has each one's meaning.
struct DecodeOptions {
  std::string coordinator = "127.0.0.1:7070";
  std::string decode_node = "decode-0";
  std::string pool = "default";
  std::string listen = "127.0.0.1:7080";
  std::string advertise;
  std::string advertise_kv;
  std::string metrics = "127.0.0.1:9080";
  std::string health;  // empty: none
  std::string model;
  std::string compute = "auto";
  int64_t threads = 0;
  std::string sink = "memory";
  std::string kv_dir;
  uint64_t kv_budget_bytes = 0;  // 0: DefaultKvBudget(), or kVerifyBudgetBytes with --sink=verify
  absl::Duration kv_lease = absl::Minutes(5);
  int64_t max_generations = 64;
  std::string log_format = "text";
  absl::Duration drain_timeout = absl::Seconds(45);
  TransportOptions transport;
  ConfigSummary config;
};

// Reads the arguments after the program's name, and what --config and the environment give. INVALID_ARGUMENT
// names the flag or where else the value is from, the value and what is allowed. On --help, `help` is set and
// nothing else is checked; on --print_config it is set, too. Fills in defaults that depend on other flags
// (kv_dir).
absl::Status ParseDecodeOptions(absl::Span<const std::string> arguments, DecodeOptions* options,
                                std::string* help);

// A quarter of the available memory or of the free space of `directory`'s file system, whichever is less.
// NOT_FOUND, UNAVAILABLE: the system does not tell.
absl::Status DefaultKvBudget(const std::string& directory, uint64_t* bytes);

}  // namespace headwater

#endif  // HW_DECODE_OPTIONS_H_
