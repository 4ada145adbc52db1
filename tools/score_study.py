#!/usr/bin/env python3
"""How well scores of a tile's key blocks choose, beside the blocks' true mass: docs/policies.md, "How good the scores are".

    score_study.py MODEL_DIR --text emma.txt --tokens 32768 --layers 1,3,5,6,8

On Q, K and V of dense prefill, tiles and lists as policy headwater has them: 128 rows, one list a KV head, sinks and a window
always listed, one threshold a KV head. For each way to score: the density that a recall of --recall takes, the recall and the
relative error of the output at --densities, block means standing for what is not listed. Memory: tiles * blocks * heads.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tools")]

import torch  # noqa: E402

from headwater.eval import texts  # noqa: E402
from headwater.eval.cli import load_tokenizer  # noqa: E402
from headwater.eval.model import EvalModel, find_model  # noqa: E402
from policy_masks import BLOCK_KEYS, Layer, capture, shape_of  # noqa: E402


class Head:
    """One KV head of a layer with its query heads."""

    def __init__(self, layer: Layer, head: int, group: int, device: str):
        if BLOCK_KEYS % group or len(layer.q) % BLOCK_KEYS:
            raise ValueError(f"{group} query heads a KV head, {len(layer.q)} tokens; a divisor and a multiple of {BLOCK_KEYS} are "
                             f"wanted")
        self.q = layer.q[:, head * group:(head + 1) * group].to(device).float()
        self.k, self.v = layer.k[:, head].to(device).float(), layer.v[:, head].to(device).float()
        blocks = self.k.view(-1, BLOCK_KEYS, self.k.shape[1])
        self.k_mean, self.k_variance = blocks.mean(1), blocks.var(1, unbiased=False)
        self.v_mean = self.v.view_as(blocks).mean(1)
        self.positions, self.scale = BLOCK_KEYS // group, self.q.shape[2] ** -0.5
        self.tiles, self.blocks = len(self.q) // self.positions, len(self.k_mean)
        first = torch.arange(self.tiles, device=device)[:, None] * self.positions
        self.block = torch.arange(self.blocks, device=device)
        self.visible, self.complete = self.block <= first // BLOCK_KEYS, self.block < (first + 1) // BLOCK_KEYS

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, heads, keys], causal."""
        found = torch.einsum("rgd,kd->rgk", self.q[rows], self.k) * self.scale
        hidden = torch.arange(len(self.k), device=rows.device) > rows[:, None]
        return found.masked_fill_(hidden[:, None], -math.inf)

    def of_tiles(self, rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Means over each tile's rows and heads of shares [rows, heads, blocks]."""
        return scores.view(-1, self.positions, scores.shape[1], self.blocks).mean(dim=(1, 2))

    def scores(self) -> Dict[str, torch.Tensor]:
        """[tiles, blocks] each; of blocks that the whole tile sees, but for `exact`."""
        parts: Dict[str, List[torch.Tensor]] = {}
        for tiles in torch.arange(self.tiles, device=self.q.device).split(8):
            rows = (tiles[:, None] * self.positions + torch.arange(self.positions, device=tiles.device)).flatten()
            shares = self.logits(rows).softmax(-1).view(len(rows), -1, self.blocks, BLOCK_KEYS).sum(-1)
            parts.setdefault("exact", []).append(self.of_tiles(rows, shares))
            seen = self.complete[tiles].repeat_interleave(self.positions, 0)[:, None]
            means = torch.einsum("rgd,bd->rgb", self.q[rows], self.k_mean) * self.scale
            spread = torch.einsum("rgd,bd->rgb", self.q[rows] ** 2, self.k_variance) * (0.5 * self.scale ** 2)
            for name, logits in (("every query", means), ("every query, keys' variance", means + spread)):
                shares = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)
                parts.setdefault(name, []).append(self.of_tiles(rows, shares))
            probe = self.q[rows].view(len(tiles), self.positions, *self.q.shape[1:]).mean(1)
            logits = torch.einsum("tgd,bd->tgb", probe, self.k_mean) * self.scale
            best = logits.masked_fill(~self.complete[tiles][:, None], -math.inf).softmax(-1).nan_to_num(0).amax(1)
            parts.setdefault("mean query (headwater)", []).append(best / best.amax(1, keepdim=True).clamp(min=1e-30))
        found = {name: torch.cat(each) for name, each in parts.items()}
        values = self.v.view(self.blocks, BLOCK_KEYS, -1)
        weights = {"values' norm": values.norm(dim=2).mean(1),
                   "values' spread": (values - self.v_mean[:, None]).norm(dim=2).mean(1)}
        for name in ("exact", "mean query (headwater)"):
            found.update({f"{name} x {what}": found[name] * weight for what, weight in weights.items()})
        return found

    def order(self, score: torch.Tensor, always: torch.Tensor) -> torch.Tensor:
        """Entries of [tiles, blocks], best first: what is always listed, then by score."""
        return score.masked_fill(always, math.inf).masked_fill(~self.visible, -1).flatten().argsort(descending=True)

    def error(self, listed: torch.Tensor, rows: torch.Tensor) -> float:
        """Of the rows' output, relative, under lists [tiles, blocks] and means of the complete blocks that they leave out."""
        tile, logits = rows // self.positions, self.logits(rows)
        exact = logits.softmax(-1) @ self.v
        keys = listed[tile].repeat_interleave(BLOCK_KEYS, 1)[:, None]
        means = torch.einsum("rgd,bd->rgb", self.q[rows], self.k_mean) * self.scale + math.log(BLOCK_KEYS)
        means = means.masked_fill((listed | ~self.complete)[tile][:, None], -math.inf)
        both = torch.cat([logits.masked_fill(~keys, -math.inf), means], -1).softmax(-1)
        return float((both @ torch.cat([self.v, self.v_mean]) - exact).norm() / exact.norm())


