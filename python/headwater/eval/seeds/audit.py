"""Experiment 3: how alike heads' masks are (intersection over union of block sets), within a layer, across layers and over
prompts: what SharePrefill rests on.

Two masks a head: the blocks of each row of blocks that hold 0.9 of dense attention (block averages, largest first), and
policy flex's lists. Both are taken on dense attention's activations, so that no policy's error reaches the other layers.
"""

from typing import Any, Dict, Iterable, List, Mapping, Sequence, Tuple

import torch

from headwater.eval.attention import Stats
from headwater.eval.blocks import BLOCK_KEYS
from headwater.eval.maps import block_averages
from headwater.eval.prompts import TASKS, make_items
from headwater.eval.seeds.bench import Bench, Cell, CellError, Experiment, OnDense, Setting
from headwater.eval.seeds.report import table

MASS, FLEX = "mass", "flex"  # the masks' names
SHARE = 0.9  # of attention that a mask of MASS holds
ALIKE = 0.8
ROWS_AT_ONCE = 64


def top_blocks(averages: torch.Tensor, share: float) -> torch.Tensor:
    """bool as averages f32 [heads, blocks, blocks]: of each row the largest until they sum to at least `share` of it."""
    ordered, place = averages.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    keep = (before < share * averages.sum(dim=-1, keepdim=True)) & (ordered > 0)
    return torch.zeros_like(averages, dtype=torch.bool).scatter_(-1, place, keep)


