"""The search: which setting (a threshold and a window) each unit, a KV head or a layer, attends by. Knows nothing of models."""

import math
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

Setting = Tuple[float, int]

THRESHOLDS = (2.0, 0.2, 0.1, 0.05, 0.02, 0.005)  # from sparse to dense; over 1: nothing is searched
WINDOWS = (4, 16, 64, 128)  # blocks of 128 keys
DENSE: Setting = (0.0, WINDOWS[-1])
FIRST = (*((2.0, window) for window in WINDOWS), (0.2, 16), (0.05, 16), (0.05, 64), (0.05, 128), (0.005, 16), DENSE)
START: Setting = (0.05, 64)
LEAST_GAIN = 0.02  # of the density: a round that saves less is the last
WEIGHINGS = 3  # of the sets against each other, in a round
MOST_SHIFT = 4.0  # of a set's weight from one to the next


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
    density: float  # of attention over what will be served, mean over layers and heads

    def spent(self, budgets: Dict[str, float]) -> float:
        """The largest share of a budget that a set uses; infinite where a loss is no number."""
        if not all(math.isfinite(loss) for loss in self.loss.values()):
            return math.inf
        return max(0.0, *(loss / budgets[name] for name, loss in self.loss.items()))


class OutOfTime(Exception):
    """Raised by what ranks: the search chooses among what was ranked until then, and ends."""


@dataclass
class Outcome:
    settings: List[Setting]
    measured: Measured
    passes: int
    whole: bool  # a further round would save little; else most_passes or the time ended it
    history: List[Tuple[float, float]]  # (share of the budget spent, density) after each round


def most_of_round(units: int, changes: int) -> int:
    """Passes that a round takes at most."""
    return 1 + changes + WEIGHINGS * (changes + units).bit_length()


def most_of_first_round(units: int, given: bool) -> int:
    """Passes that a search takes until its first round is done; given: it goes on from settings."""
    return 1 + most_of_round(units, units * (5 if given else len(FIRST)))


def search(units: int, rank: Callable[[Sequence[Setting], Sequence[Setting]], Measured],
           judge: Callable[[Sequence[Setting]], Measured], budgets: Dict[str, float], *,
           start: Optional[Sequence[Setting]] = None, most_passes: int = 10**9, say: Callable[[str], None] = lambda text: None,
           keep: Callable[[Outcome], None] = lambda found: None) -> Outcome:
    """Settings for `units` under which every set of `judge` holds its budget, at a density as low as is found.

    A round ranks: it measures what each option of each unit changes, the others where they are, by rank(where all are, with the
    option), whose sets are the judge's. Options are the neighbours of each unit's setting. The first round stands on `start`;
    without it on START, and its options are all of FIRST. From their densest options units step to sparser ones, those first that
    save most density for what they lose; as many steps as hold, by bisection with each choice judged, give the state that the next
    round stands on. That is done again with more weight on the sets that end it and less on the others. Dense attention, which
    loses nothing, is the answer where nothing holds. Passes are calls of rank and of judge. `keep` gets every better answer.
    """
    history: List[Tuple[float, float]] = []
    run = _Run(rank, judge, budgets, lambda: keep(outcome(False)))

    def outcome(whole: bool) -> Outcome:
        return Outcome(run.best.settings, run.best.measured, run.passes, whole, history)

    run.best = _State([DENSE] * units, Measured({name: 0.0 for name in budgets}, 1.0))
    now = run.judged(start or [START] * units)
    run.keep(now)
    origin = "what was given" if start else f"threshold {START[0]:g}, window {START[1]}"
    say(f"{units} units, from {origin}: {text_of(now.measured)}")
    whole = False
    while not whole and not run.late:
        first = FIRST if not start and not history else None
        options = [[one for one in first or neighbours(setting) if one != setting] for setting in now.settings]
        changes = sum(map(len, options))
        if run.passes + most_of_round(units, changes) > most_passes:
            break
        say(f"round {len(history) + 1} ranks {changes} changes")
        before = run.best.measured.density
        now = run.round(now, options)
        history.append((now.measured.spent(budgets), now.measured.density))
        holds = history[-1][0] <= 1
        say(f"round {len(history)}, {run.passes} passes: {text_of(now.measured)}{'' if holds else ': over the budget'}")
        if holds:
            whole = (1 - LEAST_GAIN) * before < now.measured.density and before < 1
        else:
            whole = len(history) > 1 and history[-1][0] >= history[-2][0]  # comes no nearer
    return outcome(whole and not run.late)


@dataclass
class _State:
    settings: List[Setting]
    measured: Measured  # by the judge


@dataclass
class _Change:
    """From where a unit stands to a setting."""

    setting: Setting
    density: float
    loss: Dict[str, float]  # in budgets, by set

    def lost(self, weights: Dict[str, float]) -> float:
        return sum(weight * self.loss[name] for name, weight in weights.items())


