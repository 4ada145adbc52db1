"""Which attention heads look alike, for SharePrefill's sharing of patterns: python -m headwater.cluster --help.

A dense run over texts gives each head's block-average attention map (headwater.eval.maps). Maps are resized to a fixed size,
embedded and joined into a tree (.embed), which is cut where heads are alike: last rows near each other, and the pattern of
the first head holds gamma of the others' attention on the calibration texts. A cluster is shared where that pattern serves
the others on a held-out prompt too, and is sparse (.choose). The same model, texts and flags give the same file.

The file, which load() reads and checks:

    {"format": 1,
     "model": "NAME-DIGEST",       the directory's name, and 16 hex digits of SHA-256 over config.json and the weights
     "layers": 32, "heads": 32,    query heads of a layer
     "gamma": 0.9,                 mass that a pattern holds, a row
     "clusters": {"0": [[layer, head], ...], ...},      both from 0, ascending; a head is in one cluster at most
     "shared_clusters": ["0", ...],
     "calibration": {
       "texts": [names], "held_out": name, "tokens": of each prompt, "block_tokens": 128,
       "dims": of the embedding, "max_distance", "tolerance", "max_density": as the flags,
       "tests": {"0": {"pivot": [layer, head], "heads": of later layers than the pivot's, "recall_min" and "recall_mean" of
                       these, 1 without any, "density" of the pattern, "distance_p90" of the last rows,
                       "why": it is not shared, "" where it is}, ...}}}      clusters of one head are not tested

The pivot is the first head of a cluster. At run time heads of its own layer do not share with it.
"""

from headwater.cluster.file import Clusters as Clusters
from headwater.cluster.file import load as load

__all__ = ["Clusters", "load"]
