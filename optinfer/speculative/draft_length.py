"""How many tokens to draft: measured while decoding, and zero when drafting does not pay."""

from collections import deque
from statistics import median

_PRIOR_ACCEPTANCE = 0.6  # of a drafter that shows no evidence, before anything is known of it
_PRIOR_HAZARD = 0.2  # after m matching tokens a copy ends with chance 1 / (m + this): near what our prompts show
_MOST_EVIDENCE = 16  # more matching tokens than this are not told apart
_MEMORY = 0.95  # weight of the past against the newest token
_RETRIES = 0.02  # share of the time that may go into trying a draft that was turned off: texts and machines change
PRIOR_SLOPE = 0.03  # cost of one more verified token, in passes, before it was measured


class Acceptance:
    """How often each drafter was right in one text, and from that how far drafting pays.

    Counted by *evidence*, where a drafter has some. A lookup that found the last m tokens earlier in the text has
    evidence m, and m + 1 once its first token was right: a copy that went well for long goes on. So one table says how
    far to trust a fresh match of one token and a run of twenty. A drafter without evidence has one chance for every
    position, Leviathan's alpha.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, int], tuple[float, float]] = {}  # right and tried, decayed
        self._earned: dict[str, float] = {}  # drafter -> passes it may spend on a try, while it is turned off

    def chance(self, drafter: str, evidence: int | None = None, position: int = 0) -> float:
        """That the drafted token at ``position`` is right, when those before it were."""
        right, tried = self._of(drafter, _level(evidence, position))
        return right / tried

    def best_length(self, most: int, drafter: str, evidence: int | None, per_token: float) -> int:
        """The number of drafted tokens, at most ``most``, with the largest expected speed; 0 where none beats plain decoding.

        Args:
            per_token: what a drafted token costs, drafting and checking, in plain passes.
        """
        best, best_speed, survival, tokens = 0, 1.0, 1.0, 1.0
        for gamma in range(1, most + 1):
            survival *= self.chance(drafter, evidence, gamma - 1)
            tokens += survival
            if (speed := tokens / (1.0 + gamma * per_token)) > best_speed:
                best, best_speed = gamma, speed
        return best or self._try_again(most, drafter, per_token)

    def record(self, drafter: str, evidence: int | None, drafted: int, accepted: int) -> None:
        """What became of a draft. Of the tokens behind a rejected one nothing is known."""
        for position in range(min(accepted + 1, drafted)):
            level = _level(evidence, position)
            right, tried = self._of(drafter, level)
            self._counts[drafter, level] = (_MEMORY * right + (position < accepted), _MEMORY * tried + 1)

    def _try_again(self, most: int, drafter: str, per_token: float) -> int:
        """One token, once the passes without a draft have earned what it costs; 0 before."""
        self._earned[drafter] = self._earned.get(drafter, 0.0) + _RETRIES
        if most == 0 or self._earned[drafter] < per_token:
            return 0
        self._earned[drafter] = 0.0
        return 1

    def _of(self, drafter: str, level: int) -> tuple[float, float]:
        prior = 1 - 1 / (level + _PRIOR_HAZARD) if level else _PRIOR_ACCEPTANCE
        return self._counts.get((drafter, level), (prior, 1.0))


class FixedLength:
    """Always the same number of tokens."""

    def __init__(self, most: int):
        self.most = most

    def choose(self, drafter: str, evidence: int | None = None) -> int:
        return self.most

    def record(
        self,
        drafter: str,
        drafted: int,
        accepted: int,
        draft_seconds: float,
        verify_seconds: float,
        evidence: int | None = None,
    ) -> None:
        pass


class AdaptiveLength(FixedLength):
    """The best length for one text at a time: its `Acceptance`, at the cost that was measured.

    The times decide only how much is drafted, never which tokens: the output's law does not depend on them.
    """

    def __init__(self, most: int):
        super().__init__(most)
        self.acceptance = Acceptance()
        self._draft_seconds: dict[str, deque[float]] = {}  # drafter -> seconds per drafted token
        self._plain: deque[float] = deque(maxlen=16)  # seconds of a pass over one token
        self._guessed: float | None = None  # the same, from a pass over a draft, while none over one token was timed
        self._rejected = False
        self._slope: deque[float] = deque(maxlen=16)  # seconds of each further token

    def choose(self, drafter: str, evidence: int | None = None) -> int:
        """The number of tokens with the largest expected speed-up; 0 where none exceeds 1."""
        doubtful = evidence is None or self.acceptance.chance(drafter, evidence) < 0.5
        if self._rejected and not self._plain and doubtful:
            return 0  # a strong match is not lost by waiting a pass: time what drafting has to beat
        per_token = self._draft_cost(drafter) + self._verify_slope()
        return self.acceptance.best_length(self.most, drafter, evidence, per_token)

    def record(
        self,
        drafter: str,
        drafted: int,
        accepted: int,
        draft_seconds: float,
        verify_seconds: float,
        evidence: int | None = None,
    ) -> None:
        """What a round brought."""
        if drafted == 0:
            self._plain.append(verify_seconds)
            return
        self.acceptance.record(drafter, evidence, drafted, accepted)
        self._draft_seconds.setdefault(drafter, deque(maxlen=16)).append(draft_seconds / drafted)
        self._rejected |= accepted < drafted
        self._guessed = verify_seconds / (1.0 + PRIOR_SLOPE * drafted)
        if self._plain:
            self._slope.append((verify_seconds - median(self._plain)) / drafted)

    def _draft_cost(self, drafter: str) -> float:
        """What drafting a token takes, in passes over one."""
        times, plain = self._draft_seconds.get(drafter), self._plain_seconds()
        return median(times) / plain if times and plain else 0.0

    def _verify_slope(self) -> float:
        """What each further token adds to a pass, in passes over one."""
        if not self._plain or not self._slope:
            return PRIOR_SLOPE
        return max(0.0, median(self._slope)) / median(self._plain)

    def _plain_seconds(self) -> float | None:
        return median(self._plain) if self._plain else self._guessed


def _level(evidence: int | None, position: int) -> int:
    """Where a drafted token is counted: every right token before it is more evidence. 0: together with all others."""
    return 0 if evidence is None else min(evidence + position, _MOST_EVIDENCE)
