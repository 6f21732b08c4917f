"""When a role that ended is started again: pure rules, without clock or process.

Times are seconds on the caller's clock. Statuses are those of `subprocess`: negative where a signal ended it.
"""

from __future__ import annotations

from typing import Literal

KILL_FORGIVEN_S = 20.0  # who is killed after living so long was well
FAILURE_FORGIVEN_S = 300.0  # a failure of its own may need that long to show: an engine that loads a large model
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
PATIENCE = 10  # marks in a row: a kill is one, a failure of its own (or leaving unasked) two
HOPELESS = 78  # EX_CONFIG of sysexits.h: a role says that only the user can mend what is wrong
STOPPED = (130, 143)  # a role that was asked to stop, once or twice, by somebody else than the launcher

End = Literal["completed", "stopped", "failed", "again"]


class RestartRule:
    """How long one role waits before it is started again, and when to give it up.

    Invariants:

    1. A life that was long enough (`KILL_FORGIVEN_S` before a kill, `FAILURE_FORGIVEN_S` before a failure) wipes
       all marks: being killed now and then never ends a run, however long that goes on.
    2. Deaths one soon after the other end in giving up: after 5 failures, or 10 kills.
    3. The pause doubles with every mark-earning death from `FIRST_PAUSE_S` up to `LONGEST_PAUSE_S`.
    """

    def __init__(self) -> None:
        self._marks = 0
        self._deaths = 0

    def pause_after(self, status: int, lived_s: float) -> float | None:
        """A death: seconds until it may be started again, or None: give up."""
        killed = status < 0
        if lived_s > (KILL_FORGIVEN_S if killed else FAILURE_FORGIVEN_S):
            self._marks = self._deaths = 0
        self._marks += 1 if killed else 2
        self._deaths += 1
        if self._marks > PATIENCE:
            return None
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self._deaths - 1))


def learner_end(status: int, ranks: int, error: str) -> End:
    """What the end of the learner means for the run.

    Args:
        ranks: of the learner; with more than one, the death of any is status 1 of them all.
        error: the one-line error that the user must mend (a full disk, …), or "".
    """
    if status == 0:
        return "completed"
    if status in STOPPED:
        return "stopped"
    if status < 0 or (ranks > 1 and not error):
        return "again"
    return "failed"
