"""``optinfer lab``: JupyterLab on the first notebook."""

import argparse

from optinfer.course.lab import open_lab


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``optinfer lab``."""
    parser.add_argument(
        "--folder", default=None, help="where the notebooks are (default: here, or copied from the package)"
    )
    parser.add_argument("--no-browser", action="store_true")
    parser.add_argument("--port", type=int, default=8888)


def run(args: argparse.Namespace) -> int:
    """Open it; returns when JupyterLab ends."""
    return open_lab(args.folder, browser=not args.no_browser, port=args.port)
