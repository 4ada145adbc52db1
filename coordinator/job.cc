#include "coordinator/job.h"

#include <algorithm>
#include <limits>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"
#include "coordinator/destination.h"

namespace headwater {
namespace {

constexpr size_t kMaxMessageBytes = 2048;
constexpr size_t kMaxPayloadBytes = 4096;
constexpr int kMaxPayloads = 8;
constexpr int64_t kMaxDurationSeconds = int64_t{1} << 32;

absl::Status Untrue(const Job& job, const std::string& what) {
  return MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_INTERNAL,
                   absl::StrCat("a worker's report for request ", job.key.request_id, " says ", what));
}

void AddSaturating(uint64_t value, uint64_t* sum) {
  *sum = value > std::numeric_limits<uint64_t>::max() - *sum ? std::numeric_limits<uint64_t>::max()
                                                             : *sum + value;
}

void AddKv(const KvSums& part, KvSums* sums) {
  sums->digest = AddDigests(sums->digest, part.digest);
  AddSaturating(part.bytes, &sums->bytes);
  AddSaturating(part.blocks, &sums->blocks);
}

// Of the layers that earlier epochs computed.
KvSums BaseOf(const Job& job) { return job.resume.has_value() ? job.resume->below : KvSums(); }

double Ratio(double part, double whole) { return whole > 0 ? part / whole : 0; }

absl::Duration ToDuration(const google::protobuf::Duration& duration) {
  if (duration.seconds() < 0 || duration.seconds() > kMaxDurationSeconds || duration.nanos() < 0 ||
      duration.nanos() > 999'999'999) {
    return absl::ZeroDuration();
  }
  return absl::Seconds(duration.seconds()) + absl::Nanoseconds(duration.nanos());
}

void KeepLonger(const google::protobuf::Duration& other, google::protobuf::Duration* out) {
  SetDuration(std::max(ToDuration(other), ToDuration(*out)), out);
}

void KeepSlowest(const v1::StageTimes& other, v1::StageTimes* out) {
  KeepLonger(other.linear(), out->mutable_linear());
  KeepLonger(other.attention(), out->mutable_attention());
  KeepLonger(other.exchange(), out->mutable_exchange());
  KeepLonger(other.egress_stall(), out->mutable_egress_stall());
  KeepLonger(other.egress_tail(), out->mutable_egress_tail());
}

// Sums in single precision may pass 1.
bool IsShare(double value) { return value >= 0 && value <= 1.001; }

absl::Status CheckAttention(const Job& job, const v1::AttentionReport& report) {
  constexpr size_t kMaxNote = 256;
  const uint64_t layers = job.model.num_layers(), heads = job.model.num_kv_heads();
  if (static_cast<uint64_t>(report.groups_size()) > layers * heads) {
    return Untrue(job, absl::StrCat("that attention has ", report.groups_size(), " groups; ", layers,
                                    " layers of ", heads, " KV heads have no more than ", layers * heads));
  }
  bool shares = IsShare(report.recall_mean()) && IsShare(report.recall_p1());
  for (const v1::AttentionGroup& group : report.groups()) {
    shares = shares && IsShare(group.density()) && IsShare(group.recall()) && IsShare(group.recall_p1()) &&
             IsShare(group.forced_density());
    if (group.layer() < layers && group.kv_head() < heads && group.note().size() <= kMaxNote) continue;
    return Untrue(job, absl::StrCat("that attention has layer ", group.layer(), " and KV head ",
                                    group.kv_head(), ", or a note of ", group.note().size(), " bytes"));
  }
  if (shares) return absl::OkStatus();
  return Untrue(job, "that a density or a recall is not a share from 0 to 1");
}

}  // namespace

