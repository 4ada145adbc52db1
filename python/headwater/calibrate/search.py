"""The descent: which rung of the ladder each unit (a KV head, or a layer) stands on. Knows nothing of models."""

import math
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Sequence, Tuple

# (threshold, window in blocks of 128 keys) that a ladder may have as rungs: a threshold over 1 searches nothing.
CANDIDATES = tuple((threshold, window) for threshold in (2.0, 0.2, 0.1, 0.05, 0.02, 0.005) for window in (4, 16, 64, 128))
DENSE = (0.0, 128)  # the last rung of every ladder


@dataclass(frozen=True)
class Measured:
    """Of one choice of rungs."""

    loss: Dict[str, float]  # by set: nats a token in excess of dense attention
    density: float  # mean over layers and heads

    def excess(self, budgets: Dict[str, float]) -> float:
        """How far the sets are over their budgets, in budgets; 0: all hold. Infinite where a loss is no number."""
        if not all(math.isfinite(loss) for loss in self.loss.values()):
            return math.inf
        return sum(max(0.0, loss / budgets[name] - 1) for name, loss in self.loss.items())

    def spent(self, budgets: Dict[str, float]) -> float:
        """The largest share of a budget that a set uses, 0 where sparse attention is as good as dense."""
        if not all(math.isfinite(loss) for loss in self.loss.values()):
            return math.inf
        return max(0.0, *(loss / budgets[name] for name, loss in self.loss.items()))


def front(measured: Sequence[Measured], budgets: Dict[str, float]) -> List[int]:
    """Numbers of what none of the others beats in both density and budget spent, the sparsest first."""
    found, least = [], math.inf
    for number in sorted(range(len(measured)), key=lambda i: (measured[i].density, measured[i].spent(budgets), i)):
        spent = measured[number].spent(budgets)
        if spent < least:
            found.append(number)
            least = spent
    return found


@dataclass
class Outcome:
    rungs: List[int]
    measured: Measured
    passes: int = 0
    whole: bool = True  # no unit could go lower; else most_passes ended it
    history: List[Tuple[float, float]] = field(default_factory=list)  # (share of the budget spent, density) after each round


def descend(units: int, measure: Callable[[Sequence[int]], Measured], budgets: Dict[str, float], *,
            rungs: Sequence[Measured], share: float = 0.2, most_passes: int = 10**9,
            say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Rungs for `units` under which every set holds its budget.

    rungs: what all units together measure on each rung of the ladder but the last, which is dense and always holds. Starts
    from the lowest that holds. A round tries each unit one
    rung down, in the company of the others' present rungs, unless what it was worth before keeps it from being chosen; those
    that stay within the budget are ranked by the density that they save for the budget that they spend, and the first `share`
    of the units go down together, half as many as long as that breaks the budget. A unit that breaks it alone stays. Every
    state that is kept holds, so the search may end at any time: it does before a round that could pass most_passes.
    """
    run = _Run(units, measure, budgets, rungs, say)
    while True:
        movable = [unit for unit in range(units) if run.out.rungs[unit] > 0 and unit not in run.stuck]
        if not movable:
            return run.out
        if run.out.passes + len(movable) + 8 > most_passes:
            run.out.whole = False
            return run.out
        run.round(movable, max(1, round(share * units)))


class _Run:
    """The state of a descent."""

    def __init__(self, units, measure, budgets, rungs, say):
        self._measure, self._budgets, self._say = measure, budgets, say
        self.stuck = set()
        self._worth: Dict[int, float] = {}  # by unit: density for budget that its next step took when last tried
        self.out = Outcome([len(rungs)] * units, Measured({name: 0.0 for name in budgets}, 1.0))
        for rung, found in enumerate(rungs):
            if found.excess(budgets) == 0:
                self._keep([rung] * units, found)
                break

    def _pass(self, rungs: Sequence[int]) -> Measured:
        self.out.passes += 1
        return self._measure(rungs)

    def _keep(self, rungs: Sequence[int], found: Measured) -> None:
        self.out.rungs, self.out.measured = list(rungs), found
        self.out.history.append((found.spent(self._budgets), found.density))

    def _lowered(self, chosen) -> List[int]:
        return [rung - (unit in chosen) for unit, rung in enumerate(self.out.rungs)]

    def round(self, movable: Sequence[int], most: int) -> None:
        ranked = self._best(movable, most)
        count = min(most, len(ranked))
        while count > 0:
            chosen = {unit for _, unit, _ in ranked[:count]}
            found = ranked[0][2] if count == 1 else self._pass(self._lowered(chosen))
            if found.excess(self._budgets) == 0:
                self._keep(self._lowered(chosen), found)
                for unit in chosen:  # what its next step is worth is not known
                    self._worth.pop(unit, None)
                self._say(f"{len(chosen)} down, {len(self.stuck)} stay: {text_of(found)}")
                return
            count //= 2

    def _best(self, movable: Sequence[int], most: int) -> List[Tuple[float, int, Measured]]:
        """Steps by what they are worth now, the `most` best of all first. A unit is tried anew only where what it was worth
        before would place it among those (lazy greedy)."""
        now, ranked = self.out.measured, []
        for unit in sorted(movable, key=lambda unit: self._worth.get(unit, -math.inf)):
            if len(ranked) >= most and ranked[most - 1][0] <= self._worth.get(unit, -math.inf):
                break
            trial = self._pass(self._lowered({unit}))
            if trial.excess(self._budgets) > 0:
                self.stuck.add(unit)
                continue
            cost = max(1e-3, trial.spent(self._budgets) - now.spent(self._budgets))
            self._worth[unit] = (trial.density - now.density) / cost
            ranked.append((self._worth[unit], unit, trial))
            ranked.sort(key=lambda one: one[:2])
        return ranked


def text_of(found: Measured) -> str:
    return f"density {found.density:.4f}, " + ", ".join(f"{name} {loss:+.4f}" for name, loss in found.loss.items())
