"""The search: which setting (a threshold and a window) each unit, a KV head or a layer, attends by. Knows nothing of models."""

import math
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

Setting = Tuple[float, int]

THRESHOLDS = (2.0, 0.2, 0.1, 0.05, 0.02, 0.005)  # from sparse to dense; over 1: nothing is searched
WINDOWS = (4, 16, 64, 128)  # blocks of 128 keys
DENSE: Setting = (0.0, WINDOWS[-1])
FIRST = (*((threshold, window) for threshold in (2.0, 0.2, 0.05) for window in WINDOWS), (0.005, 16))
START: Setting = (0.05, 64)
LEAST_GAIN = 0.02  # of the density: a round that saves less is the last
HALVINGS = 8  # of the range of prices


def neighbours(setting: Setting) -> List[Setting]:
    """What differs from it by one step of the threshold or of the window. Dense is a step from the lowest threshold."""
    if setting[0] == 0:
        return [(THRESHOLDS[-1], WINDOWS[-1])]
    at, wide = THRESHOLDS.index(setting[0]), WINDOWS.index(setting[1])
    found = [(THRESHOLDS[i], setting[1]) for i in (at - 1, at + 1) if 0 <= i < len(THRESHOLDS)]
    found += [(setting[0], WINDOWS[i]) for i in (wide - 1, wide + 1) if 0 <= i < len(WINDOWS)]
    return found + ([DENSE] if at == len(THRESHOLDS) - 1 else [])


@dataclass(frozen=True)
class Measured:
    """Of one choice of settings."""

    loss: Dict[str, float]  # by set: what the budget is for
    density: float  # mean over layers and heads

    def spent(self, budgets: Dict[str, float]) -> float:
        """The largest share of a budget that a set uses; infinite where a loss is no number."""
        if not all(math.isfinite(loss) for loss in self.loss.values()):
            return math.inf
        return max(0.0, *(loss / budgets[name] for name, loss in self.loss.items()))


class OutOfTime(Exception):
    """Raised by what measures: the search ends with what it has."""


@dataclass
class Outcome:
    settings: List[Setting]
    measured: Measured
    passes: int
    whole: bool  # a further round would save little; else most_passes ended it
    history: List[Tuple[float, float]]  # (share of the budget spent, density) after each round


