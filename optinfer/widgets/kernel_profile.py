"""A kernel's source with what each line does on a GPU: bars of instructions, sectors and wavefronts, counted by the emulator."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from optinfer.widgets.base import StaticWidget, traitlets

if TYPE_CHECKING:
    from optinfer_kernels.emulator import Run

MEASURES = {
    "instructions": "instructions of warps",
    "sectors": "sectors of 32 bytes in global memory",
    "wavefronts": "wavefronts in shared memory",
}


class KernelProfile(StaticWidget):
    """Choose what is counted, choose a line. Use `KernelProfile.of(...)`.

    Traits:
        title: the kernel and the GPU it was compiled for.
        lines: number, code, and of each measure the count and the least possible one (of instructions: None); classes:
            pairs (class of instruction, count), most first.
        measure: what the bars show, one of `MEASURES`.
        line: the chosen line's number; 0: none.
    """

    _esm = Path(__file__).with_suffix(".js")
    _widget_css = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    title = traitlets.Unicode().tag(sync=True)
    lines = traitlets.List().tag(sync=True)
    measures = traitlets.Dict(MEASURES).tag(sync=True)
    measure = traitlets.Unicode("instructions").tag(sync=True)
    line = traitlets.Int(0).tag(sync=True)

    @classmethod
    def of(cls, run: "Run", source: str | Path) -> "KernelProfile":
        """One run of the emulator.

        Args:
            run: such as ``gpu.runs[-1]``.
            source: the file that the kernel stands in. Helpers elsewhere count for the line that calls them.

        Raises ValueError: no instruction of the run comes from this file.
        """
        path = Path(source)
        counted = {
            int(row.place.rpartition(":")[2]): row for row in run.lines(path.name) if _stands_in(row.place, path.name)
        }
        if not counted:
            raise ValueError(f"source must be the file of the kernel {run.name}; no instruction comes from {path}")
        lines = []
        for number, code in _functions_with(path.read_text(encoding="utf-8"), set(counted)):
            row = counted.get(number)
            lines.append(
                {
                    "number": number,
                    "code": code,
                    "instructions": [row.instructions if row else 0, None],
                    "sectors": [row.sectors, row.least_sectors] if row else [0, 0],
                    "wavefronts": [row.wavefronts, row.least_wavefronts] if row else [0, 0],
                    "classes": row.classes.most_common() if row else [],
                }
            )
        return cls(title=f"{run.name} on sm_{run.arch}", lines=lines)

    def total(self, measure: str) -> int:
        """Of all lines."""
        return sum(line[measure][0] for line in self.lines)

    def summary(self) -> str:
        text = [self.title]
        for measure, words in MEASURES.items():
            heaviest = max(self.lines, key=lambda line: line[measure][0])
            text.append(
                f"{self.total(measure):,} {words}, most in line {heaviest['number']}: {heaviest[measure][0]:,} "
                f"({heaviest['code'].strip()})"
            )
        return "\n".join(text)


def _stands_in(place: str, file: str) -> bool:
    return place.startswith(f"{file}:") and int(place.rpartition(":")[2]) > 0  # line 0: the compiler's own


def _functions_with(text: str, numbers: set[int]) -> Iterator[tuple[int, str]]:
    """(number, code) of every line of the functions in which one of these lines stands."""
    code = text.splitlines()
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        span = range(function.lineno, (function.end_lineno or function.lineno) + 1)
        if numbers & set(span):
            yield from ((number, code[number - 1]) for number in span)
