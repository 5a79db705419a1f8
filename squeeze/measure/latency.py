"""Latency in onnxruntime: several models in turn, in one process.

Time is taken in rounds. Each round makes fresh sessions, warms them up, and runs the
models in turns (A B A B …), a slice of back-to-back runs each. Slices, because a
session's threads go on spinning for some 30 ms after a run, because threads that were
at rest share one core for up to 60 ms before the system spreads them, and because
another model's weights push its own out of the caches: single runs in turn would time
the neighbour. What is timed is what plain back-to-back timing with onnxruntime's
defaults gives.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from squeeze import session
from squeeze.errors import SqueezeError, UsageError
from squeeze.measure.inputs import Feeds, random_feeds
from squeeze.measure.statistics import ratio_interval
from squeeze.session import CPU, Session
from squeeze.shapes import Shapes

Array = np.ndarray
Progress = Callable[[float], None]  # share done, from 0 to 1
Clock = Literal["wall", "processor"]

CLOCKS: dict[Clock, Callable[[], float]] = {
    "wall": time.perf_counter,
    "processor": time.thread_time,
}

ROUNDS = 8  # fresh sessions per model, where making them is quick
LEAST_ROUNDS = 4
SLICES = 4  # turns per round
LEAST_SLICES = 2
SLICE_SECONDS = 0.01  # least, where a run is shorter
THREADS_SLICE_SECONDS = 0.05  # least, where each slice begins with `AWAKE_SECONDS`
SPIN_SECONDS = 0.04  # how long a session's threads spin on, about
AWAKE_SECONDS = 0.08  # of runs after a rest until threads have cores of their own
STABLE = 0.97  # a model is warm when its time falls by less
SETTLED = 0.2  # threads are at rest below this share of one core
NOISY = 1.5  # 95 % quantile ÷ median from which a machine is called noisy


@dataclass(frozen=True)
class Latency:
    """Medians in milliseconds, and after ÷ before with its 95 % bootstrap interval."""

    before_ms: float
    after_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class Candidate:
    """A model to time on its inputs."""

    path: Path
    feeds: Feeds


@dataclass(frozen=True)
class Settings:
    """How to time. `runs`, per model, beats `seconds`, for all models.

    The `processor` clock counts one thread's processor time: what other programs do
    meanwhile is not in it, nor what more threads would gain.
    """

    seconds: float = 10.0
    runs: int | None = None
    threads: int = 0
    provider: str = CPU
    seed: int = 0
    level: float = 0.95
    clock: Clock = "wall"

    def __post_init__(self) -> None:
        if self.clock == "processor":
            if self.threads > 1 or self.provider != CPU:
                raise UsageError(
                    "processor time is of one thread on the CPU; leave --threads and "
                    "--provider out, or pass --clock wall"
                )
            object.__setattr__(self, "threads", 1)


@dataclass(frozen=True)
class Timing:
    """One model's times: milliseconds over all timed runs of all rounds."""

    model: str
    median_ms: float
    min_ms: float
    p5_ms: float
    p95_ms: float
    runs: int

    @property
    def noisy(self) -> bool:
        return self.p95_ms > NOISY * self.median_ms


@dataclass(frozen=True)
class Ratio:
    """A model's time ÷ the baseline's, with its interval at `level`."""

    ratio: float
    low: float
    high: float
    level: float

    @property
    def verdict(self) -> str:
        """`faster` or `slower` where the interval excludes 1."""
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "no difference shown"


@dataclass(frozen=True)
class Bench:
    """Timings in the order of the candidates; the first one is the baseline."""

    timings: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]  # of every candidate but the first, to the first
    rounds: int
    placements: tuple[dict[str, int], ...] = ()  # nodes by provider, of each candidate


def side_by_side(
    before: Path,
    after: Path,
    before_shapes: Shapes,
    after_shapes: Shapes,
    seed: int = 0,
    seconds: float = 3.0,
    progress: Progress | None = None,
) -> Latency:
    """Time two models in turn (A B A B …) in this process, about `seconds` in all."""
    candidates = [
        Candidate(path, feeds_for(path, shapes, seed))
        for path, shapes in ((before, before_shapes), (after, after_shapes))
    ]
    found = bench(candidates, Settings(seconds=seconds, seed=seed), progress)
    (ratio,) = found.ratios
    a, b = (timing.median_ms for timing in found.timings)
    return Latency(a, b, ratio.ratio, ratio.low, ratio.high)


