"""What bench adds to what it measures: its medians against a plain loop's.

    python -m tests.benchmarks.plain_timing [--seconds 5] [--threads N …]
        [--zoo FOLDER] [MODEL …]

Baseline: as onnxruntime_perf_test does it: one session with default options, warmed
up, run back to back in the same process; taken in turns with benches, so that both see
the same machine. The spread of the plain medians is the noise that the difference is to
be seen against. --threads may be given more than once: 1, and 0 for onnxruntime's own.
"""

from __future__ import annotations

import time
from statistics import median

from squeeze import session
from squeeze.measure import cases, latency
from squeeze.measure.latency import Candidate, Settings
from tests.benchmarks import zoo

REPEATS = 4


def plain_ms(candidate: Candidate, seconds: float, threads: int) -> float:
    """Median of back-to-back runs of one session."""
    runner = session.create(candidate.path, threads=threads)
    for _ in range(5):
        runner.run(None, candidate.feeds)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        runner.run(None, candidate.feeds)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def bench_ms(candidate: Candidate, seconds: float, threads: int) -> float:
    """Median of a bench of the model beside itself, as commands time two models."""
    settings = Settings(seconds, threads=threads)
    return latency.bench([candidate, candidate], settings).timings[0].median_ms


def main() -> None:
    parser = zoo.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and 0")
    given = parser.parse_args()
    print("| model | threads | plain, ms | its spread | bench, ms | bench ÷ plain |")
    print("|---|---:|---:|---:|---:|---:|")
    for path in zoo.paths(given):
        (candidate,) = cases.candidates([cases.load(path)])
        for threads in given.threads or [1, 0]:
            print(_row(path.stem, candidate, given.seconds, threads), flush=True)


def _row(name: str, candidate: Candidate, seconds: float, threads: int) -> str:
    plain, benches = [], []
    for _ in range(REPEATS):
        plain.append(plain_ms(candidate, seconds / REPEATS, threads))
        benches.append(bench_ms(candidate, 2 * seconds / REPEATS, threads))
    middle, found = median(plain), median(benches)
    return (
        f"| {name} | {threads or 'default'} | {middle:.3f} "
        f"| {min(plain):.3f}–{max(plain):.3f} | {found:.3f} | {found / middle:.3f} |"
    )


if __name__ == "__main__":
    main()
