#include "tests/decode/decode_fixture.h"

#include <cmath>
#include <random>

#include "base/log.h"
#include "kernels/dtype.h"
#include "kernels/ops/linear.h"
#include "kvtransfer/digest.h"
#include "tests/model/dense_forward.h"

namespace headwater::testing {
namespace {

constexpr char kToken[] = "token-of-the-tests";

template <typename T>
T ValueOrDie(absl::StatusOr<T> value) {
  if (!value.ok()) HW_LOG(ERROR) << value.status().ToString();
  HW_CHECK(value.ok());
  return *std::move(value);
}

kernels::DType ToDType(v1::KvDtype dtype) {
  return dtype == v1::KV_DTYPE_F32   ? kernels::DType::kF32
         : dtype == v1::KV_DTYPE_F16 ? kernels::DType::kF16
                                     : kernels::DType::kBF16;
}

}  // namespace

std::unique_ptr<Model> LoadModel(const std::string& directory, kernels::DType compute) {
  // These models are too small to share among threads.
  kernels::SetNumThreads(1);
  ModelOptions options;
  options.directory = directory;
  options.compute = compute;
  return ValueOrDie(Model::Load(options));
}

TinyModelFiles::TinyModelFiles(int64_t max_position, uint64_t seed) {
  TinyModel model;
  model.seed = seed;
  model.max_position = max_position;
  WriteTinyModel(model, directory_.path());
}

PrefilledPrompt Prefill(const Model& model, absl::Span<const int32_t> tokens) {
  DenseResult dense = ValueOrDie(ForwardDense(model, tokens));
  const std::vector<TokenScore> best = TopTokens(dense.logits, 2);
  PrefilledPrompt prompt;
  prompt.tokens.assign(tokens.begin(), tokens.end());
  prompt.k = std::move(dense.k);
  prompt.v = std::move(dense.v);
  prompt.first_token = best[0].token;
  prompt.first_top2_gap = best[0].logprob - best[1].logprob;
  return prompt;
}

std::vector<int32_t> RandomPrompt(const Model& model, int count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<int32_t> tokens;
  for (int i = 0; i < count; ++i) {
    tokens.push_back(static_cast<int32_t>(generator() % static_cast<uint32_t>(model.config().vocab_size)));
  }
  return tokens;
}

std::vector<ReferenceToken> ContinueFromScratch(const Model& model, const std::vector<int32_t>& prompt,
                                                int count) {
  std::vector<int32_t> text = prompt;
  std::vector<ReferenceToken> tokens;
  for (int i = 0; i < count; ++i) {
    const DenseResult dense = ValueOrDie(ForwardDense(model, text));
    const std::vector<TokenScore> best = TopTokens(dense.logits, 2);
    tokens.push_back({best[0].token, best[0].logit - best[1].logit});
    text.push_back(best[0].token);
  }
  return tokens;
}

StoreWithCaches::StoreWithCaches(const Model& model, const Clock* clock, uint64_t budget_bytes)
    : model_(model) {
  KvStoreOptions options;
  options.directory = directory_.path();
  options.budget_bytes = budget_bytes;
  options.model_fingerprint = model.fingerprint();
  options.clock = clock;
  store_ = ValueOrDie(KvStore::Open(options));
}

v1::CommitSessionRequest StoreWithCaches::Put(const std::string& session_id, const PrefilledPrompt& prompt,
                                              v1::KvDtype dtype) {
  const ModelConfig& config = model_.config();
  v1::OpenSessionRequest open;
  open.set_session_id(session_id);
  open.set_request_id("request-of-" + session_id);
  open.set_epoch(1);
  open.set_session_token(kToken);
  v1::KvLayout& layout = *open.mutable_layout();
  layout.set_num_layers(static_cast<uint32_t>(config.num_layers));
  layout.set_num_kv_heads(static_cast<uint32_t>(config.num_kv_heads));
  layout.set_head_dim(static_cast<uint32_t>(config.head_dim));
  layout.set_num_tokens(prompt.tokens.size());
  layout.set_block_tokens(64);
  layout.set_dtype(dtype);
  layout.set_model_fingerprint(model_.fingerprint());
  ValueOrDie(store_->OpenSession(open));

  const KvGeometry geometry = ValueOrDie(KvGeometry::Create(layout));
  KvDigest digest;
  for (uint64_t index = 0; index < geometry.num_blocks(); ++index) {
    const KvBlockId id = geometry.BlockAt(index);
    const auto& tensor = id.kind == KvKind::kK ? prompt.k[id.layer] : prompt.v[id.layer];
    const uint64_t row = layout.num_kv_heads() * layout.head_dim();
    std::string payload(geometry.BytesOf(id), '\0');
    kernels::Convert(tensor.data() + id.token_begin * row, kernels::DType::kF32, payload.data(),
                     ToDType(dtype), (id.token_end - id.token_begin) * row);
    v1::KvBlock block;
    block.set_epoch(1);
    block.set_layer(id.layer);
    block.set_kind(id.kind == KvKind::kK ? v1::KV_KIND_K : v1::KV_KIND_V);
    block.set_head_end(layout.num_kv_heads());
    block.set_token_begin(id.token_begin);
    block.set_token_end(id.token_end);
    block.set_crc32c(Crc32c(payload.data(), payload.size()));
    digest.Add(index, payload.size(), block.crc32c());
    uint64_t stored_index = 0;
    std::string error;
    HW_CHECK(store_->Put(session_id, block, {payload}, &stored_index, &error) == PutResult::kStored);
  }
  v1::CommitSessionRequest commit;
  commit.set_session_id(session_id);
  commit.set_session_token(kToken);
  commit.set_epoch(1);
  commit.set_kv_digest(digest.Bytes());
  commit.set_first_token(static_cast<uint32_t>(prompt.first_token));
  for (const int32_t token : prompt.tokens) commit.add_token_ids(static_cast<uint32_t>(token));
  for (const float logprob : {-0.5f, -0.5f - prompt.first_top2_gap}) {
    v1::TokenLogprob& candidate = *commit.add_top_logprobs();
    candidate.set_token_id(static_cast<uint32_t>(prompt.first_token));
    candidate.set_logprob(logprob);
  }
  return commit;
}

void StoreWithCaches::Add(const std::string& session_id, const PrefilledPrompt& prompt, v1::KvDtype dtype) {
  ValueOrDie(store_->Commit(Put(session_id, prompt, dtype)));
}

void StoreWithCaches::AddUncommitted(const std::string& session_id, const PrefilledPrompt& prompt,
                                     v1::KvDtype dtype) {
  Put(session_id, prompt, dtype);
}

}  // namespace headwater::testing
