"""Training to rest: a penalty that lets most feed-forward neurons be exactly zero for any one token.

It is added to the gradient where the neurons are used, so that nothing has to be carried out of the layers: it is the
same under activation checkpointing, compiled, and in micro batches, and the loss that is reported stays the text's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fallow.errors import FallowError
from fallow.models.decoder import Decoder
from fallow.training.recipe import RestRecipe


class RestPenalty:
    """The L1 norm of each token's neurons, ``h = relu(gate) * up``, as a mean over tokens and layers, times ``l1`` nats
    (Cetin et al., arXiv 2603.23198, whose penalty is on the same product); the factor rises with the steps."""

    def __init__(self, decoder: Decoder, recipe: RestRecipe, steps: int) -> None:
        """Raises ``FallowError`` where no neuron of the decoder can be zero."""
        config = decoder.config
        if config.hidden_act not in ("relu", "relu2") and config.gate_quantile is None:
            raise FallowError(
                f"rest.l1 lets neurons come to rest at zero, where those of {config.hidden_act} never are: "
                "use the activation reglu or relu2, or model.active_share."
            )
        self.recipe, self.steps = recipe, steps
        self.layers = len(decoder.layers)
        self._force = torch.zeros((), device=decoder.head.device)  # on each neuron of each token
        for projection in decoder.down_projections:
            projection.register_forward_pre_hook(self._press)

    def factor(self, step: int) -> float:
        """How much of ``l1`` is in force at ``step`` (from 0): from nothing to all of it between the two shares."""
        begin, end = self.recipe.begin_share * self.steps, self.recipe.full_share * self.steps
        return min(max((step + 0.5 - begin) / max(end - begin, 1.0), 0.0), 1.0)

    def prepare(self, step: int, tokens: int) -> None:
        """For the gradients of the next ``tokens``, which are the batch of ``step``."""
        self._force.fill_(self.recipe.l1 * self.factor(step) / (self.layers * tokens))

    def _press(self, module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        if not torch.is_grad_enabled():
            return arguments
        pressed: Tensor = _Pressed.apply(arguments[0], self._force)  # type: ignore[no-untyped-call]
        return (pressed,)


class _Pressed(torch.autograd.Function):
    """The neurons as they are; their gradient, and a force towards zero on those that are not there yet."""

    @staticmethod
    def forward(ctx: Any, neurons: Tensor, force: Tensor) -> Tensor:
        ctx.save_for_backward(neurons, force)
        return neurons.view_as(neurons)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        neurons, force = ctx.saved_tensors
        return gradient + force.type_as(neurons) * neurons.sign(), None
