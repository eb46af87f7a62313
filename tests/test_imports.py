"""What importing costs, and which way imports run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import rooms

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    loaded = run_python("import sys, optinfer; print(*sys.modules)").split()
    heavy = {"torch", "transformers", "triton", "numpy", "matplotlib"}
    assert not heavy & set(loaded)


def test_kernels_folder_never_shadows_hugging_face() -> None:
    """`kernels` is a package of Hugging Face; a folder with an __init__.py of that name at the root would hide it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = "import importlib.util as u; s = u.find_spec('kernels'); print(s is None or s.origin is None)"
    assert run_python(spec).strip() == "True"


def test_unknown_public_name_lists_the_known() -> None:
    import optinfer

    with pytest.raises(AttributeError, match="no attribute 'quantise'.*load_model"):
        _ = optinfer.quantise


def test_rooms_import_what_the_table_allows_and_all_of_it() -> None:
    found = rooms.arrows(rooms.imports())
    forbidden = {arrow: found[arrow] for arrow in found.keys() - rooms.allowed()}
    assert not forbidden, f"not in scripts/rooms.py's table: {forbidden}"
    assert not rooms.allowed() - found.keys(), "in the table, but nobody's"
    assert set(map(rooms.room, rooms.modules())) == set(rooms.MAY_IMPORT)


def test_the_tables_arrows_run_one_way() -> None:
    order = list(rooms.MAY_IMPORT)
    assert not [arrow for arrow in rooms.allowed() if order.index(arrow[0]) <= order.index(arrow[1])]


def test_no_module_imports_itself_through_others() -> None:
    assert rooms.circles(rooms.imports()) == []


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """So that the three tests above can fail: at the top, in a function, relative, for types alone; a circle over rooms."""
    package = tmp_path / "optinfer"
    (package / "cpu").mkdir(parents=True)
    (tmp_path / "kernels" / "optinfer_kernels").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cpu" / "__init__.py").write_text("def f():\n    from .. import data\n")
    (package / "data.py").write_text("import optinfer.noise\nif TYPE_CHECKING:\n    from optinfer.cpu import f\n")
    (package / "noise.py").write_text("from optinfer.cpu import f\n")
    found = rooms.imports(tmp_path)
    assert set(rooms.arrows(found)) == {("cpu", "data"), ("data", "noise"), ("data", "cpu"), ("noise", "cpu")}
    assert [one for one in found if not one.runs] == [rooms.Import("optinfer.data", "optinfer.cpu", False)]
    assert rooms.circles(found) == [["optinfer.cpu", "optinfer.data", "optinfer.noise"]]
    (package / "noise.py").write_text("import json\n")
    assert rooms.circles(rooms.imports(tmp_path)) == []


def test_the_picture_shows_the_table() -> None:
    text = rooms.ARCHITECTURE.read_text(encoding="utf-8")
    assert rooms.picture() in text and rooms.drawn(text) == text


def test_quantization_waits_with_transformers() -> None:
    loaded = run_python("import sys, optinfer.quantization; print(*sys.modules)").split()
    assert "torch" in loaded and "transformers" not in loaded


def test_only_formats_ask_for_a_format_by_name() -> None:
    """Elsewhere in the package a comparison with a scheme's name would be a branch that its class should hold."""
    from optinfer.quantization import SCHEMES

    def compared(path: Path) -> set[str]:
        """String constants that a comparison is made with."""
        comparisons = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Compare)
        ]
        nodes = [inner for comparison in comparisons for inner in ast.walk(comparison)]
        return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}

    room = ROOT / "optinfer" / "quantization"
    found = {path: compared(path) & set(SCHEMES) for path in room.rglob("*.py") if path.parent.name != "formats"}
    assert {str(path.relative_to(room)): names for path, names in found.items() if names} == {}
