"""What a sparse attention policy costs in quality, and what it saves: python -m headwater.eval --help.

The model runs in torch through transformers with its attention replaced by a policy's (headwater.eval.policies); per
policy and prompt length are measured

- perplexity of the last tokens of windows of texts, the same tokens at every length
- retrieval: share of questions whose every answer token is the argmax, and the answers' mean negative log-likelihood
- recall: mass of dense attention on the keys that a row attended to, on sampled rows, from the layer's own Q and K
- error of attention's output on those rows, relative, in norm; density: share of the causal pairs that were computed
- time of attention and of the whole prefill

Differences are to policy "dense", on the same windows and questions, with bootstrap intervals. The prompt is prefilled by
the policy; what comes after it (the answer, and questions that share a context's cache) attends exactly.
"""
