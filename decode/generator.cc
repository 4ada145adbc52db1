#include "decode/generator.h"

#include <string>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "kernels/attention/attention.h"
#include "kernels/attention/block_index.h"
#include "kvtransfer/digest.h"

namespace headwater {
namespace {

absl::Status Mismatch(absl::string_view field, absl::string_view got, absl::string_view wanted) {
  return MakeError(absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_MODEL_MISMATCH,
                   absl::StrCat("the cache's ", field, " is ", got, ", the model's is ", wanted),
                   {{"field", std::string(field)}});
}

absl::Status FromKernels(const kernels::Status& status, int32_t layer) {
  if (status.ok()) return absl::OkStatus();
  const auto code = status.code() == kernels::StatusCode::kResourceExhausted
                        ? absl::StatusCode::kResourceExhausted
                        : absl::StatusCode::kInternal;
  return absl::Status(code, absl::StrCat("attention of layer ", layer, ": ", status.message()));
}

bool ToDType(v1::KvDtype wire, kernels::DType* dtype) {
  switch (wire) {
    case v1::KV_DTYPE_F32:
      *dtype = kernels::DType::kF32;
      return true;
    case v1::KV_DTYPE_F16:
      *dtype = kernels::DType::kF16;
      return true;
    case v1::KV_DTYPE_BF16:
      *dtype = kernels::DType::kBF16;
      return true;
    default:
      return false;
  }
}

absl::Status CheckCache(const Model& model, const CommittedKv& kv) {
  const ModelConfig& config = model.config();
  const v1::KvLayout& layout = kv.geometry().layout();
  const auto check = [](absl::string_view field, int64_t got, int64_t wanted) {
    return got == wanted ? absl::OkStatus() : Mismatch(field, absl::StrCat(got), absl::StrCat(wanted));
  };
  if (layout.model_fingerprint() != model.fingerprint()) {
    return Mismatch("model_fingerprint", layout.model_fingerprint(), model.fingerprint());
  }
  HW_RETURN_IF_ERROR(check("num_layers", layout.num_layers(), config.num_layers));
  HW_RETURN_IF_ERROR(check("num_kv_heads", layout.num_kv_heads(), config.num_kv_heads));
  HW_RETURN_IF_ERROR(check("head_dim", layout.head_dim(), config.head_dim));
  kernels::DType dtype = kernels::DType::kF32;
  if (!ToDType(layout.dtype(), &dtype))
    return Mismatch("dtype", absl::StrCat(layout.dtype()), "f32, f16 or bf16");
  const auto num_tokens = static_cast<int64_t>(layout.num_tokens());
  if (num_tokens > config.max_position) {
    return Mismatch("num_tokens", absl::StrCat(num_tokens), absl::StrCat("at most ", config.max_position));
  }
  if (kv.first_token() < 0 || kv.first_token() >= config.vocab_size) {
    return Mismatch("first_token", absl::StrCat(kv.first_token()),
                    absl::StrCat("below vocab_size ", config.vocab_size));
  }
  return absl::OkStatus();
}

uint32_t PromptCrc(const CommittedKv& kv) {
  return Crc32c(kv.prompt().data(), kv.prompt().size() * sizeof(int32_t));
}

}  // namespace

Sequence::Sequence(const CommittedKv& kv, const GeneratedKv::Shape& shape, GeneratedKvBudget* budget)
    : prompt_tokens_(static_cast<int64_t>(kv.geometry().layout().num_tokens())),
      prompt_crc_(PromptCrc(kv)),
      first_token_(kv.first_token()),
      last_token_(first_token_),
      generated_(shape, budget) {}

bool Sequence::Continues(const CommittedKv& kv) const {
  return static_cast<int64_t>(kv.geometry().layout().num_tokens()) == prompt_tokens_ &&
         kv.first_token() == first_token_ && PromptCrc(kv) == prompt_crc_;
}

absl::StatusOr<std::unique_ptr<Generator>> Generator::Create(const Model* model) {
  return absl::WrapUnique(new Generator(model));
}

Generator::Generator(const Model* model)
    : model_(model),
      shape_(model->attention_shape()),
      hidden_(static_cast<size_t>(model->config().hidden_size)),
      q_(static_cast<size_t>(shape_.num_q_heads) * static_cast<size_t>(shape_.head_dim) *
         kernels::SizeOf(model->compute())),
      attention_(static_cast<size_t>(shape_.num_q_heads) * static_cast<size_t>(shape_.head_dim)),
      lse_ln_(static_cast<size_t>(shape_.num_q_heads)),
      logits_(static_cast<size_t>(model->config().vocab_size)) {}

absl::StatusOr<std::unique_ptr<Sequence>> Generator::Begin(const CommittedKv& kv,
                                                           GeneratedKvBudget* budget) const {
  HW_RETURN_IF_ERROR(CheckCache(*model_, kv));
  const ModelConfig& config = model_->config();
  GeneratedKv::Shape shape;
  shape.num_layers = config.num_layers;
  shape.num_kv_heads = config.num_kv_heads;
  shape.head_dim = config.head_dim;
  shape.dtype = model_->compute();
  shape.max_tokens = config.max_position - static_cast<int64_t>(kv.geometry().layout().num_tokens());
  return absl::WrapUnique(new Sequence(kv, shape, budget));
}

absl::StatusOr<GeneratedToken> Generator::Next(const CommittedKv& kv, Sequence* sequence) {
  const int64_t max_position = model_->config().max_position;
  GeneratedToken next;
  next.position = sequence->prompt_tokens_ + sequence->tokens_given_;
  next.is_last_position = next.position + 1 >= max_position;
  if (sequence->tokens_given_ == 0) {
    next.token = sequence->last_token_;
    next.top2_logit_gap = kv.first_top2_gap();
    sequence->tokens_given_ = 1;
    return next;
  }
  if (next.position >= max_position) {
    return MakeError(
        absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_CONTEXT_FULL,
        absl::StrCat("position ", next.position, " is past the model's last, ", max_position - 1),
        {{"max_position", absl::StrCat(max_position)}});
  }
  HW_RETURN_IF_ERROR(Forward(kv, next.position - 1, sequence));
  const std::vector<TokenScore> best = TopTokens(logits_, 2);
  next.token = best[0].token;
  if (best.size() > 1) next.top2_logit_gap = best[0].logit - best[1].logit;
  sequence->last_token_ = next.token;
  ++sequence->tokens_given_;
  return next;
}

absl::Status Generator::Forward(const CommittedKv& kv, int64_t position, Sequence* sequence) {
  const int64_t row = position - sequence->prompt_tokens_;
  HW_RETURN_IF_ERROR(sequence->generated_.Reserve(row + 1));
  HW_RETURN_IF_ERROR(model_->Embed(absl::MakeConstSpan(&sequence->last_token_, 1), hidden_.data()));
  const uint64_t offset = static_cast<uint64_t>(row) * sequence->generated_.token_bytes();
  for (int32_t layer = 0; layer < model_->config().num_layers; ++layer) {
    char* k = static_cast<char*>(sequence->generated_.K(layer)) + offset;
    char* v = static_cast<char*>(sequence->generated_.V(layer)) + offset;
    HW_RETURN_IF_ERROR(model_->BeforeAttention(layer, hidden_.data(), 1, position, q_.data(), k, v));
    HW_RETURN_IF_ERROR(Attend(kv, layer, position, sequence));
    HW_RETURN_IF_ERROR(model_->AfterAttention(layer, attention_.data(), 1, hidden_.data()));
  }
  return model_->Logits(hidden_.data(), logits_.data());
}

absl::Status Generator::Attend(const CommittedKv& kv, int32_t layer, int64_t position, Sequence* sequence) {
  const kernels::QueryChunk query{q_.data(), model_->compute(), position, 1};
  const kernels::BlockIndex index = kernels::DenseBlockIndex(position / kernels::kQueryTileTokens, 1);
  const kernels::AttentionState state{attention_.data(), lse_ln_.data()};
  kernels::ResetAttentionState(shape_, 1, state);

  kernels::KeyChunk prompt;
  const auto kv_layer = static_cast<uint32_t>(layer);
  prompt.k = kv.Tensor(kv_layer, KvKind::kK);
  prompt.v = kv.Tensor(kv_layer, KvKind::kV);
  if (!ToDType(kv.geometry().layout().dtype(), &prompt.dtype)) {
    return absl::InternalError("the cache's dtype changed after it was checked");
  }
  prompt.num_tokens = sequence->prompt_tokens_;
  HW_RETURN_IF_ERROR(FromKernels(kernels::SparseAttention(shape_, query, prompt, index, state), layer));

  kernels::KeyChunk generated;
  generated.k = sequence->generated_.K(layer);
  generated.v = sequence->generated_.V(layer);
  generated.dtype = model_->compute();
  generated.begin = sequence->prompt_tokens_;
  generated.num_tokens = position + 1 - sequence->prompt_tokens_;
  return FromKernels(kernels::SparseAttention(shape_, query, generated, index, state), layer);
}

}  // namespace headwater
