"""One JavaScript module of several files: a notebook's page has no place from which a module could import another."""

import functools
import re
from pathlib import Path

_IMPORT = re.compile(r'^import \{ ([\w, ]+) \} from "\./(\w+\.js)";\n', re.MULTILINE)
_DECLARED = re.compile(r"^(export )?(?:async )?(?:function|class|const|let) (\w+)", re.MULTILINE)


@functools.cache
def inlined(path: Path) -> str:
    """The module at `path`, with the files that it imports by ``import { … } from "./name.js"`` before it.

    All share one scope, so that what a file declares at its top must have a name of its own.

    Raises:
        ValueError: an import that is not of this form, of a name that is not exported, or in a circle; a name declared twice.
    """
    parts: dict[Path, str] = {}
    _collect(path, parts, ())
    declared: dict[str, Path] = {}
    for file, text in parts.items():
        for _, name in _DECLARED.findall(text):
            if (other := declared.setdefault(name, file)) != file:
                raise ValueError(f"{file.name} declares {name!r}, and so does {other.name}")
    last = parts.pop(path)
    return "\n".join([*(re.sub("^export ", "", text, flags=re.MULTILINE) for text in parts.values()), last])


def _collect(path: Path, parts: dict[Path, str], above: tuple[Path, ...]) -> None:
    """Add a file after those that it imports."""
    if path in above:
        raise ValueError(f"{path.name} imports itself, through {', '.join(p.name for p in above[above.index(path) :])}")
    if path in parts:
        return
    text = path.read_text(encoding="utf-8")
    for names, imported in _IMPORT.findall(text):
        other = path.with_name(imported)
        _collect(other, parts, (*above, path))
        exported = {name for export, name in _DECLARED.findall(other.read_text(encoding="utf-8")) if export}
        if missing := set(names.split(", ")) - exported:
            raise ValueError(f"{path.name} imports {', '.join(sorted(missing))}, which {imported} does not export")
    text = _IMPORT.sub("", text)
    if re.search(r"^import\b", text, re.MULTILINE):
        raise ValueError(f'{path.name} has an import that is not of the form import {{ … }} from "./name.js";')
    parts[path] = text