def feeds_for(path: Path, shapes: Shapes, seed: int = 0) -> Feeds:
    """Random inputs for the model at `path`."""
    runner = session.open_model(path, optimize=False)
    try:
        return random_feeds(runner, shapes.inputs, seed)
    except SqueezeError as error:
        raise SqueezeError(f"{path}: {error}") from error


def bench(
    candidates: Sequence[Candidate],
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Time every candidate, and compare all others with the first.

    Raises SqueezeError where a model can't be loaded or fails at run time.
    """
    settings = settings or Settings()
    placements = [placement(c, settings.provider) for c in candidates]
    times = measure(candidates, settings, progress)
    timings = [
        _timing(c.path, rounds) for c, rounds in zip(candidates, times, strict=True)
    ]
    ratios = [
        Ratio(
            *ratio_interval(times[0], t, settings.level, settings.seed), settings.level
        )
        for t in times[1:]
    ]
    return Bench(tuple(timings), tuple(ratios), len(times[0]), tuple(placements))


def placement(candidate: Candidate, provider: str) -> dict[str, int]:
    """Nodes that each provider ran, by onnxruntime's own profile of one run.

    Empty for the CPU, which runs all there is. A provider may start and yet leave
    every node to the CPU: SqueezeError, as the times would not be its own.
    """
    if provider == CPU:
        return {}
    with tempfile.TemporaryDirectory(prefix="squeeze-") as folder:
        runner = session.open_model(
            candidate.path, provider_name=provider, profile_to=Path(folder)
        )
        session.run(runner, candidate.feeds, candidate.path)
        events = session.profiled(runner)
    ran = Counter(
        event["args"]["provider"]
        for event in events
        if "provider" in event.get("args", {})
    )
    if not ran[provider]:
        others = ", ".join(session.short(name) for name in ran) or "nothing"
        raise SqueezeError(
            f"{candidate.path}: {session.short(provider)} ran none of its nodes, "
            f"{others} ran them; leave --provider out to time it there"
        )
    return dict(ran)


def _timing(path: Path, rounds: Sequence[Sequence[Array]]) -> Timing:
    runs = np.concatenate([one for slices in rounds for one in slices]) * 1e3
    low, middle, high = np.quantile(runs, [0.05, 0.5, 0.95])
    return Timing(
        str(path), float(middle), float(runs.min()), float(low), float(high), len(runs)
    )


# -- taking times -------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """A candidate with a session, warmed up: seconds per run, and runs per slice.

    `alone`: no other model's slices come between. `awake`: seconds of untimed runs
    with which a slice begins.
    """

    candidate: Candidate
    runner: Session
    clock: Callable[[], float]
    seconds: float
    count: int
    alone: bool
    awake: float

    def slice(self) -> Array:
        """Seconds of `count` runs, back to back."""
        if not self.alone:
            _settle()
            self._wake()
        return _times(self.runner, self.candidate, self.clock, self.count)

    def _wake(self) -> None:
        """Runs until caches and threads are as in the midst of a loop."""
        end = time.perf_counter() + self.awake
        if self.seconds < SPIN_SECONDS:
            _times(self.runner, self.candidate, self.clock, 2)
        while time.perf_counter() < end:
            _times(self.runner, self.candidate, self.clock, 1)

    @property
    def cost(self) -> float:
        """Seconds that a slice takes, about."""
        rest = self.awake and SPIN_SECONDS + max(self.awake, self.seconds)
        return rest + self.count * self.seconds


def measure(
    candidates: Sequence[Candidate],
    settings: Settings,
    progress: Progress | None = None,
) -> list[list[list[Array]]]:
    """Seconds per run: by candidate, round and slice."""
    if not candidates:
        raise SqueezeError("no model to time")
    found: list[list[list[Array]]] = [[] for _ in candidates]
    start = time.perf_counter()
    slots = _open(candidates, settings)
    made = time.perf_counter() - start
    if any(slot.awake for slot in slots):
        made += LEAST_SLICES * sum(slot.cost for slot in slots)
    rounds = int(np.clip(settings.seconds / max(made, 1e-9), LEAST_ROUNDS, ROUNDS))
    for index in range(rounds):
        # a round's sessions are gone before the next one's are made: big models
        slots = slots if index == 0 else _open(candidates, settings)
        timed = _round(slots, _turns(slots, settings, rounds))
        slots = []
        for each, slices in zip(found, timed, strict=True):
            each.append(slices)
        if progress is not None:
            progress((index + 1) / rounds)
    return found


def _round(slots: Sequence[_Slot], turns: int) -> list[list[Array]]:
    """Slices by candidate, taken in turns, every other turn from the last one on."""
    slices: list[list[Array]] = [[] for _ in slots]
    for turn in range(turns):
        order = range(len(slots)) if turn % 2 == 0 else reversed(range(len(slots)))
        for position in order:
            slices[position].append(slots[position].slice())
    return slices


def _turns(slots: Sequence[_Slot], settings: Settings, rounds: int) -> int:
    """Slices per model and round: from the runs asked for, else from the seconds."""
    if settings.runs is not None:
        least = min(slot.count for slot in slots)
        return max(1, -(-settings.runs // (rounds * least)))
    whole = sum(slot.cost for slot in slots)
    return int(np.clip(settings.seconds / rounds / whole, LEAST_SLICES, SLICES))


def _open(candidates: Sequence[Candidate], settings: Settings) -> list[_Slot]:
    """Fresh sessions, one alive per model, each run until its time is stable."""
    slots, clock = [], CLOCKS[settings.clock]
    for candidate in candidates:
        runner = session.open_model(
            candidate.path, threads=settings.threads, provider_name=settings.provider
        )
        share, awake = _slice_seconds(settings, len(candidates))
        each = _warm_up(runner, candidate, clock, limit=5 * share)
        count = int(np.clip(share / each, 1, 10_000))
        if settings.runs is not None:
            count = int(np.clip(settings.runs // (ROUNDS * SLICES), 1, count))
        alone = len(candidates) == 1
        slots.append(_Slot(candidate, runner, clock, each, count, alone, awake))
    return slots


def _slice_seconds(settings: Settings, models: int) -> tuple[float, float]:
    """What a slice may take, and the untimed runs that it begins with."""
    share = settings.seconds / (ROUNDS * SLICES * models)
    if settings.threads == 1 or models == 1:
        return max(share, SLICE_SECONDS), 0.0
    share -= SPIN_SECONDS + AWAKE_SECONDS
    return max(share, THREADS_SLICE_SECONDS), AWAKE_SECONDS


def _warm_up(
    runner: Session, candidate: Candidate, clock: Callable[[], float], limit: float
) -> float:
    """Run until five runs are no faster than the five before; seconds per run.

    At most about `limit` seconds: a model that takes longer is warm after two runs.
    """
    start = time.perf_counter()
    _times(runner, candidate, clock, 1)
    last = float(_times(runner, candidate, clock, 1)[0])
    while time.perf_counter() - start < limit:
        count = 5 if 10 * last < limit else 1
        now = float(np.median(_times(runner, candidate, clock, count)))
        if now > STABLE * last:
            break
        last = now
    return max(last, 1e-7)


def _times(
    runner: Session, candidate: Candidate, clock: Callable[[], float], count: int
) -> Array:
    """Seconds of each of `count` runs."""
    run, feeds = runner.run, candidate.feeds
    times = np.empty(count)
    try:
        for index in range(count):
            start = clock()
            run(None, feeds)
            times[index] = clock() - start
    except Exception as error:  # onnxruntime raises many kinds
        raise session.failed(error, candidate.path, runner) from error
    return times


def _settle(limit: float = 0.1) -> None:
    """Wait until no thread of this process works: a session's threads spin on."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.002)
        if time.process_time() - before < SETTLED * 0.002:
            return
