"""How sparsely each head of a model may attend, for the policy `headwater`: python -m headwater.calibrate --help.

Every KV head of every layer stands on a rung of a ladder, from sinks and a window alone to dense attention. Rungs are those of
.search.CANDIDATES that no other beats in density and in loss, all heads together. All start on the lowest rung that keeps the
model's answers within the error budget of dense attention's. Each is then tried one rung down, the others where they are, and
those that save most for the budget that they spend go down, until none can. What is measured is the model's
own loss on calibration texts and retrieval prompts; no threshold is set by hand. The same model, texts and flags on
the same kind of GPU give the same file.

The file, which load() reads and checks:

    {"format": 1,
     "model": "NAME-DIGEST",        as in headwater.cluster
     "layers": 32, "kv_heads": 8,
     "thresholds": [[...] ...],     [layers][KV heads]: over 0 and at most 1 a threshold, 0 dense, over 1 not searched
     "windows": [[...] ...],        likewise: last blocks of 128 keys that a tile always attends to
     "calibration": {"tokens", "budget", "sets": {NAME: {"dense": nats a token, "loss": in excess of it}}, "density",
                     "passes", "whole": whether no head could go lower, "texts": [names]}}
"""

from headwater.calibrate.file import Calibration as Calibration
from headwater.calibrate.file import load as load

__all__ = ["Calibration", "load"]
