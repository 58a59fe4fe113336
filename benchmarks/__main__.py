"""Measures tutelage against its peers. One line a benchmark; exit status 1 where one falls short of its bar.

Run it on a machine that does nothing else. Medians of rounds; each round runs both sides in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks import record
from benchmarks.harness import Benchmark, Effort, Result, keep_freed_memory, run
from benchmarks.registry import BENCHMARKS, chosen

FULL, QUICK = Effort(rounds=9, seconds=0.2), Effort(rounds=3, seconds=0.1)


def main(arguments: Sequence[str] | None = None, benchmarks: Sequence[Benchmark] = BENCHMARKS) -> int:
    options = _parser().parse_args(arguments)
    try:
        wanted = chosen(benchmarks, options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.quick and options.only == "*":
        wanted = [benchmark for benchmark in wanted if not benchmark.long]
    if options.list:
        for benchmark in wanted:
            bar = f"≤ {benchmark.bar.show(benchmark.bar.limit)}"
            print(f"{benchmark.name}  {bar}\n    {benchmark.what}\n    against {benchmark.peer}")
        return 0
    effort = QUICK if options.quick else FULL
    if options.repeats:
        effort = Effort(options.repeats, effort.seconds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    results = measure(wanted, device, effort)
    if options.save is not None:
        print(f"written: {record.save(results, device, effort, options.save or None)}")
    short = [result for result in results if not result.holds]
    print(f"{len(results) - len(short)} of {len(results)} hold or are skipped, {len(short)} fall short")
    return int(bool(short))


def measure(benchmarks: Sequence[Benchmark], device: torch.device, effort: Effort) -> list[Result]:
    """Run them in their order, and print each one's line as it ends."""
    print(f"{record.device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    width = max(len(benchmark.name) for benchmark in benchmarks)
    results = []
    for benchmark in benchmarks:
        results.append(run(benchmark, device, effort))
        print(results[-1].line(width), flush=True)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--list", action="store_true", help="show what there is, and measure nothing")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="names, such as 'trainer.*' or kd")
    parser.add_argument("--repeats", metavar="N", type=_positive, help="rounds of each (9; quick: 3)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a first look")
    parser.add_argument(
        "--save",
        metavar="NAME",
        nargs="?",
        const="",
        help="write benchmarks/results/NAME.json, left out: the device's name; and the tables of docs/speed.md",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
