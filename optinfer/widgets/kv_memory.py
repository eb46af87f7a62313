"""KV Cache Memory Manager: sequences, block tables and physical pages, played from a real manager's event log."""

from pathlib import Path

import traitlets

from optinfer.kv_cache import BlockManager, OutOfBlocks, replay
from optinfer.widgets.base import StaticWidget

# Token ids 0 to 7 are the system prompt; the others are words for questions and answers.
WORDS = [
    *("You", "are", "a", "kind", "and", "brief", "tutor", "."),
    *("why", "is", "the", "sky", "blue", "?", "light", "scatters", "waves", "short", "most", "red", "sun", "low"),
    *("how", "do", "pages", "help", "memory", "grow", "one", "more", "token", "at", "time", "so", "no", "hole"),
]
SYSTEM_PROMPT = list(range(8))


class KVMemory(StaticWidget):
    """Watch a block manager work, and take over from any point.

    The recorded part is what the Python `BlockManager` did; the buttons continue with a JavaScript port of it
    that the tests hold equal to the original.

    Traits:
        events: the manager's log, as plain records.
        num_blocks, block_size, prefix_caching: the manager's.
        words: what to print for token ids 0, 1, 2 and so on.
        max_len: what the contiguous twin reserves under the policy "max", in tokens.
        policy: "max", "pow2" or "oracle".
        step: operations already played when the widget appears.
        interval_ms: time between operations when playing.
    """

    _esm = Path(__file__).with_suffix(".js")
    _widget_css = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

    events = traitlets.List().tag(sync=True)
    num_blocks = traitlets.Int(16).tag(sync=True)
    block_size = traitlets.Int(4).tag(sync=True)
    prefix_caching = traitlets.Bool(True).tag(sync=True)
    words = traitlets.List(WORDS).tag(sync=True)
    max_len = traitlets.Int(32).tag(sync=True)
    policy = traitlets.Enum(["max", "pow2", "oracle"], "max").tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)
    interval_ms = traitlets.Int(1100).tag(sync=True)

    @classmethod
    def of(cls, manager: BlockManager, **traits) -> "KVMemory":
        """The history of a manager that records events. Sequence ids must be strings or integers."""
        return cls(
            events=[event.to_dict() for event in manager.events],
            num_blocks=manager.num_blocks,
            block_size=manager.block_size,
            prefix_caching=manager.prefix_caching,
            **traits,
        )

    @classmethod
    def demo(cls, **traits) -> "KVMemory":
        """A short history with a prefix hit, a fork, copy-on-write, preemption, eviction and a recompute."""
        return cls.of(demo_manager(), **traits)

    def summary(self) -> str:
        state = replay_records(self.events, self.num_blocks)
        lines = [f"{len(state.tables)} sequences in {self.num_blocks} pages of {self.block_size} tokens"]
        lines += [f"{seq_id}: pages {', '.join(map(str, table))}" for seq_id, table in state.tables.items()]
        lines.append(f"free, next to be reused first: {', '.join(map(str, state.free_queue))}")
        return "\n".join(lines)


def replay_records(records: list[dict], num_blocks: int):
    """The state that plain records lead to."""
    from optinfer.kv_cache import events

    def event(record: dict):
        fields = {key: tuple(v) if isinstance(v, list) else v for key, v in record.items() if key != "type"}
        return getattr(events, record["type"])(**fields)

    return replay(map(event, records), num_blocks)


def demo_manager() -> BlockManager:
    """A manager with a story to tell, in 16 pages of 4 tokens."""
    token = {word: i for i, word in enumerate(WORDS)}

    def ids(text: str) -> list[int]:
        return [token[word] for word in text.split()]

    m = BlockManager(num_blocks=16, block_size=4)
    m.allocate("A", SYSTEM_PROMPT + ids("why is the sky blue ?"))
    for word in ("light", "scatters", "most"):
        m.append("A", ids(word))
    m.allocate("B", SYSTEM_PROMPT + ids("how do pages help ?"))  # the system prompt is there already
    m.append("B", ids("no"))
    m.fork("B", "C")  # two answers to one question
    m.append("C", ids("memory"))  # the shared last block is copied
    m.append("B", ids("hole"))
    m.append("B", ids("so"))
    m.free("A")
    m.allocate("D", ids("the sun is low so the light is red why is the red light most at time one"))
    m.append("C", ids("grow so"))
    late = ids("why do short waves help pages and how is the memory more kind at low sun time is no hole")
    m.allocate("E", late)  # now every page is taken
    try:
        m.append("B", ids("token"))
    except OutOfBlocks:
        m.preempt("E")  # who came last gives way
        m.append("B", ids("token"))
    m.free("B")
    m.allocate("E", late)  # back again, and most of it is still there
    m.append("E", ids("? so token"))
    m.free("D")
    m.allocate("F", ids("one more red token at a time so the sky is no more blue and low light scatters how so"))
    m.append("E", ids("sun"))
    m.free("C")
    return m
