#include "tests/worker/gloo_group.h"

#include <thread>

#include "absl/strings/str_cat.h"
#include <signal.h>

#include "base/log.h"
#include "base/status_macros.h"

namespace headwater::testing {

GlooGroups::GlooGroups() : service_(MakeRendezvousService({})) {
  signal(SIGPIPE, SIG_IGN);
  auto server = StartServer("127.0.0.1:0", {service_.get()});
  HW_CHECK(server.ok());
  server_ = *std::move(server);
}

GlooGroups::~GlooGroups() { server_.server->Shutdown(std::chrono::system_clock::now()); }

absl::StatusOr<std::unique_ptr<Collectives>> GlooGroups::Join(const std::string& name, int rank, int world,
                                                              absl::Duration timeout,
                                                              absl::Duration connect_timeout) {
  GlooOptions options;
  options.rank = rank;
  options.world_size = world;
  options.group_name = name;
  options.connect_timeout = connect_timeout;
  options.timeout = timeout;
  HW_ASSIGN_OR_RETURN(std::unique_ptr<GlooCollectives> group, GlooCollectives::Create(options));
  const auto rendezvous = RendezvousClient::Dial(server_.address, nullptr);
  HW_RETURN_IF_ERROR(group->Connect(rendezvous.get()));
  return std::unique_ptr<Collectives>(std::move(group));
}

std::vector<std::unique_ptr<Collectives>> GlooGroups::Make(int world, absl::Duration timeout) {
  const std::string name = absl::StrCat("group", next_group_.fetch_add(1));
  std::vector<std::unique_ptr<Collectives>> group(static_cast<size_t>(world));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) {
    threads.emplace_back([&, rank] {
      auto endpoint = Join(name, rank, world, timeout);
      if (!endpoint.ok()) HW_LOG(ERROR) << "rank " << rank << ": " << endpoint.status().ToString();
      HW_CHECK(endpoint.ok());
      group[static_cast<size_t>(rank)] = *std::move(endpoint);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return group;
}

}  // namespace headwater::testing
