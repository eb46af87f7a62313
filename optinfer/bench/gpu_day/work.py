"""One step, in this process: its rows as lines of JSON in a file, each written when it is there.

python -m optinfer.bench.gpu_day.work check-attention rows.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from optinfer import results
from optinfer.bench.gpu_day.steps import BY_NAME, NotHere


def work(name: str, path: Path, tiny: bool = False) -> int:
    """0: done, and whatever was checked holds. 1: a row failed, or the step did."""
    failed = False

    def say(kind: str, value: Any) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({kind: value}, default=str) + "\n")

    try:
        say("provenance", results.provenance())
        for row in BY_NAME[name].rows(tiny):
            failed |= row.get("ok") is False
            say("row", row)
    except NotHere as reason:
        say("not_here", str(reason))
    except Exception as error:
        traceback.print_exc()
        say("error", f"{type(error).__name__}: {error}".split("\n")[0][:300])
        return 1
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m optinfer.bench.gpu_day.work")
    parser.add_argument("name", choices=BY_NAME)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    return work(args.name, args.rows, args.tiny)


if __name__ == "__main__":
    sys.exit(main())
