"""The command line: ``optinfer doctor | lab | fetch | bench | quantize | export | grade | profile | progress``."""

import argparse
import sys
from pathlib import Path

from optinfer import __version__


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser(argv).parse_args(argv)
    from optinfer.errors import OptinferError

    try:
        return args.command(args)
    except (OptinferError, ValueError, FileNotFoundError) as error:
        print(f"optinfer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """All commands; those whose options need slow imports (torch) get them only when they are named."""
    parser = argparse.ArgumentParser(prog="optinfer", description="A course on LLM inference optimization.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what this machine is, and how each part of the course will run on it")
    doctor.set_defaults(command=_doctor)

    lab = commands.add_parser("lab", help="open JupyterLab on the first notebook")
    lab.add_argument(
        "--folder", default=None, help="where the notebooks are (default: here, or copied from the package)"
    )
    lab.add_argument("--no-browser", action="store_true")
    lab.add_argument("--port", type=int, default=8888)
    lab.set_defaults(command=_lab)

    fetch = commands.add_parser("fetch", help="fetch the default model into the cache")
    fetch.set_defaults(command=_fetch)

    bench = commands.add_parser("bench", help="measure, beside other libraries, and record")
    bench.add_argument("suite", help="a suite's name, all, or compare")
    bench.add_argument("files", nargs="*", metavar="FILE", help="with compare: two recorded runs, the earlier first")
    bench.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats")
    bench.add_argument(
        "--out",
        default=None,
        help="folder for the JSON files (default: data/results of the repository, else ./results)",
    )
    bench.set_defaults(command=_bench)

    grade = commands.add_parser("grade", help="score exercise notebooks in a fresh kernel")
    grade.set_defaults(command=_grade)
    if "grade" in argv:
        _add_grade_arguments(grade)

    quantize = commands.add_parser(
        "quantize", help="quantize a model and save a checkpoint that transformers and vLLM load"
    )
    quantize.set_defaults(command=_quantize)
    if "quantize" in argv:
        _add_quantize_arguments(quantize)

    export = commands.add_parser("export", help="write a model, quantized or not, as a folder that others load")
    export.set_defaults(command=_export)
    if "export" in argv:
        _add_export_arguments(export)

    profile = commands.add_parser("profile", help="what a Triton kernel does on a GPU that is not here, counted")
    profile.set_defaults(command=_profile)
    if "profile" in argv:
        _add_profile_arguments(profile)

    progress = commands.add_parser("progress", help="which exercises are solved")
    progress.set_defaults(command=_progress)
    return parser


def _add_grade_arguments(parser: argparse.ArgumentParser) -> None:
    from optinfer.course.grade import add_arguments

    add_arguments(parser)


def _grade(args: argparse.Namespace) -> int:
    from optinfer.course.grade import grade_command

    return grade_command(args)


def _add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    from optinfer.commands.quantize import add_quantize_arguments

    add_quantize_arguments(parser)


def _quantize(args: argparse.Namespace) -> int:
    from optinfer.commands.quantize import quantize_command

    return quantize_command(args)


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    from optinfer.commands.quantize import add_export_arguments

    add_export_arguments(parser)


def _export(args: argparse.Namespace) -> int:
    from optinfer.commands.quantize import export_command

    return export_command(args)


def _add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    from optinfer.profile import add_profile_arguments

    add_profile_arguments(parser)


def _profile(args: argparse.Namespace) -> int:
    from optinfer.profile import profile_command

    return profile_command(args)


def _progress(args: argparse.Namespace) -> int:
    from optinfer.course.records import progress_command

    return progress_command(args)


def _doctor(args: argparse.Namespace) -> int:
    from optinfer import doctor

    findings = doctor.examine()
    print(doctor.report(findings))
    return 1 if any(finding.fatal for finding in findings) else 0


def _lab(args: argparse.Namespace) -> int:
    from optinfer.course import lab

    return lab.open_lab(args.folder, browser=not args.no_browser, port=args.port)


def _fetch(args: argparse.Namespace) -> int:
    from optinfer import models

    print(models.default_model_path())
    return 0


def _bench(args: argparse.Namespace) -> int:
    from optinfer import bench, hardware, results
    from optinfer.bench.report import plot, show

    if args.suite == "compare":
        return _compare(args.files)
    if args.files:
        raise ValueError(f"only `bench compare` takes files; got {' '.join(args.files)}")
    suites = bench.available() if args.suite == "all" else [args.suite]
    folder = Path(args.out) if args.out else results.default_folder()
    machine = hardware.this_machine()
    for suite in suites:
        rows = bench.run(suite, quick=args.quick)
        print(show(rows))
        path = results.save(suite, rows, folder, machine=machine)
        print(f"written to {path}")
        try:
            plot(rows, path.with_suffix(".svg"))
        except ModuleNotFoundError:
            print("no plot: matplotlib is not installed")
    return 0


def _compare(files: list[str]) -> int:
    from optinfer import results
    from optinfer.bench.compare import compare
    from optinfer.bench.report import show

    if len(files) != 2:
        raise ValueError(f"compare takes two files of recorded results, got {len(files)}")
    before, after = (results.read(file) for file in files)
    rows = compare(before, after)
    print(f"before: {before.caption()}\nafter:  {after.caption()}")
    if before.device != after.device:
        print("two different devices: ratios compare machines, not code")
    print(show([row for row in rows if row["verdict"] != "same"] or rows))
    counts = {v: sum(row["verdict"] == v for row in rows) for v in ("faster", "slower", "same", "new", "gone")}
    print(", ".join(f"{count} {v}" for v, count in counts.items() if count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