def study(head: Head, a: argparse.Namespace, found: Dict[str, List[List[float]]]) -> None:
    """Adds a row of figures to each way of scoring."""
    own = torch.arange(head.tiles, device=head.q.device)[:, None] * head.positions // BLOCK_KEYS
    always = head.visible & ((head.block < a.sink_blocks) | (head.block > own - a.window_blocks))
    rows = torch.linspace(len(head.q) // 16, len(head.q) - 1, a.rows, device=head.q.device).long()
    possible, scores = int(head.visible.sum()), head.scores()
    for name, score in scores.items():
        order = head.order(score, always)
        held = scores["exact"].flatten()[order].double().cumsum(0) / head.tiles
        needed = max(int((held < a.recall).sum()) + 1, int(always.sum()))
        figures = [needed / possible]
        for density in a.densities:
            count = max(int(density * possible), int(always.sum()))
            listed = torch.zeros(head.tiles * head.blocks, dtype=torch.bool, device=order.device)
            listed[order[:count]] = True
            figures += [float(held[count - 1]), head.error(listed.view(head.tiles, head.blocks), rows)]
        found.setdefault(name, []).append(figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="or its name under HW_MODELS")
    add("--text", required=True, metavar="FILE", help="or a name, as python -m headwater.eval takes")
    add("--tokens", type=int, default=32768, help="a multiple of 1024")
    add("--layers", type=lambda text: [int(part) for part in text.split(",")], default=[1, 3, 5, 6, 8], metavar="N,N,...")
    add("--recall", type=float, default=0.95)
    add("--densities", type=float, nargs="+", default=[0.08, 0.15])
    add("--sink_blocks", type=int, default=2)
    add("--window_blocks", type=int, default=4)
    add("--rows", type=int, default=96, help="of each head, whose output is compared")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    try:
        path = find_model(a.model)
        tokenizer = load_tokenizer(path)
        prefix, ids = tokenizer.encode("").ids, tokenizer.encode(texts.read_text(a.text)[1], add_special_tokens=False).ids
        if a.tokens % 1024 or not 1024 <= a.tokens <= len(ids):
            raise ValueError(f"--tokens={a.tokens}; a multiple of 1024 up to the text's {len(ids)} is wanted")
        model = EvalModel.load(path, a.device, torch.bfloat16 if a.device.startswith("cuda") else torch.float32)
        shape, found = shape_of(model), {}
        with torch.no_grad():
            for layer in capture(model, texts.window(ids, len(ids), a.tokens, prefix), a.layers):
                for head in range(shape.kv_heads):
                    study(Head(layer, head, shape.group, a.device), a, found)
                print(f"layer {layer.number}", file=sys.stderr, flush=True)
    except (ValueError, OSError) as error:
        print(f"score_study: {error}", file=sys.stderr)
        return 2
    titles = [f"density for {a.recall:g}", *(f"{what} at {density:g}" for density in a.densities for what in ("recall", "error"))]
    print("| scores | " + " | ".join(titles) + " |\n|" + " --- |" * (len(titles) + 1))
    for name, rows in found.items():
        print(f"| {name} | " + " | ".join(f"{sum(column) / len(rows):.4f}" for column in zip(*rows)) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
