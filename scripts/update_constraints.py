"""Write constraints.txt from what is installed here: run it in a fresh environment that passes every test.

Local version labels ("+cpu") are dropped, because the same pins serve machines with and without a GPU.
"""

import datetime
import importlib.metadata
import re
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "constraints.txt"
# Made by the installer or by this repository; platform packages of CUDA come with torch and follow its own pins.
SKIPPED = re.compile(r"^(pip|setuptools|wheel|optinfer|nvidia-.*|cuda-.*)$")


def main() -> None:
    pins = set()
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if not SKIPPED.match(name):
            pins.add(f"{name}=={distribution.version.split('+')[0]}")
    header = f"# Exact versions that pass every test, {datetime.date.today()}. Made by scripts/update_constraints.py.\n"
    TARGET.write_text(header + "\n".join(sorted(pins)) + "\n", encoding="utf-8")
    print(f"{len(pins)} pins written to {TARGET.name}")


if __name__ == "__main__":
    main()
