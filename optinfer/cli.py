"""The command line: a table of commands, each a module of `optinfer.commands`."""

import argparse
import importlib
import sys

from optinfer import __version__
from optinfer.errors import OptinferError

COMMANDS = {
    "doctor": "what this machine is, and how each part of the course will run on it",
    "lab": "open JupyterLab on the first notebook",
    "fetch": "fetch the default model into the cache",
    "bench": "measure, beside other libraries, and record",
    "grade": "score exercise notebooks in a fresh kernel",
    "quantize": "quantize a model and save a checkpoint that transformers and vLLM load",
    "export": "write a model, quantized or not, as a folder that others load",
    "profile": "what a Triton kernel does on a GPU that is not here, counted",
    "progress": "which exercises are solved",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(argv).parse_args(argv)
    try:
        return args.command(args)
    except (OptinferError, ValueError, FileNotFoundError) as error:
        print(f"optinfer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parser(argv: list[str]) -> argparse.ArgumentParser:
    """All commands; the module of one, which may import torch, is imported only when `argv` names it."""
    whole = argparse.ArgumentParser(prog="optinfer", description="A course on LLM inference optimization.")
    whole.add_argument("--version", action="version", version=__version__)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        if name in argv:
            module = importlib.import_module(f"optinfer.commands.{name}")
            if hasattr(module, "add_arguments"):
                module.add_arguments(command)
            command.set_defaults(command=module.run)
    return whole


if __name__ == "__main__":
    sys.exit(main())
