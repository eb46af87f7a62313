"""The figures' JavaScript: several files become one module, each of them runs by itself, and hashes are SHA-256."""

import hashlib
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from optinfer import widgets
from optinfer.widgets.modules import inlined
from tests.javascript import NODE, needs_node

FOLDER = Path(widgets.__file__).parent
FIGURES = sorted(path for path in FOLDER.glob("*.js") if path.with_suffix(".py").exists())


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.js").write_text(text, encoding="utf-8")
    return folder / "main.js"


def run(folder: Path, program: str, data: object = None) -> object:
    """What a program prints as JSON. `folder` holds the files, taken as modules."""
    (folder / "package.json").write_text('{"type": "module"}')
    command = [str(NODE), "--input-type=module", "-e", program]
    done = subprocess.run(command, cwd=folder, input=json.dumps(data), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_a_module_of_three_files_runs_as_one(tmp_path: Path) -> None:
    main = write(
        tmp_path,
        main='// A figure.\nimport { twice } from "./middle.js";\nimport { one } from "./low.js";\n\n'
        "export default { answer: twice(one) };\n",
        middle='import { one } from "./low.js";\n\nexport const twice = (x) => 2 * x * one;\n',
        low="const hidden = 1;\nexport const one = 21 * hidden;\n",
    )
    whole = inlined(main)
    assert whole.count("hidden = 1") == 1 and "import" not in whole and whole.count("export") == 1
    (tmp_path / "whole.js").write_text(whole)
    program = 'const m = await import("./NAME.js"); console.log(m.default.answer)'
    assert [run(tmp_path, program.replace("NAME", name)) for name in ("main", "whole")] == [882, 882]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"main": 'import { a } from "./low.js";\n', "low": "const a = 1;\n"}, "main.js imports a, which low.js does not"),
        ({"main": 'import { a } from "./low.js";\nconst b = 1;\n', "low": "export const a = 1;\nfunction b() {}\n"},
         "main.js declares 'b', and so does low.js"),
        ({"main": 'import * as low from "./low.js";\n', "low": ""}, "main.js has an import that is not of the form"),
        ({"main": 'import { a } from "./low.js";\n', "low": 'import { b } from "./main.js";\n'}, "main.js imports itself"),
    ],
)  # fmt: skip
def test_what_cannot_be_one_module_is_refused(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        inlined(write(tmp_path, **files))


@needs_node
@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_every_figure_is_one_module_and_so_are_its_files(path: Path, tmp_path: Path) -> None:
    for file in FOLDER.glob("*.js"):
        shutil.copy(file, tmp_path)
    (tmp_path / "whole.js").write_text(inlined(path), encoding="utf-8")
    program = 'console.log(JSON.stringify(Object.keys((await import("./NAME.js")).default)))'
    names = [run(tmp_path, program.replace("NAME", name)) for name in ("whole", path.stem)]
    assert names[0] == names[1] and "render" in names[0]


def test_nothing_is_written_twice() -> None:
    """Elements are made, and keys kept from JupyterLab, in dom.js alone."""
    for word in ("createElement", "lmSuppressShortcuts"):
        assert [path.name for path in sorted(FOLDER.glob("*.js")) if word in path.read_text(encoding="utf-8")] == [
            "dom.js"
        ]


def test_no_file_is_long() -> None:
    assert max(len(path.read_text(encoding="utf-8").splitlines()) for path in FOLDER.glob("*.js")) < 220


@needs_node
def test_hashes_are_sha_256(tmp_path: Path) -> None:
    rng = random.Random()
    texts = [bytes(rng.randrange(256) for _ in range(length)) for length in (*range(130), 1000)]
    shutil.copy(FOLDER / "sha256.js", tmp_path)
    program = (
        'import { readFileSync } from "node:fs"; import { sha256 } from "./sha256.js";'
        'console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map((bytes) => sha256(Uint8Array.from(bytes)))))'
    )
    found = run(tmp_path, program, [list(text) for text in texts])
    assert found == [hashlib.sha256(text).hexdigest() for text in texts]


@needs_node
def test_elements_leave_out_what_is_absent(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "dom.js", tmp_path)
    program = """
    import { element, keepKeys, shape } from "./dom.js";
    const made = (tag) => ({ tag, set: {}, children: [], dataset: {}, setAttribute(n, v) { this.set[n] = v; },
      append(...c) { this.children.push(...c); }, addEventListener(n, f) { this[n] = f; } });
    globalThis.document = { createElement: made, createElementNS: (space, tag) => made(`${space} ${tag}`) };
    const attributes = { title: null, "aria-pressed": "false", id: undefined, onclick: () => 7 };
    const button = element("button", attributes, "a", null, undefined, 0);
    keepKeys(button);
    button.focusin({ target: button });
    const { set, children, dataset } = button;
    console.log(JSON.stringify([set, children, dataset, button.onclick(), shape("path").tag]));
    """
    svg = "http://www.w3.org/2000/svg path"
    assert run(tmp_path, program) == [{"aria-pressed": "false"}, ["a", 0], {"lmSuppressShortcuts": "true"}, 7, svg]


@needs_node
def test_the_story_of_each_operation(tmp_path: Path) -> None:
    """Every operation of the demo is told by a name of its own and the sequence that it is about."""
    from optinfer.widgets.kv_memory import demo_manager

    for file in FOLDER.glob("*.js"):
        shutil.copy(file, tmp_path)
    program = """
    import { readFileSync } from "node:fs";
    import { groupByOperation, replay } from "./replay.js";
    import { tell } from "./kv_story.js";
    const operations = groupByOperation(JSON.parse(readFileSync(0, "utf8")));
    const states = [...Array(operations.length + 1).keys()].map((n) => replay(operations.slice(0, n).flat(), 16));
    console.log(JSON.stringify(states.map((_, step) => tell(operations, states, step))));
    """
    events = [event.to_dict() for event in demo_manager().events]
    told = run(tmp_path, program, events)
    assert isinstance(told, list)
    assert told[0] == ["", "An empty pool. Press play, or step through what the manager did."]
    assert {"new", "prefix hit", "grow", "fork", "copy-on-write", "preemption", "finish"} <= {name for name, _ in told}
    operations = [e for e in events if e["type"][:5] in ("Seque", "Token")]
    for event, (_, sentence) in zip(operations, told[1:], strict=True):
        assert str(event.get("seq_id", event.get("child_id"))) in sentence
