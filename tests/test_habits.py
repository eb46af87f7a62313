"""What the project promises to those who join it is there: workflows that parse, targets and files that documents name."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
SOURCES = [
    *(ROOT / "optinfer").rglob("*"),
    *(ROOT / "kernels").rglob("*.py"),
    *(ROOT / "scripts").glob("*"),
    ROOT / "tests" / "conftest.py",
]


@pytest.mark.parametrize(
    "path", [*sorted(ROOT.glob(".github/**/*.yml")), ROOT / ".pre-commit-config.yaml"], ids=lambda p: p.name
)
def test_files_of_the_forge_parse(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


def test_ci_runs_what_everybody_runs_on_all_pythons():
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    job = ci["jobs"]["test"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    floor = re.search(r'requires-python = ">=3\.(\d+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert job["strategy"]["matrix"]["python"][0] == f"3.{floor}"
    assert (
        json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))["postCreateCommand"]
        == "make setup"
    )


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "docs/ARCHITECTURE.md", ".github/pull_request_template.md"]
)
def test_targets_that_documents_name_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M)):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"make {target}: {done.stderr}"


def test_every_room_and_file_of_the_architecture_exists():
    named = re.findall(r"`((?:optinfer|kernels|tests)/[\w./-]+)`", ARCHITECTURE)
    assert len(named) > 20 and not [path for path in named if not (ROOT / path).exists()]
    rooms = {p.name for p in (ROOT / "optinfer").iterdir() if (p / "__init__.py").exists()} - {"commands"}
    assert rooms <= {Path(path).name for path in named}


def test_the_table_of_environment_variables_is_the_sources():
    used = set()
    for path in SOURCES:
        if path.suffix in (".py", ".sh", ".cpp", ".hpp"):
            used |= set(re.findall(r"OPTINFER_[A-Z_]*[A-Z]", path.read_text(encoding="utf-8")))
    assert set(re.findall(r"^\| `(OPTINFER_\w+)`", ARCHITECTURE, re.M)) == used
