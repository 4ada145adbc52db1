"""The search: which setting (a threshold and a window) each unit, a KV head or a layer, attends by. Knows nothing of models."""

import math
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

Setting = Tuple[float, int]

THRESHOLDS = (2.0, 0.2, 0.1, 0.05, 0.02, 0.005)  # from sparse to dense; over 1: nothing is searched
WINDOWS = (4, 16, 64, 128)  # blocks of 128 keys
DENSE: Setting = (0.0, WINDOWS[-1])
FIRST = (*((2.0, window) for window in WINDOWS), (0.2, 16), (0.2, 128), (0.05, 16), (0.05, 64), (0.05, 128), (0.005, 16))
START: Setting = (0.05, 64)
LEAST_GAIN = 0.02  # of the density: a round that saves less is the last


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
    density: float  # mean over layers and heads, of what will be served

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


def search(units: int, rank: Callable[[Sequence[Setting], Sequence[Setting]], Measured], judge: Callable[[Sequence[Setting]], Measured],
           budgets: Dict[str, float], *, start: Optional[Sequence[Setting]] = None, most_passes: int = 10**9,
           say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Settings for `units` under which every set of `judge` holds its budget, at a density as low as is found.

    A round ranks: it measures what each option of each unit changes, the others where they are, by rank(where all are, with the
    option), whose sets are the judge's. Options are the neighbours of each unit's setting. The first round stands on `start`; without it on START, and its options are
    all of FIRST. From the options that lose least units step to sparser ones, those first that save most density for what they
    lose; as many steps as hold, by bisection with each choice judged, give the state that the next round stands on. Sets that
    spend more of their budgets weigh more. Dense attention, which loses nothing, is the answer where nothing holds. Passes are
    calls of rank and of judge.
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
            changes = sum(map(len, options))
            if run.passes + 1 + changes + (changes + 1).bit_length() > most_passes:
                break
            say(f"round {len(history) + 1} ranks {changes} changes")
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


_Change = Tuple[float, float, Setting]  # of the density, of the loss in budgets by weight, to the setting


class _Run:
    best: _State  # of those that hold

    def __init__(self, rank, judge, budgets):
        self._rank, self._judge, self._budgets = rank, judge, budgets
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
        """The best state that holds, of those that steps lead to and what was known; else the one that spends least."""
        paths = [_path(some) for some in self._changes(now, options)]
        steps = sorted(step for unit, path in enumerate(paths) for step in _steps(unit, path))
        least, low, high = now, -1, len(steps) + 1  # so many steps hold, so many do not
        while high - low > 1:
            middle = (low + high) // 2
            at = [0] * len(paths)
            for _, unit, place in steps[:middle]:
                at[unit] = place
            state = self.judged([path[place][2] for path, place in zip(paths, at)])
            if self.keep(state):
                low = middle
            else:
                high = middle
            least = min(least, state, key=lambda one: one.measured.spent(self._budgets))
        return self.best if self.best.measured.density < 1 else least

    def _changes(self, now: _State, options: Sequence[Sequence[Setting]]) -> List[List[_Change]]:
        """Of staying and of each option, for each unit."""
        shares = {name: min(100.0, max(0.1, loss / self._budgets[name])) for name, loss in now.measured.loss.items()}
        weights = {name: share / sum(shares.values()) for name, share in shares.items()}

        def ranked(settings: Sequence[Setting]) -> Measured:
            self.passes += 1
            return self._rank(now.settings, settings)

        base = ranked(now.settings)
        changes: List[List[_Change]] = [[(0.0, 0.0, setting)] for setting in now.settings]
        for unit, settings in enumerate(options):
            for setting in settings:
                found = ranked([*now.settings[:unit], setting, *now.settings[unit + 1:]])
                lost = sum(weight * (found.loss[name] - base.loss[name]) / self._budgets[name]
                           for name, weight in weights.items())
                if math.isfinite(lost):
                    changes[unit].append((found.density - base.density, lost, setting))
        return changes


def _path(changes: Sequence[_Change]) -> List[_Change]:
    """From the one that loses least to the sparsest, each the next by least loss for the density that it saves."""
    path = [min(changes, key=lambda one: (one[1], one[0]))]
    while sparser := [one for one in changes if one[0] < path[-1][0]]:
        path.append(min(sparser, key=lambda one: (_slope(path[-1], one), one[0])))
    return path


def _slope(one: _Change, sparser: _Change) -> float:
    return (sparser[1] - one[1]) / (one[0] - sparser[0])


def _steps(unit: int, path: Sequence[_Change]) -> List[Tuple[float, int, int]]:
    """(slope, unit, place on the path that it leads to); slopes rise."""
    return [(_slope(one, other), unit, place) for place, (one, other) in enumerate(zip(path, path[1:]), 1)]


def text_of(found: Measured) -> str:
    return f"density {found.density:.4f}, " + ", ".join(f"{name} {loss:+.5f}" for name, loss in found.loss.items())
