"""What a policy selects, drawn over what dense attention would look at: python -m headwater.patterns --help.

The model runs as in headwater.eval. For each layer and query head, from the layer's own Q and K under the policy: the
attention mass of each block of 128 x 128 (headwater.eval.maps), the blocks that hold a pair which the policy attended to,
the recall (mass of dense attention on attended keys, over all rows) and the density (attended over causal pairs).

patterns.json: {"format": 1, "model", "policy", "device", "dtype", "tokens", "block_tokens", "layers": [{"layer", "ran",
"density": that the policy states of what it computed, "heads": [{"head", "density", "recall" (mean over rows),
"recall_p1" (1st percentile)}, ...]}, ...]}
"""
