"""The parser: PTX text becomes one kernel of registers, parameters and basic blocks of instructions.

It reads what Triton emits: one `.entry`, no calls, registers declared at the top or in a `{ }` of inline assembly.
"""

import re
from dataclasses import dataclass

WIDTHS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8}
WIDTHS |= {f"{letter}{bits}": bits for bits in (16, 32, 64) for letter in "busf"}

# Where the scheduler decides who runs next. Each of these stands alone in its block.
SCHEDULING = (
    "bar.sync",
    "barrier.sync",
    "barrier.cta.sync",
    "mbarrier.try_wait",
    "mbarrier.test_wait",
    "bra",
    "ret",
    "exit",
)


# ---- operands ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Register:
    name: str
    width: int  # bits; 1 for a predicate


@dataclass(frozen=True)
class Immediate:
    value: int  # the bits of it, also of a float


@dataclass(frozen=True)
class Special:
    name: str  # tid.x, ctaid.y, laneid, ...


@dataclass(frozen=True)
class Symbol:
    """A parameter, a label, or `global_smem`, where the block's shared memory begins."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """``[base + offset]``, of a tensor copy ``[base, {coordinates}]``."""

    base: "Operand"
    offset: int
    coordinates: tuple["Operand", ...] = ()


@dataclass(frozen=True)
class Vector:
    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Not:
    register: "Operand"


@dataclass(frozen=True)
class Pair:
    """The two targets of ``d|p``."""

    first: "Operand"
    second: "Operand"


Operand = Register | Immediate | Special | Symbol | Address | Vector | Not | Pair | None  # None: `_`, a sink


# ---- kernels ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Instruction:
    op: str  # "fma.rn.f32"
    operands: list[Operand]
    guard: Register | None = None
    negated: bool = False  # the guard is @!p
    line: int = 0  # of the PTX
    source: tuple[str, ...] = ()  # "kernel.py:30", from the innermost function outwards

    def __post_init__(self) -> None:
        self.parts = self.op.split(".")

    @property
    def where(self) -> str:
        return f"{self.op}, PTX line {self.line}" + (f", {' in '.join(self.source)}" if self.source else "")


@dataclass
class Kernel:
    name: str
    parameters: dict[str, tuple[str, int]]  # name -> (type, bytes), in order
    registers: dict[str, int]  # name -> bits
    blocks: list[list[Instruction]]
    labels: dict[str, int]  # label -> block
    threads: int
    locals: dict[str, tuple[int, int]]  # arrays of each thread for itself: name -> (offset, bytes)


def parse(text: str) -> Kernel:
    """The kernel in `text`; ValueError where there is none."""
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, re.S)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3]) if entry else None
    if entry is None or threads is None:
        raise ValueError("no kernel with a fixed number of threads in this PTX")
    parameters = {}
    for declaration in entry[2].split(","):
        if found := re.search(
            r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\b.*?([\w$]+)(?:\[(\d+)\])?\s*$", declaration, re.S
        ):
            kind, name, length = found.groups()
            parameters[name] = (kind, int(length or 1) * WIDTHS[kind] // 8)
    body = _Body(text, entry.end())
    blocks, labels = _blocks(body.items)
    return Kernel(entry[1], parameters, body.registers, blocks, labels, int(threads[1]), body.locals)


class _Body:
    """Reads statement by statement; knows which names the enclosing `{ }` have declared."""

    TOKEN = re.compile(
        r"(?P<space>(?:\s|//[^\n]*)+)|(?P<open>\{)|(?P<close>\})|(?P<loc>\.loc\b[^\n]*)"
        r"|(?P<label>[\w$]+):(?!:)|(?P<statement>[^;]+);"
    )

    def __init__(self, text: str, position: int):
        self.items: list[Instruction | str] = []  # instructions and labels
        self.registers: dict[str, int] = {}
        self.locals: dict[str, tuple[int, int]] = {}
        self.files = dict(re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', text))
        self.ranges: dict[str, int] = {}  # "%r" of `.reg .b32 %r<9>` -> bits
        self.scopes: list[dict[str, Register | Symbol]] = [{}]
        self.opened = 0
        self.source: tuple[str, ...] = ()
        line = text.count("\n", 0, position) + 1
        while self.scopes:
            token = self.TOKEN.match(text, position)
            if token is None:
                raise ValueError(f"PTX line {line}: cannot read {text[position : position + 40]!r}")
            getattr(self, f"_{token.lastgroup}")(token, line)
            line += text.count("\n", position, token.end())
            position = token.end()

    def _space(self, token: re.Match, line: int) -> None:
        pass

    def _open(self, token: re.Match, line: int) -> None:
        self.opened += 1
        inside = token.string[token.end() : _closing(token.string, token.end())]
        labels = re.findall(r"^\s*([\w$]+):(?!:)", inside, re.M)
        self.scopes.append({name: Symbol(f"{name}#{self.opened}") for name in labels})

    def _close(self, token: re.Match, line: int) -> None:
        self.scopes.pop()

    def _loc(self, token: re.Match, line: int) -> None:
        """Triton writes the chain of inlined functions into a comment."""
        places = re.findall(r"([\w.]+\.py:\d+)", token[0].partition("//")[2])
        if not places:
            _, file, number = token[0].split()[:3]
            places = [f"{self.files.get(file, '?').rsplit('/', 1)[-1]}:{number}"]
        self.source = tuple(places)

    def _label(self, token: re.Match, line: int) -> None:
        name = token["label"]
        local = self._declared(name)
        self.items.append(local.name if isinstance(local, Symbol) else name)

    def _statement(self, token: re.Match, line: int) -> None:
        text = " ".join(re.sub(r"//[^\n]*", "", token["statement"]).split())
        if text.startswith(".reg"):
            self._declare(text)
        elif array := re.fullmatch(r"\.local \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", text):
            end = sum(self.locals[next(reversed(self.locals))]) if self.locals else 0
            self.locals[array[2]] = (-(-end // int(array[1])) * int(array[1]), int(array[3]))
        elif text and not text.startswith(".pragma"):
            guard = re.match(r"@(!?)([%\w]+) ", text)
            op, _, operands = text[guard.end() if guard else 0 :].strip().partition(" ")
            register = self._register(guard[2]) if guard else None
            read = [self._operand(part) for part in _split(operands)] if operands.strip() else []
            self.items.append(Instruction(op, read, register, bool(guard and guard[1]), line, self.source))

    def _declare(self, text: str) -> None:
        _, kind, names = text.split(maxsplit=2)
        width = WIDTHS[kind[1:]]
        for name in map(str.strip, names.split(",")):
            if many := re.fullmatch(r"(.*)<\d+>", name):
                self.ranges[many[1]] = width
            else:
                register = Register(f"{name}#{self.opened}", width)
                self.scopes[-1][name] = register
                self.registers[register.name] = width

    def _declared(self, name: str) -> Register | Symbol | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def _register(self, name: str) -> Register | None:
        declared = self._declared(name)
        if isinstance(declared, Register):
            return declared
        width = self.ranges.get(name.rstrip("0123456789"))
        if width is None:
            return None
        self.registers[name] = width
        return Register(name, width)

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return None
        if text.startswith("{"):
            return Vector(tuple(map(self._operand, _split(text[1:-1]))))
        if text.startswith("["):
            first, *coordinates = _split(text[1:-1])
            base, _, offset = first.partition("+")
            return Address(self._operand(base), int(offset or "0", 0), tuple(map(self._operand, coordinates)))
        if text.startswith("!"):
            return Not(self._register(text[1:]))
        if "|" in text:
            return Pair(*map(self._operand, text.split("|")))
        if number := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]{8,16})", text):
            return Immediate(int(number[1], 16))
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        if register := self._register(text):
            return register
        if text.startswith("%"):
            return Special(text[1:])
        name, _, offset = text.partition("+")
        declared = self._declared(name.strip())
        return declared if isinstance(declared, Symbol) else Symbol(name.strip(), int(offset or "0", 0))


def _closing(text: str, position: int) -> int:
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        position += 1
    return position - 1


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    return re.split(r",(?![^{\[]*[}\]])", text) if "[" not in text else _split_nested(text)


def _split_nested(text: str) -> list[str]:
    parts, depth = [""], 0
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _blocks(items: list[Instruction | str]) -> tuple[list[list[Instruction]], dict[str, int]]:
    blocks: list[list[Instruction]] = [[]]
    labels = {}
    for item in items:
        alone = isinstance(item, str) or item.op.startswith(SCHEDULING)
        if alone and blocks[-1]:
            blocks.append([])
        if isinstance(item, str):
            labels[item] = len(blocks) - 1
            continue
        blocks[-1].append(item)
        if alone:
            blocks.append([])
    return blocks, labels
