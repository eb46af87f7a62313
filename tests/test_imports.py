"""What importing costs, and which way imports run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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


def imported_modules(path: Path) -> set[str]:
    """Every absolute module name imported anywhere in a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


CHAPTERS = ("quantization", "attention", "kv_cache", "speculative")


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapters_do_not_import_each_other(chapter: str) -> None:
    """Except paged attention, which uses attention's reference as the paper does."""
    allowed = {("kv_cache", "attention"), ("speculative", "quantization")}
    for path in (ROOT / "optinfer" / chapter).rglob("*.py"):
        for other in CHAPTERS:
            if other == chapter or (chapter, other) in allowed:
                continue
            crossing = [m for m in imported_modules(path) if m.startswith(f"optinfer.{other}")]
            assert not crossing, f"{path.relative_to(ROOT)} imports {crossing}"


def test_kernels_know_nothing_of_the_package() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        ours = [m for m in imported_modules(path) if m == "optinfer" or m.startswith("optinfer.")]
        assert not ours, f"{path.relative_to(ROOT)} imports {ours}"


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