absl::Status CheckCompletion(const Job& job, const v1::RankCompleted& completed) {
  if (completed.kv_digest_share().size() != kDigestBytes) {
    return Untrue(job, absl::StrCat("that its digest share has ", completed.kv_digest_share().size(),
                                    " bytes; ", kDigestBytes, " are wanted"));
  }
  const uint32_t vocab_size = job.model.vocab_size();
  if (completed.has_first_token() && completed.first_token() >= vocab_size) {
    return Untrue(job, absl::StrCat("that the first token is ", completed.first_token(),
                                    "; the vocabulary has ", vocab_size));
  }
  if (completed.top_logprobs_size() > static_cast<int>(job.request().top_logprobs())) {
    return Untrue(job, absl::StrCat("that there are ", completed.top_logprobs_size(), " candidates; ",
                                    job.request().top_logprobs(), " were asked for"));
  }
  for (const v1::TokenLogprob& candidate : completed.top_logprobs()) {
    if (candidate.token_id() >= vocab_size) {
      return Untrue(job, absl::StrCat("that a candidate is token ", candidate.token_id(),
                                      "; the vocabulary has ", vocab_size));
    }
  }
  return CheckAttention(job, completed.attention());
}

void BoundLayers(const Job& job, google::protobuf::RepeatedField<float>* densities,
                 google::protobuf::RepeatedField<float>* recalls) {
  const bool possible = densities->size() <= static_cast<int>(job.model.num_layers() - job.resume_layer()) &&
                        std::all_of(densities->begin(), densities->end(), IsShare);
  // Below 0: not measured.
  const bool measured = recalls->size() == densities->size() &&
                        std::all_of(recalls->begin(), recalls->end(), [](float x) { return x <= 1.001f; });
  if (!possible) densities->Clear();
  if (!possible || !measured) recalls->Clear();
}

std::string AddDigests(const std::string& a, const std::string& b) {
  std::string sum(kDigestBytes, '\0');
  unsigned carry = 0;
  for (size_t i = 0; i < kDigestBytes; ++i) {
    carry += static_cast<unsigned char>(a[i]);
    carry += static_cast<unsigned char>(b[i]);
    sum[i] = static_cast<char>(carry & 0xFF);
    carry >>= 8;
  }
  return sum;
}

absl::StatusOr<RankSums> SumRanks(const Job& job) {
  RankSums sums;
  sums.kv = BaseOf(job);
  std::optional<uint32_t> first_token;
  double computed = 0;
  double possible = 0;
  uint64_t resumes = 0;
  for (const Rank& rank : job.ranks) {
    const v1::RankCompleted& report = rank.completed;
    AddKv({report.kv_digest_share(), report.kv_bytes(), report.kv_blocks()}, &sums.kv);
    AddSaturating(report.kv_blocks_resent(), &sums.kv_blocks_resent);
    resumes += report.kv_stream_resumes();
    computed += static_cast<double>(report.pairs_computed());
    possible += static_cast<double>(report.pairs_possible());
    KeepSlowest(report.stages(), &sums.stages);
    AddSaturating(report.exchange_bytes(), &sums.exchange_bytes);
    AddSaturating(report.exchange_bytes_allgather(), &sums.exchange_bytes_allgather);
    // Ranks that share a prompt measure nothing: one that does is alone.
    if (report.has_attention()) sums.attention = report.attention();
    if (!report.has_first_token()) continue;
    if (first_token.has_value() && *first_token != report.first_token()) {
      return Untrue(job, absl::StrCat("that the first token is ", report.first_token(),
                                      "; another rank's says ", *first_token));
    }
    first_token = report.first_token();
    sums.top_logprobs = report.top_logprobs();
  }
  if (!first_token.has_value()) return Untrue(job, "no first token; the last rank's must");
  sums.first_token = *first_token;
  sums.kv_stream_resumes =
      static_cast<uint32_t>(std::min<uint64_t>(resumes, std::numeric_limits<uint32_t>::max()));
  sums.density = Ratio(computed, possible);
  sums.attention.set_policy(job.policy);
  sums.attention.set_density(sums.density);
  return sums;
}

namespace {

// Null: it has none of that layer.
const Checkpoint* FindCheckpoint(const Rank& rank, uint32_t layer) {
  const auto found = std::find_if(rank.checkpoints.begin(), rank.checkpoints.end(),
                                  [&](const Checkpoint& checkpoint) { return checkpoint.layer == layer; });
  return found == rank.checkpoints.end() ? nullptr : &*found;
}

// 0: none.
uint32_t HighestCommonLayer(const std::vector<Rank>& ranks) {
  uint32_t highest = 0;
  for (const Checkpoint& checkpoint : ranks.front().checkpoints) {
    const bool all = std::all_of(ranks.begin(), ranks.end(), [&](const Rank& rank) {
      return FindCheckpoint(rank, checkpoint.layer) != nullptr;
    });
    if (all) highest = std::max(highest, checkpoint.layer);
  }
  return highest;
}

}  // namespace