def search(units: int, rank: Callable[[Sequence[Setting]], Measured], judge: Callable[[Sequence[Setting]], Measured],
           budgets: Dict[str, float], *, start: Optional[Sequence[Setting]] = None, most_passes: int = 10**9,
           say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Settings for `units` under which every set of `judge` holds its budget, at a density as low as is found.

    A round ranks: it measures by `rank`, whose sets are the judge's, what each option of each unit changes, the others where
    they are: the neighbours of each unit's setting. The first round stands on `start`; without it on START, and its options are
    all of FIRST. At a price for what is lost every unit takes the option that costs least, density and loss together. The lowest
    price whose choice holds, by bisection, with each choice judged, and as many units of the next lower price's choice as hold
    give the state that the next round stands on. Sets that spend more of their budgets weigh more in the next round. Dense
    attention, which loses nothing, is the answer where nothing holds. Passes are calls of rank and of judge.
    """
    run = _Run(rank, judge, budgets)
    run.best = _State([DENSE] * units, Measured({name: 0.0 for name in budgets}, 1.0))
    history, whole = [], False
    try:
        now = run.judged(start or [START] * units)
        run.keep(now)
        origin = "what was given" if start else f"threshold {START[0]:g}, window {START[1]}"
        say(f"{units} units, from {origin}: {text_of(now.measured)}")
        while not whole:
            first = FIRST if not start and not history else None
            options = [[one for one in first or neighbours(setting) if one != setting] for setting in now.settings]
            if run.passes + 1 + sum(map(len, options)) + HALVINGS + units.bit_length() > most_passes:
                break
            before = run.best.measured.density
            now = run.round(now, options)
            history.append((now.measured.spent(budgets), now.measured.density))
            holds = history[-1][0] <= 1
            say(f"round {len(history)}, {run.passes} passes: {text_of(now.measured)}{'' if holds else ': over the budget'}")
            if holds:
                whole = now.measured.density > (1 - LEAST_GAIN) * before
            else:
                whole = len(history) > 1 and history[-1][0] >= history[-2][0]  # comes no nearer
    except OutOfTime:
        pass
    return Outcome(run.best.settings, run.best.measured, run.passes, whole, history)


@dataclass
class _State:
    settings: List[Setting]
    measured: Measured  # by the judge


class _Run:
    best: _State  # of those that hold

    def __init__(self, rank, judge, budgets):
        self._rank, self._judge, self._budgets = rank, judge, budgets
        self._weights = {name: 1.0 / len(budgets) for name in budgets}
        self.passes = 0

    def judged(self, settings: Sequence[Setting]) -> _State:
        self.passes += 1
        return _State(list(settings), self._judge(settings))

    def keep(self, state: _State) -> bool:
        """Whether it holds; the best of those is kept."""
        holds = state.measured.spent(self._budgets) <= 1
        if holds and state.measured.density < self.best.measured.density:
            self.best = state
        return holds

    def round(self, now: _State, options: Sequence[Sequence[Setting]]) -> _State:
        """The best state that holds, of those that prices lead to and what was known; else the one that spends least."""
        changes = self._changes(now, options)
        low, high, least = math.log(1e-4), math.log(1e4), now
        holds = now.settings if now.measured.spent(self._budgets) <= 1 else None
        breaks = None
        for _ in range(HALVINGS):
            price = (low + high) / 2
            chosen = [min(some, key=lambda one: one[0] + math.exp(price) * one[1])[2] for some in changes]
            state = self.judged(chosen)
            if self.keep(state):
                high, holds = price, chosen
            else:
                low, breaks = price, chosen
            least = min(least, state, key=lambda one: one.measured.spent(self._budgets))
        if breaks and holds:
            self._part_way(holds, breaks)
        state = self.best if self.best.measured.density < 1 else least
        shares = {name: max(0.1, loss / self._budgets[name]) for name, loss in state.measured.loss.items()}
        self._weights = {name: share / sum(shares.values()) for name, share in shares.items()}
        return state

    def _changes(self, now: _State, options: Sequence[Sequence[Setting]]) -> List[List[Tuple[float, float, Setting]]]:
        """For each unit: (density, loss in budgets by weight, setting) of staying and of each option."""
        def ranked(settings: Sequence[Setting]) -> Measured:
            self.passes += 1
            return self._rank(settings)

        base = ranked(now.settings)
        changes = [[(0.0, 0.0, setting)] for setting in now.settings]
        for unit, settings in enumerate(options):
            for setting in settings:
                found = ranked([*now.settings[:unit], setting, *now.settings[unit + 1:]])
                lost = sum(weight * (found.loss[name] - base.loss[name]) / self._budgets[name]
                           for name, weight in self._weights.items())
                if math.isfinite(lost):
                    changes[unit].append((found.density - base.density, lost, setting))
        return changes

    def _part_way(self, holds: Sequence[Setting], breaks: Sequence[Setting]) -> None:
        """As many units as hold from one choice to the other, by bisection."""
        others = [unit for unit, setting in enumerate(breaks) if setting != holds[unit]]
        low, high = 0, len(others)
        while high - low > 1:
            middle = (low + high) // 2
            moved = set(others[:middle])
            if self.keep(self.judged([breaks[unit] if unit in moved else setting for unit, setting in enumerate(holds)])):
                low = middle
            else:
                high = middle


def text_of(found: Measured) -> str:
    return f"density {found.density:.4f}, " + ", ".join(f"{name} {loss:+.5f}" for name, loss in found.loss.items())
