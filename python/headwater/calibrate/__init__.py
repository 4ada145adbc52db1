"""How sparsely each head of a model may attend, for the policy `headwater`: python -m headwater.calibrate --help.

Every KV head of every layer has a threshold and a window of its own, or is dense. All start alike; in rounds each head's other
settings are tried in the company of the others' present ones, and where the model's own loss rises least for the density that is
saved the setting changes, as far as the error budget goes. What is measured is the loss on calibration texts and the answers to
retrieval prompts, all of the length that is to be served: at half of it nothing shows of what 131,072 tokens lose in answers
(longctx-36m, UUIDs). What is kept is judged on more windows. The density is that of the texts and of given prompts: those made
here only ask, nobody serves them. No threshold is set by hand. The same model, texts and flags on the same kind of GPU give the
same file.

Texts that the model was trained on mislead: it knows them by heart and needs little of what is far (longctx-36m, 131,072 tokens,
one setting for all heads: +0.0013 nats a token on novels of its training, +0.016 on a novel and +0.024 on code that it has not
seen).

The file, which load() reads and checks:

    {"format": 1,
     "model": "NAME-DIGEST",        as in headwater.cluster
     "layers": 32, "kv_heads": 8,
     "thresholds": [[...] ...],     [layers][KV heads]: over 0 and at most 1 a threshold, 0 dense, over 1 not searched
     "windows": [[...] ...],        likewise: last blocks of 128 keys that a tile always attends to
     "calibration": {"tokens": [lengths], "budget", "answer_budget", "density", "passes", "texts": [names],
                     "whole": false where --limit_s or --max_passes ended it,
                     "sets": {NAME: {"dense": NLL, "loss": in excess of it; of answers, KL divergence}}}}
"""

from headwater.calibrate.file import Calibration as Calibration
from headwater.calibrate.file import load as load

__all__ = ["Calibration", "load"]
