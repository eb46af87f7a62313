"""The house's figures do not grow, and each of them can."""

from pathlib import Path

from scripts import house

MOST = {
    "circles of imports": 0,
    "imports against the rooms' order": 0,
    "functions of more than 50 lines": 2,
    "public arguments of any kind": 21,
}


def test_the_house_is_as_tidy_as_it_was() -> None:
    found = {name: value for name, value in house.figures().items() if isinstance(value, list)}
    assert found.keys() == MOST.keys()
    grown = {name: offenders for name, offenders in found.items() if len(offenders) > MOST[name]}
    assert not grown
    assert {name: len(offenders) for name, offenders in found.items()} == MOST, "tidier: lower the figure here"


UNTIDY = '''
from typing import Any
from optinfer import models

class Public:
    def method(self, kind: str, options: dict[str, Any], like: Any, text: str) -> None:
        """A docstring does not count."""
        def within(like: Any): ...

class _Private:
    def method(self, like: Any): ...

def long(scheme: "str | None") -> None:
'''


def test_what_is_untidy_is_found(tmp_path: Path) -> None:
    for folder in (*house.PACKAGE, *house.TESTS, *house.EXERCISES):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "optinfer" / "__init__.py").touch()
    (tmp_path / "optinfer" / "errors.py").write_text(UNTIDY + "    pass\n" * 51)
    (tmp_path / "optinfer" / "models.py").write_text("def f() -> None:\n    from optinfer import errors\n" + "\n" * 60)
    (tmp_path / "tests" / "test_one.py").write_text("x = 1\ny = 2\n")
    assert house.figures(tmp_path) == {
        "circles of imports": ["optinfer.errors - optinfer.models"],
        "imports against the rooms' order": ["errors -> models"],
        "functions of more than 50 lines": ["optinfer/errors.py:long"],
        "public arguments of any kind": [
            "optinfer/errors.py:Public.method(like)",
            "optinfer/errors.py:Public.method(kind)",
            "optinfer/errors.py:long(scheme)",
        ],
        "lines of the package": 126,
        "lines of exercises": 0,
        "lines of tests": 2,
    }
