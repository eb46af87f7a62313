"""Build the book: `python scripts/build_book.py [--fresh | --keep-outputs]` writes _build/html; open _build/html/index.html.

MathJax is fetched from npm once, into _build; the finished pages need no network. Every warning is an error.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import notebook_cache
from check_book import problems

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
HTML = BUILD / "html"
MATHJAX = ("mathjax", "3.2.2", "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09")


def npm_package(name: str, version: str, sha256: str) -> Path:
    """The unpacked npm package, fetched once and checked; in _build/npm.

    Raises:
        SystemExit: npm is missing, or what it fetched is not the expected file.
    """
    folder = BUILD / "npm" / f"{name}-{version}"
    if folder.is_dir():
        return folder
    if shutil.which("npm") is None:
        raise SystemExit("npm is missing; it fetches MathJax for the book (install Node.js)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=temporary, check=True, stdout=sys.stderr)
        (archive,) = Path(temporary).glob("*.tgz")
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != sha256:
            raise SystemExit(f"{name}@{version}: SHA-256 is {found}, expected {sha256}")
        with tarfile.open(archive) as content:
            content.extractall(temporary, filter="data")
        os.replace(Path(temporary) / "package", folder)
    return folder


def mathjax() -> None:
    """Put the part of MathJax that the pages load into _build/mathjax, a folder of static files."""
    target = BUILD / "mathjax" / "mathjax"
    if target.is_dir():
        return
    source = npm_package(*MATHJAX) / "es5"
    target.mkdir(parents=True)
    shutil.copytree(source / "output" / "chtml", target / "output" / "chtml")
    shutil.copyfile(source / "tex-mml-chtml.js", target / "tex-mml-chtml.js")


def build(fresh: bool = False, keep_outputs: bool = False) -> int:
    """Run Jupyter Book; returns its exit code."""
    if fresh:
        shutil.rmtree(HTML, ignore_errors=True)
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
        shutil.rmtree(notebook_cache.FOLDER, ignore_errors=True)
    mathjax()
    if not keep_outputs and not notebook_cache.prune():
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)  # pages hold outputs of the old sources
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", ".", "--config", "book.yml"]
    command += ["--toc", "notebooks/_toc.yml", "--warningiserror", "--keep-going"]
    environment = {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "0", **os.environ}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="forget earlier builds and executed notebooks")
    parser.add_argument(
        "--keep-outputs",
        action="store_true",
        help="for work on the text: execute changed notebooks only, even if the package changed",
    )
    args = parser.parse_args()
    start = time.perf_counter()
    code = build(args.fresh, args.keep_outputs)
    if code:
        return code
    found = problems(HTML)
    print(*found, sep="\n")
    print(f"Book built in {time.perf_counter() - start:.0f} s, {len(found)} problems: {HTML / 'index.html'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
