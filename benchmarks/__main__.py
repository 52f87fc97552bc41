"""Commands: `python -m benchmarks run | report | compare`.

run measures as much as its time allows, keeps the rows, says what got slower than the rows kept before, and writes the
report. It ends with an error if a provider failed (one that does not fit, or is not installed, did not fail), and
where asked also for a missed target (--targets) or for what got slower (--fail).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks import cases, ceilings, machine, providers, regression, report, store, suite, targets
from benchmarks.measure import Budget
from benchmarks.tables import duration

MINUTES = {("cpu", "quick"): 13, ("cpu", "full"): 120, ("cuda", "quick"): 7.5, ("cuda", "full"): 60}
MINUTES_HELP = "time for everything; default: 13 on a CPU, 7.5 on a GPU, with --full 120 and 60"
TINY_HELP = "check that everything runs, at sizes whose times and ratios mean nothing"
REPORT_SECONDS = 20
"""Kept back from the budget for tables and plots."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, keep the rows, compare with those kept before, write the report")
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    run.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on a CPU float32")
    extent = run.add_mutually_exclusive_group()
    extent.add_argument("--quick", dest="mode", action="store_const", const="quick", help="the default")
    extent.add_argument("--full", dest="mode", action="store_const", const="full", help="every size, more rounds")
    extent.add_argument(
        "--tiny",
        dest="mode",
        action="store_const",
        const="tiny",
        help=TINY_HELP,
    )
    run.add_argument("--budget", type=float, metavar="MINUTES", help=MINUTES_HELP)
    run.add_argument("--since", type=float, metavar="EPOCH", help="count the budget from this time, not from now")
    run.add_argument("--only", nargs="+", metavar="KIND", help="groups of these kinds alone, such as layer or steps")
    run.add_argument("--results", type=Path, default=machine.RESULTS, help="where rows are kept")
    run.add_argument("--commit", help="named in the rows; default: the checkout's (a copy without .git has none)")
    run.add_argument("--targets", action="store_true", help="end with an error if a target is missed")
    run.add_argument("--fail", action="store_true", help="end with an error if something got slower")
    made = commands.add_parser("report", help="tables and plots, from the rows kept")
    made.add_argument("--results", type=Path, default=machine.RESULTS)
    made.add_argument("--page", type=Path, help="default: docs/performance.md, for the project's results")
    made.add_argument("--readme", type=Path, help="default: README.md, for the project's results")
    compare = commands.add_parser("compare", help="what is slower in NEW than in OLD: two folders of rows")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    compare.add_argument("--fail", action="store_true", help="end with an error if something got slower")
    options = parser.parse_args(arguments)
    if options.command == "report":
        for file in report.write_all(options.results, options.page, options.readme):
            print(file)
        return 0
    if options.command == "compare":
        found = _say_slower(store.load(options.old), store.load(options.new))
        return found if options.fail else 0
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU: run on a machine with one, or with --device cpu")
    mode = options.mode or "quick"
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    context = suite.Context(device, dtype, mode)
    if context.tiny:
        providers.COMPILE_BACKEND = "eager"
    minutes = options.budget or MINUTES.get((device.type, mode), 10)
    plan = list(cases.plan(context))
    if options.only:
        kinds = list(dict.fromkeys(group.kind for group in plan))
        unknown = sorted(set(options.only) - set(kinds))
        if unknown:
            sys.exit(f"--only {' '.join(unknown)}: no such kind of group here; choose from {', '.join(kinds)}")
        plan = [group for group in plan if group.kind in options.only]
    budget = Budget(60 * minutes - (0 if context.tiny else REPORT_SECONDS), options.since)
    torch.manual_seed(0)
    about = machine.about(device, options.commit)
    top = ceilings.measure(device, dtype, context.tiny)
    common = {"mode": mode, "copy_bytes_per_s": top.copy_bytes_per_s, "flop_per_s": top.flop_per_s, **about}
    if context.cuda:
        copies, products = top.copy_bytes_per_s / 1e12, top.flop_per_s / 1e12
        print(f"{about['gpu']}: copies {copies:.2f} TB/s, multiplies {products:.0f} TFLOP/s")

    folder = options.results / about["machine"]
    stored = store.load(folder)
    rows: list[dict] = []

    def keep(found: list[dict]) -> None:
        if not context.tiny:
            store.save(folder, store.merged(stored, rows + [{**row, **common} for row in found]))

    for group, found, seconds in suite.run(plan, context, top, budget, keep=keep):
        new = [{**row, **common} for row in found]
        rows += new
        keep([])
        _say(group, new, seconds, context)
    return _conclude(rows, stored, options, context, budget)


def _say(group: suite.Group, rows: list[dict], seconds: float, context: suite.Context) -> None:
    print(f"\n{group.name} ({seconds:.0f} s)", flush=True)
    base = next((row["median_s"] for row in rows if row["provider"] == group.base and "median_s" in row), None)
    for row in rows:
        if "median_s" not in row:
            print(f"  {row['provider']:44} {row['status']}: {row['message']}")
            continue
        over = f"{row['median_s'] / base:9.3f}×" if base else ""
        share = f"{row['share_of_ceiling']:6.0%} of {row['ceiling']}" if "share_of_ceiling" in row else ""
        absolute = f"{duration(row['median_s']):>10}" if context.cuda else ""
        print(f"  {row['provider']:44} {absolute}{over}  {share}")


def _conclude(rows, stored, options, context: suite.Context, budget: Budget) -> int:
    failed = [row for row in rows if row["status"] == "failed"]
    unmeasured = sorted({row["kind"] for row in rows if row["status"] == "left out" and "budget" in row["message"]})
    if unmeasured:
        print(
            f"\nthe time budget left out groups of: {', '.join(unmeasured)} (--budget MINUTES; the report names each)"
        )
    if not context.tiny:
        for file in report.write_all(options.results):
            print(file)
    status = 0
    if failed:
        print("\nfailed:")
        for row in failed:
            print(f"  {row['provider']}, {row['kind']} {row['step']}: {row['message']}")
        status = 1
    misses = [] if context.tiny else targets.missed(rows, "gpu" if context.cuda else "cpu")
    if misses:
        print("\ntargets missed:\n  " + "\n  ".join(misses))
        status = 1 if options.targets else status
    if not context.tiny and _say_slower(stored, rows) and options.fail:
        status = 1
    if context.tiny:
        print("\n--tiny checks that everything runs: at its sizes the times and ratios above mean nothing")
    print(f"\nended {time.strftime('%H:%M:%S')}, {budget.left():.0f} s before the budget's end")
    return status


def _say_slower(stored: list[dict], new: list[dict]) -> int:
    found = regression.slower(stored, new)
    if found:
        print("\nslower than the rows kept before, by more than the spread:\n  " + "\n  ".join(map(str, found)))
    elif stored:
        print("\nnothing got slower than the rows kept before by more than the spread")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
