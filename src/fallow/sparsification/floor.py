"""A task that a plan must still solve: of lm-eval, which needs the extra ``eval``, or needles in long documents."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fallow.engine.engine import Engine
from fallow.engine.sampling import SamplingParams
from fallow.errors import FallowError
from fallow.evaluate import TRIALS, is_needle
from fallow.evaluate.needle import DEPTHS, find_needles, needles
from fallow.models.tokenizer import Tokenizer
from fallow.sparsification.text import Question
from fallow.terminal import Progress


@dataclass(frozen=True)
class Floor:
    """``accuracy`` (0 to 1) in ``task``, a name that lm-eval knows or a task file of its, by its first ``limit``
    questions; or, where it ``is_needle``, in documents of ``context`` tokens, ``limit`` of them at each depth."""

    task: str
    accuracy: float
    context: int
    limit: int | None = None

    def questions(self, tokenizer: Tokenizer) -> list[Question]:
        """With answers, like those of the task but other ones, that tell what must be read far back: needles, one at
        each depth but the ends, which are always read. None for other tasks. Raises ``FallowError`` where the context
        is too short."""
        if not is_needle(self.task):
            return []
        found = [needle for depth in DEPTHS[1:-1] for needle in needles(tokenizer, self.context, depth, 1, seed=1)]
        return [Question(n.prompt, tokenizer.encode(f" {n.answer}", add_special_tokens=False)) for n in found]

    def reached_by(self, engine: Engine, progress: Progress) -> float:
        """The accuracy of an engine. Raises ``FallowError`` where the task cannot be run or has none."""
        if is_needle(self.task):
            return self._found_by(engine, progress)
        try:
            from fallow.evaluate.tasks import HarnessModel, Writing, accuracy, run_task  # noqa: PLC0415
        except ImportError as error:
            raise FallowError(f"The floor of a task needs lm-eval ({error}): pip install 'fallow[eval]'.") from error

        def writes(prompts: list[list[int]], how: Writing) -> list[str]:
            outputs = engine.generate(prompts, SamplingParams(seed=0, **asdict(how)))
            return [output.outputs[0].text for output in outputs]

        found = accuracy(
            run_task(
                HarnessModel(engine.runner, writes, engine.tokenizer, progress=progress), self.task, limit=self.limit
            )
        )
        if found is None:
            raise FallowError(f"The task {self.task} has no accuracy: take another one for a floor.")
        return found

    def _found_by(self, engine: Engine, progress: Progress) -> float:
        def answers(prompts: list[list[int]], tokens: int) -> list[str]:
            outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens))
            return [output.outputs[0].text for output in outputs]

        trials = self.limit or TRIALS
        return find_needles(answers, engine.tokenizer, context=self.context, trials=trials, progress=progress).accuracy
