#include "worker/cuda/cuda_sequences.h"

namespace headwater {

std::vector<CudaSequence> MakeSequences(absl::Span<const CudaPrefillPrompt> prompts, int64_t* num_tokens) {
  std::vector<CudaSequence> sequences;
  *num_tokens = 0;
  for (const CudaPrefillPrompt& prompt : prompts) {
    const auto count = static_cast<int64_t>(prompt.job->tokens.size());
    sequences.push_back({&prompt, *num_tokens, count, {}, {}});
    *num_tokens += count;
  }
  return sequences;
}

CudaPassInputs MakePassInputs(const std::vector<CudaSequence>& sequences) {
  CudaPassInputs inputs;
  inputs.cu_seqlens.push_back(0);
  for (const CudaSequence& sequence : sequences) {
    const std::vector<int32_t>& tokens = sequence.prompt->job->tokens;
    inputs.ids.insert(inputs.ids.end(), tokens.begin(), tokens.end());
    for (int32_t i = 0; i < sequence.num_tokens; ++i) inputs.positions.push_back(i);
    inputs.cu_seqlens.push_back(static_cast<int32_t>(sequence.first_row + sequence.num_tokens));
  }
  return inputs;
}

absl::Status StepSequences(CudaEgress* egress, std::vector<CudaSequence>* sequences) {
  absl::Status ended;
  bool alive = false;
  for (size_t i = 0; i < sequences->size(); ++i) {
    CudaSequence& sequence = (*sequences)[i];
    if (sequence.status.ok()) {
      sequence.status = sequence.prompt->control->Step();
      if (sequence.status.ok() && egress != nullptr) sequence.status = egress->item_status(i);
      if (!sequence.status.ok() && egress != nullptr) egress->Drop(i);
    }
    if (sequence.status.ok()) {
      alive = true;
    } else {
      ended = sequence.status;
    }
  }
  return alive ? absl::OkStatus() : ended;
}

}  // namespace headwater
