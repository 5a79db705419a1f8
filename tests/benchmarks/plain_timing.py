"""What bench adds to what it measures: its medians against a plain loop's.

    python -m tests.benchmarks.plain_timing [--seconds 5] [--zoo FOLDER] [MODEL …]

Baseline: as onnxruntime_perf_test does it: one session with default options, warmed
up, run back to back in the same process; repeated before and after the bench. The
spread of the plain medians is the noise that the difference is to be seen against.
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


def main() -> None:
    parser = zoo.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    print("| model | plain, ms | its spread | bench, ms | bench ÷ plain |")
    print("|---|---:|---:|---:|---:|")
    for path in zoo.paths(given):
        (candidate,) = cases.candidates([cases.load(path)])
        each = given.seconds / REPEATS
        plain = [plain_ms(candidate, each, given.threads) for _ in range(REPEATS // 2)]
        settings = Settings(given.seconds, threads=given.threads)
        found = latency.bench([candidate, candidate], settings).timings[0].median_ms
        plain += [plain_ms(candidate, each, given.threads) for _ in range(REPEATS // 2)]
        middle = median(plain)
        print(
            f"| {path.stem} | {middle:.3f} | {min(plain):.3f}–{max(plain):.3f} "
            f"| {found:.3f} | {found / middle:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
