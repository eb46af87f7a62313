"""The one error a user can act on: it says what is missing or wrong, and what to do about it."""


class OptinferError(RuntimeError):
    """Something outside the caller's code is missing or broken; the message says what to do."""
