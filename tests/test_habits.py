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
    assert ".ci/run" in [step.get("run") for step in ci["jobs"]["test"]["steps"]]
    nightly = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8"))
    pythons = re.findall(r":: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for job in (ci["jobs"]["test"], nightly["jobs"]["long"]):
        assert job["strategy"]["matrix"]["python"] == pythons
    assert (
        json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))["postCreateCommand"]
        == "make setup"
    )


def test_colabs_versions_are_nobodys_to_raise():
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text(encoding="utf-8"))["updates"]
    (pip,) = (update for update in updates if update["package-ecosystem"] == "pip")
    assert (ROOT / "constraints-colab.txt").exists() and pip["exclude-paths"] == ["constraints-colab.txt"]


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
    unknown = rooms_without_a_word(ROOT, named)
    assert not unknown, f"docs/ARCHITECTURE.md says nothing of {unknown}"


def rooms_without_a_word(root, named):
    """Folders of the package and the kernels that hold code and that the document does not name."""
    folders = {path.parent for base in ("optinfer", "kernels/*") for path in root.glob(f"{base}/*/*.py")}
    return sorted({str(folder.relative_to(root)) for folder in folders} - set(named))


def test_a_room_without_a_word_is_seen(tmp_path):
    for room in ("optinfer/known", "optinfer/unknown", "kernels/optinfer_kernels/new"):
        (tmp_path / room).mkdir(parents=True)
        (tmp_path / room / "module.py").touch()  # also without an __init__.py
    assert rooms_without_a_word(tmp_path, ["optinfer/known"]) == ["kernels/optinfer_kernels/new", "optinfer/unknown"]


def test_the_table_of_environment_variables_is_the_sources():
    used = set()
    for path in SOURCES:
        if path.suffix in (".py", ".sh", ".cpp", ".hpp"):
            used |= set(re.findall(r"OPTINFER_[A-Z_]*[A-Z]", path.read_text(encoding="utf-8")))
    assert set(re.findall(r"^\| `(OPTINFER_\w+)`", ARCHITECTURE, re.M)) == used


def test_a_test_named_by_an_address_is_refused() -> None:
    from types import SimpleNamespace

    from tests.conftest import pytest_collection_modifyitems

    pytest_collection_modifyitems([SimpleNamespace(nodeid="tests/test_a.py::test[int8]")])
    with pytest.raises(pytest.UsageError, match="0x7f0a"):
        pytest_collection_modifyitems([SimpleNamespace(nodeid="tests/test_a.py::test[<Draft object at 0x7f0a>]")])