std::optional<Resume> NextResume(const Job& job) {
  const uint32_t layer = HighestCommonLayer(job.ranks);
  if (layer == 0) return std::nullopt;
  Resume next;
  next.point.set_layer(layer);
  next.point.set_epoch(job.epoch);
  next.point.set_world_size(job.plan.world_size());
  next.point.set_partition(job.plan.partition());
  next.point.set_block_tokens(job.plan.block_tokens());
  next.below = BaseOf(job);
  for (const Rank& rank : job.ranks) {
    next.holders.push_back({rank.worker_id, rank.connection});
    AddKv(FindCheckpoint(rank, layer)->below, &next.below);
  }
  return next;
}

namespace {

// Of the layers so far.
void SetAttention(const Job& job, double density, v1::AttentionReport* out) {
  for (const Rank& rank : job.ranks) {
    const bool completed = rank.state == Rank::State::kCompleted;
    const v1::AttentionReport& said = completed ? rank.completed.attention() : rank.progress.attention();
    if (said.has_recall_mean() && IsShare(said.recall_mean())) out->set_recall_mean(said.recall_mean());
  }
  out->set_policy(job.policy);
  out->set_density(density);
}

}  // namespace

v1::PrefillProgress MakeProgress(const Job& job, absl::Time now) {
  v1::PrefillProgress out;
  const uint32_t num_layers = job.model.num_layers();
  const uint32_t resume_layer = job.resume_layer();
  uint32_t layers_done = num_layers;
  uint64_t bytes_acked = BaseOf(job).bytes;
  double computed = 0;
  double possible = 0;
  for (const Rank& rank : job.ranks) {
    const bool completed = rank.state == Rank::State::kCompleted;
    if (!completed) layers_done = std::min(layers_done, rank.progress.layers_done());
    AddSaturating(completed ? rank.completed.kv_bytes() : rank.progress.bytes_acked(), &bytes_acked);
    computed +=
        static_cast<double>(completed ? rank.completed.pairs_computed() : rank.progress.pairs_computed());
    possible +=
        static_cast<double>(completed ? rank.completed.pairs_possible() : rank.progress.pairs_possible());
  }
  // A rank that has not reported yet says 0.
  layers_done = std::max(layers_done, resume_layer);
  const double elapsed = absl::ToDoubleSeconds(now - job.epoch_started_at);
  const double computed_layers = layers_done - resume_layer;
  const double done = Ratio(computed_layers, num_layers - resume_layer);
  out.set_request_id(job.key.request_id);
  out.set_epoch(job.epoch);
  out.set_layers_done(layers_done);
  out.set_num_layers(num_layers);
  out.set_tokens_per_second(
      Ratio(static_cast<double>(job.num_tokens()) * Ratio(computed_layers, num_layers), elapsed));
  out.set_density(Ratio(computed, possible));
  SetAttention(job, out.density(), out.mutable_attention());
  out.set_bytes_acked(bytes_acked);
  out.set_bytes_total(KvBytes(job.layout));
  if (done > 0) SetDuration(absl::Seconds(elapsed * (1 - done) / done), out.mutable_eta());
  return out;
}

absl::Status Bounded(const absl::Status& status) {
  absl::Status out(status.code(), status.message().substr(0, kMaxMessageBytes));
  int payloads = 0;
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    if (url.size() > kMaxPayloadBytes || payload.size() > kMaxPayloadBytes) return;
    if (++payloads <= kMaxPayloads) out.SetPayload(url, payload);
  });
  return out;
}

void SetDuration(absl::Duration duration, google::protobuf::Duration* out) {
  const int64_t nanos = absl::ToInt64Nanoseconds(std::max(duration, absl::ZeroDuration()));
  out->set_seconds(nanos / 1'000'000'000);
  out->set_nanos(static_cast<int32_t>(nanos % 1'000'000'000));
}

}  // namespace headwater
