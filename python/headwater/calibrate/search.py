"""The climb: which rung of the ladder each unit (a KV head, or a layer) stands on. Knows nothing of models."""

from dataclasses import dataclass, field
from typing import Callable, Dict, List, Sequence, Tuple

# (threshold, window in blocks of 128 keys): a threshold over 1 searches nothing, 0 is dense.
LADDER = ((2.0, 16), (0.2, 16), (0.2, 64), (0.05, 64), (0.02, 64), (0.02, 128), (0.005, 128), (0.0, 128))


@dataclass(frozen=True)
class Measured:
    """Of one choice of rungs."""

    loss: Dict[str, float]  # by set: nats a token in excess of dense attention
    density: float  # mean over layers and heads

    def excess(self, budgets: Dict[str, float]) -> float:
        """How far the sets are over their budgets, in budgets; 0: all hold."""
        return sum(max(0.0, loss / budgets[name] - 1) for name, loss in self.loss.items())


@dataclass
class Outcome:
    rungs: List[int]
    measured: Measured
    holds: bool  # the budget, within the passes that were allowed
    rounds: int = 0
    passes: int = 0
    history: List[Tuple[float, float]] = field(default_factory=list)  # (excess, density) after each round


def climb(units: int, measure: Callable[[Sequence[int]], Measured], budgets: Dict[str, float], *, top: int = len(LADDER) - 1,
          share: float = 0.1, most_passes: int = 10**9, say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Rungs for `units`, all starting at 0, until the excess of measure(rungs) is 0.

    A round tries every unit one rung up, in the company of the others' present rungs, and sends up those with the largest
    fall of excess for their rise of density: `share` of the units, one at least; of equal ones the first. Where no unit
    gains (what is left needs two of them at once), those go up that cost least. Ends at the top, too, and before a round
    that could pass most_passes.
    """
    rungs = [0] * units
    now = measure(rungs)
    out = Outcome(rungs, now, False, passes=1)
    while True:
        excess = now.excess(budgets)
        out.history.append((excess, now.density))
        out.measured, out.holds = now, excess == 0
        movable = [unit for unit in range(units) if rungs[unit] < top]
        say(f"round {out.rounds}: {excess:.2f} budgets over, density {now.density:.4f}, "
            + ", ".join(f"{name} {loss:+.4f}" for name, loss in now.loss.items()))
        if out.holds or not movable or out.passes + len(movable) + 1 > most_passes:
            return out
        tried = []
        for unit in movable:
            trial = measure([rung + (at == unit) for at, rung in enumerate(rungs)])
            gain, cost = excess - trial.excess(budgets), max(1e-6, trial.density - now.density)
            tried.append((gain / cost if gain > 0 else 0.0, -cost, unit))
        count = max(1, round(share * units))
        best = sorted(tried, key=lambda one: (-one[0], -one[1], one[2]))
        gaining = [one for one in best if one[0] > 0][:count]
        for _, _, unit in gaining or best[:count]:
            rungs[unit] += 1
        now = measure(rungs)
        out.rounds += 1
        out.passes += len(movable) + 1
