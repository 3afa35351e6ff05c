"""Drafts by the model itself: under its plan it writes ahead, and the dense model of the same weights verifies.

Method: self-speculative decoding (Draft & Verify, arXiv 2309.08168). A row of the verification draws the token that a
dense step would draw, with the row's own seed and number, so outputs are the dense ones to the bit; keys and values of
drafted tokens are written again by it.
"""

from __future__ import annotations

from array import array

from fallow.errors import FallowError
from fallow.plan import SparsityPlan

KEPT = 0.9  # of the counts after another round


class OwnDraft:
    """What the plan has drafted of one sequence in this round, and how often its tokens came true.

    ``wanted`` tokens are drafted; 0: there is no round.
    """

    __slots__ = ("_right", "_tried", "tokens", "wanted")

    def __init__(self) -> None:
        self.tokens = array("i")
        self.wanted = 0
        # As if of five tokens before four had been right.
        self._right, self._tried = 4.0, 5.0

    @property
    def rate(self) -> float:
        return self._right / self._tried

    def add(self, token: int, *, is_last: bool) -> None:
        """The next drafted token; nothing follows one that ends the sequence."""
        self.tokens.append(token)
        if is_last:
            self.wanted = len(self.tokens)

    def observe(self, drafted: int, accepted: int) -> None:
        """How much of a round was right. Of what follows the first wrong token nothing is known."""
        self._right = KEPT * self._right + accepted
        self._tried = KEPT * self._tried + min(accepted + 1, drafted)

    def clear(self) -> None:
        """The round is over."""
        self.tokens = array("i")
        self.wanted = 0


def require_own_drafts(plan: SparsityPlan | None, model: str) -> None:
    """Raises ``FallowError`` where a model has no plan to draft with, or one whose steps cannot be dense."""
    if plan is None or not (plan.rules("attention") or plan.rules("head")):
        raise FallowError(
            f"speculation 'self' drafts under a plan with the axis attention or head, which {model} does not have: "
            "make one with fallow sparsify, or leave speculation out."
        )
    if plan.rules("structure"):
        raise FallowError(
            f"speculation 'self' verifies with the dense model, of which the plan of {model} takes parts out (the axis "
            "structure): take that axis out of the plan, or leave speculation out."
        )
    if any(rule.rule != "zeros" for rule in plan.rules("ffn")):
        raise FallowError(
            f"speculation 'self' verifies with the dense model, but the plan of {model} lets neurons rest below a "
            "threshold, which not every dense step can undo: take its axis ffn out, or leave speculation out."
        )
