"""Distillation: a model learns the distribution of a teacher, token by token, mostly to bear a plan.

The loss is the Kullback-Leibler divergence of the student from the teacher (Hinton et al., arXiv 1503.02531, at
temperature 1, without the labels' own loss): where the teacher is the model itself without the plan, what the plan did
to it is what is learnt, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fallow.errors import FallowError
from fallow.files import replacing_folder
from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder import Decoder
from fallow.models.decoder_weights import load_decoder
from fallow.models.head_screen import SCREEN_FILE
from fallow.models.rewrite import copy_model
from fallow.models.store import resolve
from fallow.models.tensors import Checkpoint
from fallow.models.tokenizer import Tokenizer
from fallow.plan import FILE_NAME, SparsityPlan
from fallow.training.loss import blockwise, compiled_once
from fallow.training.recipe import DistilRecipe, Recipe
from fallow.training.start import digest_of_model, has_other_tokens
from fallow.training.stored import StoredWeights


@dataclass(frozen=True)
class Distillation:
    """What a student is trained with: the dense ``teacher``, which is frozen, and its own weights as they are
    ``stored`` in the files of ``checkpoint``. ``digest`` is the same where model, teacher and plan are."""

    teacher: Decoder
    stored: StoredWeights
    checkpoint: Checkpoint
    plan: SparsityPlan
    digest: str

    def loss(self, student: Decoder, tokens: Tensor, documents: Tensor | None, counts: Tensor) -> Tensor:
        """The summed divergence (nats) of ``student`` from the teacher after those of ``tokens [batch, tokens]`` that
        ``counts`` (bool, of the same shape) says."""
        with torch.no_grad():
            known = self.teacher(tokens, documents).flatten(0, 1)
        return divergence(
            student(tokens, documents).flatten(0, 1),
            student.head,
            lambda part: self.teacher.logits(known[part]),
            counts.flatten(),
            softcap=student.config.logit_softcap,
            compiled=student.is_compiled,
        )

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write ``weights``, which have the decoder's names, to ``folder`` as the files that the student came from,
        with its plan. A screen of the head is left out, since the head has changed.

        Raises ``OSError`` where the disk has no room.
        """
        plan = replace(self.plan, head=None)
        with replacing_folder(folder) as partial:
            copy_model(self.checkpoint, self.stored.to_bytes(weights), partial, without=(FILE_NAME, SCREEN_FILE))
            if not plan.is_dense:
                plan.save(partial / FILE_NAME)


def open_distillation(
    recipe: Recipe, distil: DistilRecipe, student: Decoder, start: Path, tokenizer: Tokenizer
) -> Distillation:
    """Open the teacher, and make ``student``, which is the model at ``start``, obey its plan.

    Raises ``FallowError`` where the teacher cannot be compared with it, the plan does not fit, or no matrix can be
    trained as it is stored.
    """
    path = resolve(distil.teacher)
    known = open_checkpoint(path)
    if known.config.vocab_size != student.config.vocab_size or has_other_tokens(path, tokenizer):
        raise FallowError(
            f"distil.teacher is {distil.teacher}, whose tokens are not those of {recipe.model.start}: take a teacher "
            "with the same tokenizer."
        )
    if recipe.data.context > known.config.max_position_embeddings:
        raise FallowError(
            f"data.context is {recipe.data.context}, but {distil.teacher} sees {known.config.max_position_embeddings} "
            "tokens: use as many at most."
        )
    plan = SparsityPlan.dense() if distil.plan is None else SparsityPlan.load(distil.plan)
    student.obey(plan)
    checkpoint = open_checkpoint(start)
    stored = StoredWeights(student, checkpoint)
    if not stored.has_matrices:
        types = ", ".join(sorted({tensor.type.name for tensor in stored.frozen}))
        raise FallowError(
            f"The matrices of {recipe.model.start} are stored as {types}, in which they cannot be trained: use a file "
            "with Q4_0, Q4_1, Q8_0, F16, BF16 or F32."
        )
    digests = [digest_of_model(start), digest_of_model(path), plan.to_json()]
    digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    return Distillation(_frozen(known, student), stored, checkpoint, plan, digest)


def _frozen(checkpoint: Checkpoint, student: Decoder) -> Decoder:
    teacher = load_decoder(checkpoint, compute=student.compute, context=student.context).eval().requires_grad_(False)
    for parameter in teacher.parameters():
        if parameter.ndim == 2:  # in the type of the products: the same bits in half of the memory
            parameter.data = parameter.data.to(student.compute)
    return teacher


def divergence(
    hidden: Tensor,
    head: Tensor,
    teacher_logits: Callable[[slice], Tensor],
    counts: Tensor,
    *,
    softcap: float | None = None,
    block: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """The summed Kullback-Leibler divergence (nats, float32) from the teacher's distribution to that of ``hidden
    [tokens, hidden]`` under ``head [vocab, hidden]``, over the tokens that ``counts`` (bool ``[tokens]``).

    ``teacher_logits`` gives those of some of the tokens, ``[tokens, vocab]``. ``softcap`` is that of ``Decoder``,
    ``block`` the tokens whose logits exist at once. What is done to the logits of a block can be ``compiled``. The
    gradient, which goes to ``hidden`` and ``head`` alone, can be taken once.
    """
    compute = compiled_once(_block) if compiled else _block

    def of_block(logits: Tensor, part: slice, needs_gradient: bool) -> tuple[Tensor, Tensor]:
        return compute(logits, teacher_logits(part), counts[part, None], softcap, needs_gradient)

    return blockwise(hidden, head, of_block, block=block)


def _block(
    logits: Tensor, teacher_logits: Tensor, counted: Tensor, softcap: float | None, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The summed divergence of a block, and the gradient of its logits in their type."""
    wide = logits.float()
    if softcap is not None:
        capped = torch.tanh(wide / softcap)
        wide = softcap * capped
    own = wide.log_softmax(-1)
    known = teacher_logits.float().log_softmax(-1)
    likely = known.exp()
    loss = torch.where(counted, likely * (known - own), 0.0).sum()
    if not needs_gradient:
        return loss, logits
    gradient = (own.exp() - likely) * counted
    if softcap is not None:
        gradient = gradient * (1 - capped.square())
    return loss, gradient.to(logits.dtype)