class _Run:
    best: _State  # of those that hold

    def __init__(self, rank, judge, budgets, improved: Callable[[], None]):
        self._rank, self._judge, self._budgets, self._improved = rank, judge, budgets, improved
        self._known: Dict[Tuple[Setting, ...], Measured] = {}
        self.passes = 0
        self.late = False

    def judged(self, settings: Sequence[Setting]) -> _State:
        key = tuple(settings)
        if key not in self._known:
            self.passes += 1
            self._known[key] = self._judge(settings)
        return _State(list(settings), self._known[key])

    def keep(self, state: _State) -> bool:
        """Whether it holds; the best of those is kept."""
        holds = state.measured.spent(self._budgets) <= 1
        if holds and state.measured.density < self.best.measured.density:
            self.best = state
            self._improved()
        return holds

    def round(self, now: _State, options: Sequence[Sequence[Setting]]) -> _State:
        """The best state that holds, of those that steps lead to and what was known; else the one that spends least."""
        changes = self._changes(now, options)
        weights = self._shifted({name: 1.0 for name in self._budgets}, now.measured)
        least = now
        for _ in range(WEIGHINGS):
            tried = self._descend(changes, weights)
            least = min(least, *tried, key=lambda one: one.measured.spent(self._budgets))
            fails = [state for state in tried if state.measured.spent(self._budgets) > 1]
            if not fails:
                break
            weights = self._shifted(weights, fails[-1].measured)
        return self.best if self.best.measured.density < 1 else least

    def _shifted(self, weights: Dict[str, float], found: Measured) -> Dict[str, float]:
        shares = {name: min(MOST_SHIFT, max(1 / MOST_SHIFT, loss / self._budgets[name])) for name, loss in found.loss.items()}
        weights = {name: weight * shares[name] for name, weight in weights.items()}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def _descend(self, changes: Sequence[Sequence[_Change]], weights: Dict[str, float]) -> List[_State]:
        """Bisects the steps; the states that were judged, of which the last that fails takes one step too many."""
        paths = [_path(some, weights) for some in changes]
        steps = sorted(step for unit, path in enumerate(paths) for step in _steps(unit, path, weights))
        tried = []
        low, high = -1, len(steps) + 1  # so many steps hold, so many do not
        while high - low > 1:
            middle = (low + high) // 2
            at = [0] * len(paths)
            for _, unit, place in steps[:middle]:
                at[unit] = place
            tried.append(self.judged([path[place].setting for path, place in zip(paths, at)]))
            if self.keep(tried[-1]):
                low = middle
            else:
                high = middle
        return tried

    def _changes(self, now: _State, options: Sequence[Sequence[Setting]]) -> List[List[_Change]]:
        """Of staying and of each option, for each unit, as far as the time reaches."""
        changes = [[_Change(setting, 0.0, {name: 0.0 for name in self._budgets})] for setting in now.settings]
        try:
            base = self._ranked(now, now.settings)
            for unit, settings in enumerate(options):
                for setting in settings:
                    found = self._ranked(now, [*now.settings[:unit], setting, *now.settings[unit + 1:]])
                    loss = {name: (found.loss[name] - base.loss[name]) / budget for name, budget in self._budgets.items()}
                    if all(map(math.isfinite, loss.values())):
                        changes[unit].append(_Change(setting, found.density - base.density, loss))
        except OutOfTime:
            self.late = True
        return changes

    def _ranked(self, now: _State, settings: Sequence[Setting]) -> Measured:
        found = self._rank(now.settings, settings)
        self.passes += 1
        return found


def _path(changes: Sequence[_Change], weights: Dict[str, float]) -> List[_Change]:
    """From the densest to the sparsest, each the next by least loss for the density that it saves: the lower hull."""
    path = [min(changes, key=lambda one: (-one.density, one.lost(weights)))]
    while sparser := [one for one in changes if one.density < path[-1].density]:
        path.append(min(sparser, key=lambda one: (_slope(path[-1], one, weights), one.density)))
    return path


def _slope(one: _Change, sparser: _Change, weights: Dict[str, float]) -> float:
    return (sparser.lost(weights) - one.lost(weights)) / (one.density - sparser.density)


def _steps(unit: int, path: Sequence[_Change], weights: Dict[str, float]) -> List[Tuple[float, int, int]]:
    """(slope, unit, place on the path that it leads to); slopes rise."""
    return [(_slope(one, other, weights), unit, place) for place, (one, other) in enumerate(zip(path, path[1:]), 1)]


def text_of(found: Measured) -> str:
    return f"density {found.density:.4f}, " + ", ".join(f"{name} {loss:+.5f}" for name, loss in found.loss.items())
