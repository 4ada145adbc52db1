// Sender and a receiver that checks blocks and drops them, over loopback gRPC.
#include <cstdio>
#include <string>

#include <gtest/gtest.h>
#include <unistd.h>

#include "base/rpc/grpc_status.h"
#include "tests/kvtransfer/kv_fixture.h"

namespace headwater {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kMemoryTells = false;  // sanitizers keep what is freed, or copies of it
#else
constexpr bool kMemoryTells = true;
#endif

uint64_t ResidentBytes() {
  FILE* const file = fopen("/proc/self/statm", "r");
  unsigned long pages = 0, resident = 0;
  EXPECT_TRUE(file != nullptr && fscanf(file, "%lu %lu", &pages, &resident) == 2);
  if (file != nullptr) fclose(file);
  return resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

TEST(KvVerifyStream, ALargeCacheIsCheckedAndNoneOfItKept) {
  // All blocks have the same bytes, so that the cache is nowhere in memory.
  const KvGeometry geometry = MakeGeometry(MakeLayout(8, 8, 128, 16384, 1024));
  ASSERT_EQ(geometry.total_bytes(), 512u << 20);
  const std::string payload(geometry.BytesOf(geometry.BlockAt(0)), 'k');
  const uint32_t crc = Crc32c(payload.data(), payload.size());
  TestReceiver receiver(/*budget_bytes=*/64 << 10, KvSink::kVerify);
  ASSERT_TRUE(receiver.store()->OpenSession(MakeOpen(geometry.layout())).ok());
  KvSenderOptions options = MakeSenderOptions(receiver.address());
  options.num_channels = 4;
  const auto sender = KvSender::Create(options, geometry);
  const uint64_t before = ResidentBytes();

  KvDigest digest;
  for (uint64_t i = 0; i < geometry.num_blocks(); ++i) {
    digest.Add(i, payload.size(), crc);
    ASSERT_TRUE(sender->Submit(geometry.BlockAt(i), payload.data(), [] {}).ok());
  }
  const absl::Status finished = sender->Finish();

  ASSERT_TRUE(finished.ok()) << finished;
  const uint64_t after = ResidentBytes();
  if (kMemoryTells) {
    EXPECT_LT(after, before + geometry.total_bytes() / 4);
  }
  EXPECT_EQ(sender->Stats().digest, digest);
  const auto committed = receiver.store()->Commit(MakeCommit(geometry, digest));
  ASSERT_TRUE(committed.ok()) << committed.status();
  EXPECT_EQ(committed->blocks_verified(), geometry.num_blocks());
  EXPECT_EQ(receiver.Blocks("verified"), static_cast<double>(geometry.num_blocks()));
  EXPECT_EQ(receiver.Blocks("stored"), 0);
  EXPECT_EQ(receiver.metrics().Counter("headwater_kv_ingress_bytes_total", "").Value(),
            static_cast<double>(geometry.total_bytes()));
}

TEST(KvVerifyStream, AReceiverThatStartsAnewHasLostTheSession) {
  const KvGeometry geometry = MakeGeometry(MakeLayout(2, 2, 64, 1000, 64));
  const CacheBytes cache(geometry, 1);
  TestReceiver receiver(64 << 10, KvSink::kVerify);
  ASSERT_TRUE(receiver.store()->OpenSession(MakeOpen(geometry.layout())).ok());
  const auto sender = KvSender::Create(MakeSenderOptions(receiver.address()), geometry);
  DoneCounter done;
  for (uint64_t i = 0; i < 5; ++i) {
    ASSERT_TRUE(sender->Submit(geometry.BlockAt(i), cache.Block(i), done.Callback()).ok());
  }
  ASSERT_TRUE(done.WaitFor(5));

  receiver.Stop();
  receiver.Start();
  for (uint64_t i = 5; i < geometry.num_blocks(); ++i) {
    if (!sender->Submit(geometry.BlockAt(i), cache.Block(i), done.Callback()).ok()) break;
  }

  const absl::Status status = sender->Finish();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_DECODE_LOST) << status;
}

}  // namespace
}  // namespace headwater
