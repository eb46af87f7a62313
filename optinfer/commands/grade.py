"""``optinfer grade``: score exercise notebooks in a fresh kernel."""

import argparse
import json
import sys
from pathlib import Path

from optinfer.course.grade import grade, junit, report
from optinfer.folders import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``optinfer grade``."""
    parser.add_argument("notebooks", nargs="+", metavar="NOTEBOOK")
    parser.add_argument(
        "--assignment", metavar="NOTEBOOK", help="the notebook handed out: its exercises count, whatever was deleted"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--junit", metavar="FILE", help="also write JUnit XML")
    parser.add_argument(
        "--min", type=float, default=1.0, help="share of the points for exit code 0 (default: %(default)s)"
    )
    parser.add_argument("--cell-timeout", type=float, default=120, help="seconds for one cell (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one notebook (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=8.0, help="gigabytes for one kernel (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Grade and print: 0 if every notebook reaches ``--min``, else 1.

    Raises:
        ValueError: ``--min`` is no share, or a limit is not positive.
    """
    if not 0 <= args.min <= 1:
        raise ValueError(f"--min must be a share from 0 to 1, not {args.min}")
    for name in ("cell_timeout", "timeout", "memory"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    grades = []
    for path in args.notebooks:
        print(f"{path} …", file=sys.stderr)
        grades.append(grade(path, args.cell_timeout, args.timeout, args.memory, assignment=args.assignment))
    if args.junit:
        write_whole(Path(args.junit), junit(grades))
    print(json.dumps([found.as_dict() for found in grades], indent=1) if args.json else report(grades, args.min))
    return 0 if all(found.points and found.fraction >= args.min for found in grades) else 1
