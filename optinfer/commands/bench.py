"""``optinfer bench``: measure, beside other libraries, and record; or compare two recordings."""

import argparse
from collections import Counter
from pathlib import Path

from optinfer import bench, hardware, results
from optinfer.bench.compare import VERDICTS, compare
from optinfer.bench.report import plot, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``optinfer bench``."""
    parser.add_argument("suite", help=f"{', '.join(bench.SUITES + bench.LONG)}, all (but the last), or compare")
    parser.add_argument("files", nargs="*", metavar="FILE", help="with compare: two recorded runs, the earlier first")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats")
    parser.add_argument(
        "--out",
        default=None,
        help="folder for the JSON files (default: data/results of the repository, else ./results)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure one suite or all of them, print, record and draw; or compare.

    Raises:
        ValueError: files without ``compare``, or not two with it.
    """
    if args.suite == "compare":
        return _compare(args.files)
    if args.files:
        raise ValueError(f"only `bench compare` takes files; got {' '.join(args.files)}")
    suites = bench.SUITES if args.suite == "all" else [args.suite]
    folder = Path(args.out) if args.out else results.default_folder()
    machine = hardware.this_machine()
    for suite in suites:
        rows = bench.run(suite, quick=args.quick)
        flat = [row.as_dict() for row in rows]
        print(show(flat))
        path = results.save(suite, flat, folder, machine=machine)
        print(f"written to {path}")
        try:
            plot(rows, path.with_suffix(".svg"))
        except ModuleNotFoundError:
            print("no plot: matplotlib is not installed")
    return 0


def _compare(files: list[str]) -> int:
    if len(files) != 2:
        raise ValueError(f"compare takes two files of recorded results, got {len(files)}")
    before, after = (results.read(file) for file in files)
    rows = compare(before, after)
    print(f"before: {before.caption()}\nafter:  {after.caption()}")
    if before.device != after.device:
        print("two different devices: ratios compare machines, not code")
    print(show([row for row in rows if row["verdict"] != "same"] or rows))
    counts = Counter(row["verdict"] for row in rows)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]))
    return 0
