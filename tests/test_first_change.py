"""CONTRIBUTING's first changes, made in a copy of the package as they are written there, and what it says to run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("optinfer", "kernels", "scripts", "tests", "notebooks", "docs")
LINKED = ("data", ".venv")
FILES = ("pyproject.toml", "README.md", "CONTRIBUTING.md")
WALK = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Your first change", 1)[1].split("\n## ", 1)[0]
CHANGES = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", WALK, re.M | re.S))


def blocks(text: str) -> list[tuple[str, str, str]]:
    """Each fenced block: its language, the file that the text before it names last, and what it holds."""
    found, named, end = [], "", 0
    for fence in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        named = ([named, *re.findall(r"`([\w/]+\.(?:py|md))`", text[end : fence.start()])])[-1]
        found.append((fence[1], named, fence[2]))
        end = fence.end()
    return found


def patched(text: str, change: str) -> str:
    """`text` with the lines of a diff without line numbers: old ones must stand there once."""
    lines = [(line[:1] or " ", line[1:]) for line in change.splitlines()]
    old, new = ("".join(f"{line}\n" for mark, line in lines if mark != skipped) for skipped in "+-")
    assert old and text.count(old) == 1, f"these lines stand there {text.count(old)} times:\n{old}"
    return text.replace(old, new)


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{folder / 'kernels'}", "OMP_NUM_THREADS": "1"}
    programs = {"pytest": [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], "python": [sys.executable]}
    programs["ruff"] = [sys.executable, "-m", "ruff"]
    program, *arguments = command
    done = subprocess.run(
        [*programs[program], *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", [name if name == "An exercise" else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES]
)
def test_the_change_is_all_that_it_takes(name: str, tmp_path: Path) -> None:
    for folder in COPIED:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    for folder in LINKED:
        (tmp_path / folder).symlink_to(ROOT / folder)
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path)
    changed, ran = set(), []
    for language, file, text in blocks(CHANGES[name]):
        path = tmp_path / file
        if language == "python":
            assert not path.exists(), f"{file} is not new"
            path.write_text(text, encoding="utf-8")
        elif language == "diff":
            path.write_text(patched(path.read_text(encoding="utf-8"), text), encoding="utf-8")
        else:
            ran += [run(tmp_path, *shlex.split(line)) for line in text.splitlines()]
            continue
        changed.add(file)
    assert any(" passed" in out for out in ran) and not any("no tests ran" in out for out in ran)
    code = sorted(file for file in changed if file.endswith(".py"))
    run(tmp_path, "ruff", "check", *code)
    run(tmp_path, "ruff", "format", "--check", *code)
    run(tmp_path, "pytest", "tests/test_imports.py", "-k", "rooms or arrows or itself")


def test_what_the_text_promises_is_what_is_run() -> None:
    """A change without a test, or one whose blocks this file would not see, is none."""
    assert list(CHANGES) == ["A number format", "A drafter", "An exercise"]
    for text in CHANGES.values():
        kinds = [language for language, _, _ in blocks(text)]
        assert "diff" in kinds and "" in kinds and 2 * len(kinds) == len(re.findall(r"^```", text, re.M))
    with pytest.raises(AssertionError, match="stand there 0 times"):
        patched("a\nb\n", " a\n+x\n c\n")
    assert patched("a\nb\n", " a\n-b\n+c\n") == "a\nc\n"
