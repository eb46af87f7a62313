"""Run a notebook from top to bottom in a fresh kernel, as a reader's "run all" would.

python -m optinfer.execute notebooks/01_quantization.ipynb
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode


class NotebookError(RuntimeError):
    """A cell raised; the message holds the cell's code and its traceback."""


def execute(
    path: str | os.PathLike[str],
    timeout: float = 600,
    folder: str | os.PathLike[str] | None = None,
    allow_errors: bool = False,
) -> "NotebookNode":
    """Execute a notebook and return it with outputs; the file itself is not touched.

    Args:
        path: the ``.ipynb`` file.
        timeout: seconds one cell may take.
        folder: working directory of the kernel; default an empty temporary one, as in Colab.
        allow_errors: go on after a cell that raises.

    Raises:
        NotebookError: a cell raised or took too long.
        FileNotFoundError: there is no such notebook.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = nbformat.read(Path(path), as_version=4)
    with tempfile.TemporaryDirectory() as empty:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            allow_errors=allow_errors,
            record_timing=False,
            resources={"metadata": {"path": str(folder or empty)}},
        )
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise NotebookError(f"{path}: {error}") from error
    return notebook


def main() -> int:
    for path in sys.argv[1:]:
        start = time.perf_counter()
        try:
            notebook = execute(path)
        except NotebookError as error:
            print(error, file=sys.stderr)
            return 1
        if output := os.environ.get("OPTINFER_EXECUTED"):
            import nbformat

            nbformat.write(notebook, Path(output) / Path(path).name)
        print(f"{path}: {len(notebook.cells)} cells in {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
