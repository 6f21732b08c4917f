"""What no waiting mends: it ends the rewarder, and through it the run, with one line for the user.

An engine that cannot be asked is something else (`rewarders.engines.base.EngineUnavailable`): the group waits.
"""

from __future__ import annotations


class FatalScoringError(Exception):
    """Scoring cannot go on until somebody mends what the message names; it is one line and says what to do.

    Scorers and answerers raise it (or a subclass) out of scoring; no score is made up and no group is lost: the run
    goes on with `--resume`.
    """


class ScoringError(FatalScoringError):
    """The task cannot score what came back: its own code, or a user's metric or reward, fails or gives no number."""
