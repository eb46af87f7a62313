"""How many tokens to draft: measured while decoding, and zero when drafting does not pay."""

from collections import deque
from statistics import median

from optinfer.speculative.theory import optimal_gamma

_PRIOR_ACCEPTANCE = 0.6  # before anything is known of a drafter
_MEMORY = 0.85  # weight of the past against the newest round
_RECOVERY = 0.02  # a drafter that was turned off is trusted a little more each round, so it is tried again
_PRIOR_SLOPE = 0.03  # cost of one more verified token, in passes, before it was measured


class FixedLength:
    """Always the same number of tokens."""

    def __init__(self, most: int):
        self.most = most

    def choose(self, drafter: str) -> int:
        return self.most

    def record(self, drafter: str, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        pass


class AdaptiveLength(FixedLength):
    """The length with the best expected speed, from each drafter's recent acceptance and the measured times.

    The times decide only how much is drafted, never which tokens: the output's law does not depend on them.
    """

    def __init__(self, most: int):
        super().__init__(most)
        self._accepted: dict[str, tuple[float, float]] = {}  # drafter -> (accepted, tried), decayed
        self._draft_seconds: dict[str, deque[float]] = {}  # drafter -> seconds per drafted token
        self._plain: deque[float] = deque(maxlen=16)  # seconds of a pass over one token
        self._guessed: float | None = None  # the same, from a pass over a draft, while none over one token was timed
        self._rejected = False
        self._slope: deque[float] = deque(maxlen=16)  # seconds of each further token

    def acceptance(self, drafter: str) -> float:
        accepted, tried = self._accepted.setdefault(drafter, (_PRIOR_ACCEPTANCE, 1.0))
        return accepted / tried

    def verify_cost(self, tokens: int) -> float:
        """A pass over ``tokens`` tokens, in passes over one."""
        if not self._plain or not self._slope:
            return 1.0 + _PRIOR_SLOPE * (tokens - 1)
        return 1.0 + max(0.0, median(self._slope)) / median(self._plain) * (tokens - 1)

    def choose(self, drafter: str) -> int:
        if self._rejected and not self._plain:
            return 0  # there is a reason for doubt now: time a plain pass, which is what drafting has to beat
        times, plain = self._draft_seconds.get(drafter), self._plain_seconds()
        cost = median(times) / plain if times and plain else 0.0
        alpha = self.acceptance(drafter)
        chosen = optimal_gamma(alpha, cost, self.verify_cost, max_gamma=self.most)
        if chosen == 0:
            self._trust_more(drafter)
        return chosen

    def _plain_seconds(self) -> float | None:
        return median(self._plain) if self._plain else self._guessed

    def _trust_more(self, drafter: str) -> None:
        accepted, tried = self._accepted[drafter]
        self._accepted[drafter] = (min(tried, accepted + _RECOVERY * tried), tried)
        if accepted >= tried and (times := self._draft_seconds.get(drafter)):
            # Too slow even if it were never wrong: perhaps that was a busy moment, so its time is doubted as well.
            faded = median(times) * (1 - _RECOVERY)
            times.clear()
            times.append(faded)

    def record(self, drafter: str, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        if drafted == 0:
            self._plain.append(verify_seconds)
            return
        past_accepted, past_tried = self._accepted.setdefault(drafter, (_PRIOR_ACCEPTANCE, 1.0))
        tried = min(accepted + 1, drafted)  # nothing is known of the tokens behind a rejected one
        self._accepted[drafter] = (_MEMORY * past_accepted + accepted, _MEMORY * past_tried + tried)
        self._draft_seconds.setdefault(drafter, deque(maxlen=16)).append(draft_seconds / drafted)
        self._rejected |= accepted < drafted
        self._guessed = verify_seconds / (1.0 + _PRIOR_SLOPE * drafted)
        if self._plain:
            self._slope.append((verify_seconds - median(self._plain)) / drafted)
