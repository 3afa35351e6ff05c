"""Healing: a model is tuned under a plan by distillation from itself, so that it bears what rests.

What it takes lies in a folder beside the one that is written until the healed model is there, so that a command that
was killed goes on when it is called again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fallow.errors import FallowError
from fallow.files import write_json
from fallow.models.checkpoint import open_checkpoint
from fallow.models.tensors import Checkpoint
from fallow.models.tokenizer import load_tokenizer
from fallow.plan import FILE_NAME, SparsityPlan
from fallow.terminal import Progress
from fallow.training.compiler import has_compiler
from fallow.training.loop import StepReport
from fallow.training.recipe import (
    DataRecipe,
    DistilRecipe,
    ModelRecipe,
    OptimizerRecipe,
    Recipe,
    ReportRecipe,
    TrainRecipe,
)
from fallow.training.run import train

ALLOWANCE = 3.0
"""How many times the budget a plan may cost before it is healed. It need not be right: with the healed weights the
search goes on, to more or to less."""
_STEP_TOKENS = 16_384  # of a step, some ten windows: fewer are too few texts for one direction
_TOKENS_AT_ONCE = 4096  # in one pass; a window that is longer goes alone
_WORTH_COMPILING = 1 << 16  # tokens: compiling takes half a minute, which some 20,000 of SmolLM2 give back
_LEARNING_RATE = 2e-4
"""For AdamW. Weights must go half a step of their grid (0.03 for SmolLM2 in 4 bits) before anything changes, so this is
ten times what is usual for tuning in floating point."""
_CHECKPOINT_EVERY = 10  # steps: minutes
_STATE, _TEXT = "healing.json", "text.jsonl"


@dataclass(frozen=True)
class _State:
    """What a healing was begun with."""

    settings: dict[str, str]
    tokens: int
    price: float


@dataclass(frozen=True)
class Healing:
    """The model at ``model``, healed in ``folder`` with ``tokens`` in windows of ``context``; ``settings`` are what
    else decides about the plan."""

    folder: Path
    model: Path
    tokens: int
    context: int
    settings: dict[str, str]

    @staticmethod
    def beside(out: Path, model: Path, tokens: int, context: int, settings: dict[str, str]) -> Healing:
        """Raises ``FallowError`` where there are too few tokens, or the folder belongs to another healing."""
        if tokens < context:
            raise FallowError(f"Healing takes {tokens:,} tokens: give at least one window of {context:,}, better 100.")
        healing = Healing(out.with_name(f"{out.name}.healing"), model, tokens, context, settings)
        state = healing._state()
        if state is not None and (state.settings, state.tokens) != (settings, tokens):
            raise FallowError(
                f"{healing.folder} holds a healing that was begun with other settings: call it with those, or remove "
                "the folder."
            )
        return healing

    @property
    def has_begun(self) -> bool:
        return self._state() is not None

    @property
    def price(self) -> float:
        """The price that the search had for the plan."""
        state = self._state()
        assert state is not None
        return state.price

    def begin(self, plan: SparsityPlan, price: float, documents: Sequence[Sequence[int]]) -> None:
        """Keep what the healing takes: ``documents`` are token ids of the text that it learns on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer(self.model)
        with (self.folder / _TEXT).open("w", encoding="utf-8") as file:
            for ids in documents:
                file.write(json.dumps({"text": tokenizer.decode(ids)}) + "\n")
        plan.save(self.folder / FILE_NAME)
        write_json(self.folder / _STATE, asdict(_State(self.settings, self.tokens, price)))

    def run(self, on_note: Callable[[str], None], progress: Progress) -> Checkpoint:
        """Heal the model, or go on, to the end. Raises ``FallowError`` where it is stopped or the loss is lost."""
        losses: list[float] = []

        def report(step: StepReport) -> None:
            losses.append(step.loss)
            progress(f"healing, {step.loss:.4f} nats from dense", step.step, step.steps)

        result = train(self._recipe(), out=self.folder, on_step=report, on_note=on_note)
        if result.model is None:
            raise FallowError(
                f"The healing was stopped at step {result.step} of {result.steps}: the same command goes on from there."
            )
        if losses:
            on_note(f"Healed with {result.tokens:,} tokens: under the plan {losses[-1]:.4f} nats a token from dense.")
        return open_checkpoint(result.model)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _state(self) -> _State | None:
        path = self.folder / _STATE
        if not path.is_file():
            return None
        try:
            state = json.loads(path.read_bytes())
            return _State(dict(state["settings"]), int(state["tokens"]), float(state["price"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise FallowError(f"{path} is damaged: remove {self.folder} and begin again.") from None

    def _recipe(self) -> Recipe:
        text = str(self.folder / _TEXT)
        return Recipe(
            name="healing",
            model=ModelRecipe(start=str(self.model)),
            distil=DistilRecipe(teacher=str(self.model), plan=str(self.folder / FILE_NAME)),
            # The healed model is judged in the engine, on text of its own.
            data=DataRecipe(train=text, valid=text, context=self.context),
            train=TrainRecipe(
                tokens=self.tokens,
                batch=max(_STEP_TOKENS // self.context, 1),
                micro_batch=max(_TOKENS_AT_ONCE // self.context, 1),
                warmup_share=0.1,
                compile=self.tokens >= _WORTH_COMPILING and has_compiler(),
                checkpoint_activations=True,  # masks of chosen pages are as large as attention itself, in every layer
            ),
            optimizer=(OptimizerRecipe(kind="adamw", parameters=("*",), lr=_LEARNING_RATE),),
            report=ReportRecipe(
                evaluate_every=0,
                evaluate_tokens=self.context,
                checkpoint_every=_CHECKPOINT_EVERY,
                keep_checkpoints=1,
                tensorboard=False,
            ),
        )