def listed_blocks(stats: Stats, heads: int, tokens: int, device: torch.device) -> torch.Tensor:
    """bool [heads, blocks, blocks]: blocks of which the last row of a row of blocks attends to some key."""
    blocks = -(-tokens // BLOCK_KEYS)
    causal = torch.ones(blocks, blocks, dtype=torch.bool, device=device).tril()
    if stats.row_mask is None:
        return causal.expand(heads, -1, -1).clone()
    last = (torch.arange(1, blocks + 1, device=device) * BLOCK_KEYS).clamp(max=tokens) - 1
    found = []
    for rows in last.split(ROWS_AT_ONCE):
        mask = torch.nn.functional.pad(stats.row_mask(rows), (0, blocks * BLOCK_KEYS - tokens))
        found.append(mask.view(heads, len(rows), blocks, BLOCK_KEYS).any(dim=-1))
    return torch.cat(found, dim=1) & causal


def alike(masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union f32 [n, m] of bool [n, blocks, blocks] and [m, blocks, blocks]; 1 where both are empty."""
    both = torch.zeros(len(masks), len(others), device=masks.device)
    for row in range(masks.shape[1]):
        both += masks[:, row].float() @ others[:, row].float().T
    sizes = [mask.sum(dim=(1, 2)).float() for mask in (masks, others)]
    union = sizes[0][:, None] + sizes[1] - both
    return torch.where(union > 0, both / union.clamp(min=1), 1.0)


def without_forced(masks: torch.Tensor) -> torch.Tensor:
    """Without the first column of blocks and the diagonal, which every method lists and which flatter."""
    found = masks.clone()
    found[:, :, 0] = False
    found.diagonal(dim1=1, dim2=2).fill_(False)
    return found


def cells(bench: Bench) -> Iterable[Cell]:
    for length in bench.fitting([bench.args.audit_tokens]):
        yield Cell(f"{length} tokens", lambda: measure(bench, length))


def prompts(bench: Bench, length: int) -> List[Tuple[str, Sequence[int]]]:
    """(name, exactly `length` token ids) of text windows and of each kind of own retrieval prompt."""
    count = bench.args.audit_prompts
    tasks = [task for task in TASKS if task in bench.args.own][:count // 2]
    found = [(window.name, window.ids) for window in bench.text_prompts(length, count - len(tasks))]
    for task in tasks:  # made a little longer and cut, since their lengths vary
        item, = make_items(task, bench.tokenizer, length=length + 512, count=1, seed=bench.args.seed)
        if len(item.context_ids) >= length:
            found.append((f"own_{task}", item.context_ids[:length]))
    return found


def masks_of(bench: Bench, ids: Sequence[int]) -> Dict[str, torch.Tensor]:
    """bool [layers * heads, blocks, blocks] of each kind, on the CPU."""
    flex = bench.policy(bench.args.audit_policy)
    found: Dict[str, list] = {MASS: [], FLEX: []}

    def visit(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        found[MASS].append(top_blocks(block_averages(q, k), SHARE).cpu())
        _, stats = flex.attend(layer, q, k, v)
        found[FLEX].append(listed_blocks(stats, q.shape[1], len(k), q.device).cpu())

    bench.model.prefill(ids, OnDense(visit))
    return {kind: torch.cat(layers) for kind, layers in found.items()}


def measure(bench: Bench, length: int) -> dict:
    """Matrices of likeness of each prompt, and of each head's masks over prompts."""
    chosen = prompts(bench, length)
    taken: Dict[str, List[torch.Tensor]] = {MASS: [], FLEX: []}
    for number, (name, ids) in enumerate(chosen):
        if bench.late and number >= 2:
            bench.note(f"{length} tokens: {len(chosen) - number} of {len(chosen)} prompts left out, the time is over")
            chosen = chosen[:number]
            break
        bench.say(f"masks of {name} ({number + 1} of {len(chosen)})")
        for kind, masks in masks_of(bench, ids).items():
            taken[kind].append(masks)
    if len(chosen) < 2:
        raise CellError(f"{len(chosen)} prompt of {length} tokens; at least 2 are wanted")
    kinds = {}
    for kind, of_prompts in taken.items():
        masks = [mask.to(bench.model.device) for mask in of_prompts]
        causal = masks[0].shape[1] * (masks[0].shape[1] + 1) / 2
        over = [pair for i in range(len(masks)) for pair in ((i, j) for j in range(i))]
        kinds[kind] = {
            "density": [round(float(mask.sum() / (len(mask) * causal)), 5) for mask in masks],
            "heads": [rounded(alike(mask, mask)) for mask in masks],
            "heads_unforced": [rounded(alike(other, other)) for other in map(without_forced, masks)],
            "prompts": [rounded(same_head(masks[i], masks[j])) for i, j in over],
            "prompts_unforced": [rounded(same_head(without_forced(masks[i]), without_forced(masks[j]))) for i, j in over]}
    return {"tokens": length, "prompts": [name for name, _ in chosen], "kinds": kinds, "policy": bench.args.audit_policy,
            "heads": bench.setting.q_heads}


def same_head(masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Likeness f32 [n] of mask i to mask i of the others."""
    both, either = ((masks & others).sum(dim=(1, 2)), (masks | others).sum(dim=(1, 2)))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def rounded(values: torch.Tensor) -> list:
    return [[round(one, 4) for one in line] for line in values.tolist()] if values.dim() == 2 else \
        [round(one, 4) for one in values.tolist()]


def pairs(matrix: torch.Tensor, heads: int) -> Dict[str, torch.Tensor]:
    """Entries of pairs of different heads: of one layer, of two, and all."""
    layer = torch.arange(len(matrix)) // heads
    upper = torch.ones(matrix.shape, dtype=torch.bool).triu(1)
    near = layer[:, None] == layer
    return {"layer": matrix[upper & near], "layers": matrix[upper & ~near], "all": matrix[upper]}


def kept_over_prompts(matrices: List[torch.Tensor], heads: int) -> dict:
    """Whether pairs that are alike in one prompt are so in the others."""
    every = torch.stack([pairs(matrix, heads)["all"] for matrix in matrices])
    above = every > ALIKE
    spread = every - every.mean(dim=1, keepdim=True)
    norm = spread.norm(dim=1)
    related = [float(spread[i] @ spread[j] / (norm[i] * norm[j]).clamp(min=1e-12))
               for i in range(len(every)) for j in range(i)]
    return {"pairs_alike_in_some": float(above.any(dim=0).float().mean()),
            "pairs_alike_in_every": float(above.all(dim=0).float().mean()), "likeness_correlation": sum(related) / len(related)}


def rows(cells_by_name: Mapping[str, Any], setting: Setting) -> List[dict]:
    """value: mean likeness of pairs of one layer (set iou:layer), of two (iou:layers), of a head with itself over pairs of
    prompts (iou:prompts); alike: share of them above 0.8. *_unforced: without first column and diagonal."""
    found = []
    for cell in cells_by_name.values():
        for kind, of in cell["kinds"].items():
            policy = cell["policy"] if kind == FLEX else f"dense, {SHARE} of the mass"
            density = sum(of["density"]) / len(of["density"])
            both = {}
            for suffix in ("", "_unforced"):
                matrices = [torch.tensor(matrix) for matrix in of[f"heads{suffix}"]]
                parts = [pairs(matrix, setting.q_heads) for matrix in matrices]
                sets = {name: torch.cat([part[name] for part in parts]) for name in ("layer", "layers")}
                sets["prompts"] = torch.tensor(of[f"prompts{suffix}"]).flatten()
                for name, values in sets.items():
                    if values.numel():
                        both.setdefault(name, {}).update({f"value{suffix}": float(values.mean()),
                                                          f"alike{suffix}": float((values > ALIKE).float().mean()),
                                                          "samples": values.numel()})
                if not suffix:
                    kept = kept_over_prompts(matrices, setting.q_heads)
            for name, metrics in both.items():
                found.append({"params": {"model": setting.model, "tokens": cell["tokens"], "policy": policy,
                                         "set": f"iou:{name}"},
                              "metrics": {**metrics, "density": density, **(kept if name == "layers" else {})}})
    return found


NAMES = {"iou:layer": "two heads of a layer", "iou:layers": "heads of two layers", "iou:prompts": "a head on two prompts"}


def text(found: List[dict]) -> List[str]:
    lines = []
    for row in found:
        p, m = row["params"], row["metrics"]
        lines.append([p["tokens"], p["policy"], NAMES[p["set"]], m["samples"], m["value"], m["alike"], m["value_unforced"],
                      m["alike_unforced"], m["density"]])
    notes = [f"- {row['params']['policy']}, {row['params']['tokens']} tokens, all pairs of heads: above {ALIKE} in some prompt "
             f"{m['pairs_alike_in_some']:.4f} of them, in every prompt {m['pairs_alike_in_every']:.4f}; correlation of the "
             f"pairs' likeness between prompts {m['likeness_correlation']:.3f}"
             for row in found for m in [row["metrics"]] if "likeness_correlation" in m]
    return ["Intersection over union of the sets of 128-token blocks. Unforced: without the first column and the diagonal, "
            "which nearly every mask holds.", "",
            *table(("tokens", "masks", "of", "pairs", "mean", f"above {ALIKE}", "mean, unforced", f"above {ALIKE}, unforced",
                    "density"), lines), "", *notes]


def plot(found: List[dict], cells_by_name: Mapping[str, Any]):
    from matplotlib import pyplot

    if not cells_by_name:
        return None
    cell = next(iter(cells_by_name.values()))
    figure, axes = pyplot.subplots(2, 3, figsize=(16, 10), constrained_layout=True)
    for line, (kind, of) in zip(axes, cell["kinds"].items()):
        name = cell["policy"] if kind == FLEX else f"{SHARE} of dense mass"
        mean = torch.tensor(of["heads"]).mean(dim=0)
        stable = torch.tensor(of["prompts"])
        heads = cell["heads"]
        _draw_likeness(figure, line[0], mean, heads)
        line[0].set_title(f"{name}: pairs of heads, mean of prompts\n(upper half, red: over {ALIKE})", fontsize=10)
        _draw_stability(figure, line[1], stable.mean(dim=0).view(-1, heads))
        parts = [pairs(torch.tensor(matrix), heads) for matrix in of["heads"]]
        _draw_histogram(line[2], {"two heads of a layer": torch.cat([part["layer"] for part in parts]),
                                  "heads of two layers": torch.cat([part["layers"] for part in parts]),
                                  "a head on two prompts": stable.flatten()})
    return figure


def _draw_likeness(figure, axis, mean: torch.Tensor, heads: int) -> None:
    """Below the diagonal the likeness, above it red where that is over ALIKE."""
    image = axis.imshow(mean.masked_fill(torch.ones_like(mean, dtype=torch.bool).triu(1), torch.nan), cmap="viridis", vmin=0,
                        vmax=1, interpolation="nearest")
    red = torch.zeros(*mean.shape, 4)
    red[((mean > ALIKE).triu(1))] = torch.tensor([0.85, 0.1, 0.1, 1])
    axis.imshow(red, interpolation="nearest")
    for place in range(heads, len(mean), heads):
        axis.axhline(place - 0.5, color="grey", linewidth=0.4)
        axis.axvline(place - 0.5, color="grey", linewidth=0.4)
    ticks = range(0, len(mean), heads * max(1, len(mean) // heads // 16))
    for set_ticks in (axis.set_xticks, axis.set_yticks):
        set_ticks([tick + heads / 2 - 0.5 for tick in ticks], [tick // heads for tick in ticks], fontsize=8)
    axis.set_xlabel("layer, its heads side by side")
    figure.colorbar(image, ax=axis, shrink=0.8)


def _draw_stability(figure, axis, stable: torch.Tensor) -> None:
    image = axis.imshow(stable, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axis, shrink=0.8)
    for layer, head in (stable > ALIKE).nonzero().tolist():
        axis.add_patch(_box(head, layer))
    if stable.numel() <= 512:
        for layer, head in torch.ones_like(stable).nonzero().tolist():
            axis.text(head, layer, f"{stable[layer, head]:.2f}".removeprefix("0"), ha="center", va="center", fontsize=7,
                      color="white" if stable[layer, head] < 0.6 else "black")
    for set_ticks, count in ((axis.set_xticks, stable.shape[1]), (axis.set_yticks, len(stable))):
        set_ticks(range(0, count, -(-count // 32)))
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_title(f"a head's masks over pairs of prompts, mean (red: over {ALIKE})", fontsize=10)


def _box(x: float, y: float):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, edgecolor="red", linewidth=1)


def _draw_histogram(axis, parts: Dict[str, torch.Tensor]) -> None:
    for name, values in parts.items():
        if values.numel():
            share = float((values > ALIKE).float().mean())
            axis.hist(values.tolist(), bins=25, range=(0, 1), density=True, histtype="step", linewidth=1.6,
                      label=f"{name}: {100 * share:.1f} % above {ALIKE}")
    axis.axvline(ALIKE, color="red", linestyle="--", linewidth=1)
    axis.set_xlabel("intersection over union")
    axis.set_ylabel("density of pairs")
    axis.legend(fontsize=8, loc="upper left")
    axis.grid(alpha=0.3)


EXPERIMENT = Experiment(3, "Likeness of heads' masks and over prompts (SharePrefill)", cells, rows, text, plot)
