// KV streams over mutual TLS: who gets blocks, and who gets nothing.
#include "gtest/gtest.h"

#include "tests/kvtransfer/kv_fixture.h"
#include "tests/support/certificates.h"

namespace headwater {
namespace {

using testing::CertificateAuthority;
using testing::IdentityFiles;

std::shared_ptr<const Transport> Make(const TransportOptions& options) {
  auto made = Transport::Create(options);
  EXPECT_TRUE(made.ok()) << made.status();
  return made.ok() ? *made : nullptr;
}

class KvTlsTest : public ::testing::Test {
 protected:
  // Sends a cache from a worker of ours to a receiver with this transport. Returns how the stream ended.
  absl::Status Send(const Transport* receiving, bool worker_has_tls = true) {
    TempDir directory;
    KvStoreOptions store_options;
    store_options.directory = directory.path();
    store_options.budget_bytes = 1 << 30;
    auto store = KvStore::Open(store_options);
    EXPECT_TRUE(store.ok()) << store.status();
    Metrics metrics("test");
    const auto service = MakeKvReceiver(store->get(), &metrics);
    auto server = StartServer("127.0.0.1:0", {service.get()}, receiving);
    EXPECT_TRUE(server.ok()) << server.status();
    EXPECT_TRUE((*store)->OpenSession(MakeOpen(geometry_.layout())).ok());
    KvSenderOptions options = MakeSenderOptions(server->address);
    options.stall_timeout = absl::Seconds(2);
    if (worker_has_tls) options.transport = worker_;
    absl::Status end;
    {
      auto sender = KvSender::Create(options, geometry_);
      for (uint64_t i = 0; i < geometry_.num_blocks() && end.ok(); ++i) {
        end = sender->Submit(geometry_.BlockAt(i), bytes_.Block(i), [] {});
      }
      if (end.ok()) end = sender->Finish();
      acked_ = sender->Stats().bytes_acked;
    }
    stored_ = metrics
                  .Counter("headwater_kv_ingress_bytes_total",
                           "KV payload bytes stored, or verified and dropped (--sink=verify).")
                  .Value();
    return end;
  }

  const KvGeometry geometry_ = MakeGeometry(MakeLayout(2, 2, 16, 300, 64));
  const CacheBytes bytes_{geometry_, 1};
  const CertificateAuthority authority_{"ours"}, other_{"theirs"};
  const IdentityFiles worker_files_{authority_, "worker"};
  const std::shared_ptr<const Transport> worker_ = Make(worker_files_.options());
  uint64_t acked_ = 0;
  double stored_ = 0;
};

TEST_F(KvTlsTest, ADecodeNodeOfOursGetsAll) {
  const IdentityFiles files(authority_, "decode");
  const absl::Status end = Send(Make(files.options()).get());
  EXPECT_TRUE(end.ok()) << end;
  EXPECT_EQ(acked_, geometry_.total_bytes());
  EXPECT_EQ(stored_, static_cast<double>(geometry_.total_bytes()));
}

TEST_F(KvTlsTest, OthersGetNothing) {
  const IdentityFiles wrong_role(authority_, "client"), wrong_authority(other_, "decode");
  // One whose certificate ends while it is in use.
  IdentityFiles ending(authority_, "decode");
  const absl::Time end_of_validity = absl::Now() + absl::Seconds(2);
  ending.Rewrite(
      authority_.Issue({testing::SpiffeId("decode")}, absl::Now() - absl::Hours(2), end_of_validity),
      authority_.pem());
  const auto late = Make(ending.options());
  absl::SleepFor(end_of_validity + absl::Seconds(1.5) - absl::Now());
  TransportOptions believing = wrong_authority.options();  // it would take our certificate
  believing.ca = worker_files_.directory() + "/now/ca.crt";
  const std::pair<const char*, std::shared_ptr<const Transport>> receivers[] = {
      {"wrong role", Make(wrong_role.options())},
      {"wrong authority", Make(wrong_authority.options())},
      {"wrong authority that believes ours", Make(believing)},
      {"expired", late},
      {"plaintext", nullptr},
  };
  for (const auto& [name, transport] : receivers) {
    SCOPED_TRACE(name);
    const absl::Status end = Send(transport.get());
    EXPECT_EQ(end.code(), absl::StatusCode::kUnavailable) << end;
    EXPECT_EQ(acked_, 0u);
    EXPECT_EQ(stored_, 0);
  }
  const IdentityFiles files(authority_, "decode");
  EXPECT_EQ(Send(Make(files.options()).get(), false).code(), absl::StatusCode::kUnavailable)
      << "a worker in plaintext";
  EXPECT_EQ(stored_, 0);
}

}  // namespace
}  // namespace headwater
