// Sender and receiver over loopback gRPC, with nothing going wrong.
#include <algorithm>
#include <random>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "tests/kvtransfer/kv_fixture.h"

namespace headwater {
namespace {

std::vector<uint64_t> ShuffledBlocks(const KvGeometry& geometry, uint32_t seed) {
  std::vector<uint64_t> blocks(geometry.num_blocks());
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937(seed));
  return blocks;
}

TEST(KvStream, DeliversRandomlyOrderedBlocksOfSeveralRanksAndChannels) {
  const KvGeometry geometry = MakeGeometry(MakeLayout(5, 2, 64, 1000, 64));
  const CacheBytes cache(geometry, 1);
  for (const int channels : {1, 2, 4}) {
    for (const int ranks : {1, 3}) {
      TestReceiver receiver;
      ASSERT_TRUE(receiver.store()->OpenSession(MakeOpen(geometry.layout())).ok());
      const std::vector<uint64_t> order = ShuffledBlocks(geometry, 17);
      DoneCounter done;
      std::vector<KvDigest> digests(static_cast<size_t>(ranks));
      std::vector<std::thread> threads;
      for (int rank = 0; rank < ranks; ++rank) {
        threads.emplace_back([&, rank] {
          KvSenderOptions options = MakeSenderOptions(receiver.address());
          options.num_channels = channels;
          options.rank = static_cast<uint32_t>(rank);
          const auto sender = KvSender::Create(options, geometry);
          for (size_t i = static_cast<size_t>(rank); i < order.size(); i += static_cast<size_t>(ranks)) {
            ASSERT_TRUE(
                sender->Submit(geometry.BlockAt(order[i]), cache.Block(order[i]), done.Callback()).ok());
          }
          const absl::Status finished = sender->Finish();
          EXPECT_TRUE(finished.ok()) << finished;
          EXPECT_EQ(sender->Stats().blocks_resent, 0u);
          EXPECT_EQ(sender->Stats().bytes_acked, sender->Stats().bytes_submitted);
          digests[static_cast<size_t>(rank)] = sender->Stats().digest;
        });
      }
      for (std::thread& thread : threads) thread.join();

      KvDigest digest;
      for (const KvDigest& share : digests) digest.Merge(share);
      EXPECT_EQ(digest, cache.Digest());
      EXPECT_EQ(done.count(), static_cast<int>(geometry.num_blocks()));
      const auto committed = receiver.store()->Commit(MakeCommit(geometry, digest));
      ASSERT_TRUE(committed.ok()) << committed.status();
      const auto kv = receiver.store()->Acquire(kSession);
      ASSERT_TRUE(kv.ok()) << kv.status();
      EXPECT_TRUE(cache.Equals(**kv));
      EXPECT_EQ(receiver.Blocks("stored"), static_cast<double>(geometry.num_blocks()));
    }
  }
}

}  // namespace
}  // namespace headwater
