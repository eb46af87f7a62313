"""Text from tokens as they come: never half a character, never a piece of a stop string."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Incremental decoding of one continuation.

    A token may end inside a UTF-8 character; its text is held back until the character is whole. So is any tail
    that may turn out to be the beginning of a stop string. Special tokens are not shown, but a stop string may be one, or
    contain one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._text = ""  # special tokens included
        self._hidden: list[tuple[int, int]] = []  # where in it they stand: (begin, end)
        self._ids: list[int] = []  # the others' ids
        self._shown = self._read = 0  # ids[_shown:_read] are decoded already and give the next ones their context
        self._emitted = 0  # characters of `_text` that `take` handed over

    @property
    def text(self) -> str:
        """What is decoded so far, without special tokens."""
        return self._visible(0, len(self._text))

    def snapshot(self) -> tuple:
        """The state, for `restore`."""
        return self._text, len(self._hidden), len(self._ids), self._shown, self._read, self._emitted

    def restore(self, state: tuple) -> None:
        self._text, hidden, ids, self._shown, self._read, self._emitted = state
        del self._hidden[hidden:], self._ids[ids:]

    def push(self, token: int) -> bool:
        """Add a token; True when a stop string is complete, which then ends `text` (and is not part of it)."""
        if token in self._special:
            begin = len(self._text)
            self._text += self.tokenizer.decode([token], skip_special_tokens=False)
            self._hidden.append((begin, len(self._text)))
            return self._cut(begin)
        self._ids.append(token)
        return self._decode(final=False)

    def _decode(self, final: bool) -> bool:
        before = self._to_text(self._ids[self._shown : self._read])
        after = self._to_text(self._ids[self._shown :])
        if after.endswith("\ufffd") and not final:
            return False
        start = len(self._text)
        self._text += after[len(before) :]
        self._shown, self._read = self._read, len(self._ids)
        return self._cut(start)

    def _cut(self, start: int) -> bool:
        found = [self._text.find(s, max(0, start - len(s) + 1)) for s in self.stop]
        places = [place for place in found if place >= 0]
        if places:
            self._text = self._text[: min(places)]
        return bool(places)

    def finish(self) -> str:
        """The whole text; a broken character at the end becomes U+FFFD."""
        if self._read < len(self._ids):
            self._decode(final=True)
        return self.text

    def take(self, final: bool = False) -> str:
        """What is new and safe to show."""
        end = len(self._text) if final else len(self._text) - self._doubtful()
        piece = self._visible(self._emitted, end)
        self._emitted = max(self._emitted, end)
        return piece

    def _visible(self, begin: int, end: int) -> str:
        piece, at = "", begin
        for first, last in self._hidden:
            piece += self._text[at : max(at, min(first, end))]
            at = max(at, min(last, end))
        return piece + self._text[at:end]

    def _doubtful(self) -> int:
        """Length of the longest tail that begins a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        for length in range(min(longest, len(self._text)), 0, -1):
            if any(s.startswith(self._text[-length:]) for s in self.stop):
                return length
        return 0

    def _to_text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
