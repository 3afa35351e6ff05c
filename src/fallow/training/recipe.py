"""A recipe: everything that decides about a training run, as types. TOML in, one sentence for each mistake."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fallow.errors import FallowError


class Section(BaseModel):
    """Part of a file of settings: no unknown keys, no guessed types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Kind = TypeVar("_Kind", bound=Section)


class ModelRecipe(Section):
    """The decoder that is trained: a new one of these sizes, or with ``start`` one that exists, as it is."""

    start: str | None = None  # a folder, a GGUF file, a known name or a hub id: it is tuned, not begun anew
    hidden_size: int = Field(384, ge=16, multiple_of=16)
    intermediate_size: int = Field(1024, ge=16, multiple_of=16)
    layers: int = Field(8, ge=1, le=256)
    heads: int = Field(6, ge=1)
    key_value_heads: int | None = Field(None, ge=1)  # as many as heads
    activation: Literal["swiglu", "geglu", "reglu", "relu2"] = "swiglu"
    qk_norm: bool = False
    value_embedding_layers: tuple[int, ...] = ()
    residual_mixes: bool = False
    zero_outputs: bool = False
    logit_softcap: float | None = Field(None, gt=0)
    active_share: float | None = Field(None, gt=0, lt=1)  # of the neurons for a token, by statistical top-k
    tie_embeddings: bool = True
    rope_theta: float = Field(10_000.0, gt=1)

    @model_validator(mode="after")
    def _start_decides(self) -> Self:
        beside = sorted(self.model_fields_set - {"start"}) if self.start is not None else []
        if beside:
            raise ValueError(f"model.start brings its own {beside[0]}: leave {' and '.join(beside)} out")
        return self


class LoraRecipe(Section):
    """Adapters that are trained in place of the weights of ``model.start``."""

    rank: int = Field(16, ge=1)
    alpha: int | None = Field(None, ge=1)  # what they add is multiplied by alpha / rank; twice the rank if left out
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(("*_proj",), min_length=1)  # patterns of layers.0.q_proj and so on


class DistilRecipe(Section):
    """Learning the distribution of a ``teacher`` in place of the text: its Kullback-Leibler divergence is the loss.
    Weights are trained as the files of ``model.start`` store them, and written so."""

    teacher: str  # as model.start; it is dense, whatever plan it comes with
    plan: str | None = None  # the plan.json under which the model learns


class DataRecipe(Section):
    """Texts, their tokenizer, and how they are cut."""

    train: str = "python-stdlib"
    valid: str | None = None  # a share of the training text where there is none
    valid_share: float = Field(0.02, gt=0, lt=0.5)
    tokenizer: str | None = None  # a model's; where there is none, model.start's, or one trained on the text
    vocab_size: int = Field(8192, ge=257)
    context: int = Field(512, ge=8)
    isolate_documents: bool = False


class OptimizerRecipe(Section):
    """One optimizer and the parameters that it gets: ``parameters`` are patterns of names, the first rule that has one
    which matches wins. Hyperparameters that an optimizer does not have are refused."""

    kind: Literal["adamw", "muon", "scale", "apollo", "apollo-mini", "galore"]
    parameters: tuple[str, ...]
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] | None = None
    momentum: float | None = Field(None, ge=0, lt=1)
    rank: int | None = Field(None, ge=1)
    variance: float | None = Field(None, gt=0, lt=1)
    cautious: bool | None = None
    iterations: int | None = Field(None, ge=3, le=5)  # of Newton-Schulz, in Muon


class TrainRecipe(Section):
    """The loop. ``tokens`` are those of the whole run; shares are of its steps."""

    tokens: int = Field(ge=1)
    batch: int = Field(ge=1)  # sequences a step
    micro_batch: int | None = Field(None, ge=1)  # sequences at once; the whole batch where it is left out
    first_batch: int = Field(0, ge=0)  # sequences of the first step, rising to batch over ramp_share of the steps
    ramp_share: float = Field(0.0, ge=0, le=1)
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    warmup_share: float = Field(0.02, ge=0, le=1)
    decay_share: float = Field(0.2, ge=0, le=1)
    final_share: float = Field(0.0, ge=0, le=1)  # of the learning rate that is left at the end
    clip: float = Field(1.0, ge=0)  # the largest norm of the gradient; 0: whatever it is
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True
    fused_update: bool = False  # update in the backward pass: all gradients never exist at once, nothing is clipped
    checkpoint_activations: bool = False  # compute layers again in the backward pass instead of keeping them
    ema: float | None = Field(None, gt=0, lt=1)  # of the weights that are evaluated and exported
    on_bad_step: Literal["stop", "rollback"] = "stop"  # where the loss is not finite or leaps
    seed: int = Field(0, ge=0)


class SuperpositionRecipe(Section):
    """Token superposition (arXiv 2605.06546): over the first ``share`` of the steps a position of the model is a bag of
    ``bag`` tokens that follow one another, seen as the mean of their embeddings, and what is learnt is the next bag, so
    a step of as many positions reads ``bag`` times the text."""

    bag: int = Field(4, ge=2)
    share: float = Field(0.3, gt=0, lt=1)


class RestRecipe(Section):
    """Training to rest: the penalty on feed-forward neurons that are not zero. Shares are of the steps."""

    l1: float = Field(0.0, ge=0)  # nats for each unit of a token's summed neurons; 0: no penalty
    begin_share: float = Field(0.0, ge=0, le=1)  # when the penalty begins to rise
    full_share: float = Field(0.1, ge=0, le=1)  # and when it is there as a whole


class ReportRecipe(Section):
    """What is looked at and kept while it runs; in steps, 0 for never."""

    evaluate_every: int = Field(100, ge=0)
    evaluate_tokens: int = Field(65_536, ge=1)
    activity_tokens: int = Field(0, ge=0)  # tokens whose feed-forward neurons are counted at each evaluation
    sample_every: int = Field(0, ge=0)
    sample_prompt: str = ""
    sample_tokens: int = Field(64, ge=1)
    checkpoint_every: int = Field(200, ge=0)
    keep_checkpoints: int = Field(2, ge=1)  # the last ones; the best is kept beside them
    tensorboard: bool = True


class Recipe(Section):
    """A whole recipe."""

    name: str
    model: ModelRecipe
    data: DataRecipe
    train: TrainRecipe
    optimizer: tuple[OptimizerRecipe, ...] = Field(min_length=1)
    rest: RestRecipe = RestRecipe()
    report: ReportRecipe = ReportRecipe()
    lora: LoraRecipe | None = None
    distil: DistilRecipe | None = None
    superposition: SuperpositionRecipe | None = None

    @model_validator(mode="after")
    def _adapters_have_a_model(self) -> Self:
        if self.lora is not None and self.model.start is None:
            raise ValueError("[lora] adapts a model that exists: say which with model.start")
        return self

    @model_validator(mode="after")
    def _students_go_with(self) -> Self:
        if self.distil is None:
            return self
        if self.model.start is None:
            raise ValueError("[distil] trains a model that exists: say which with model.start")
        if self.lora is not None:
            raise ValueError("[distil] trains the model's own weights: leave [lora] out")
        if self.superposition is not None:
            raise ValueError("[distil] compares models token by token: leave [superposition] out")
        if self.train.fused_update:
            raise ValueError(
                "[distil] computes with rounded weights in both passes: set train.fused_update to false, so that the "
                "others are updated afterwards"
            )
        return self

    @model_validator(mode="after")
    def _windows_are_bags(self) -> Self:
        if self.superposition is None:
            return self
        bag = self.superposition.bag
        if self.data.context % bag:
            raise ValueError(f"superposition.bag is {bag}, which does not divide data.context = {self.data.context}")
        if self.data.isolate_documents:
            raise ValueError(
                "[superposition] lets a bag hold the end of a document: set data.isolate_documents to false"
            )
        if self.train.first_batch:
            raise ValueError("[superposition] has a batch of its own at the beginning: leave train.first_batch out")
        return self


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a TOML file, with ``overrides`` (``train.tokens=1000``, ``optimizer.0.lr=0.01``) laid over it.

    Raises ``FallowError`` with a sentence for each mistake.
    """
    document = read_toml(path)
    for override in overrides:
        _lay_over(document, override)
    return checked(Recipe, document, f"The recipe {path}")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as it stands. Raises ``FallowError``."""
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise FallowError(f"The file {path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FallowError(f"The file {path} is not TOML: {error}.") from error


def checked(kind: type[_Kind], document: Mapping[str, Any], where: str) -> _Kind:
    """``document`` as a ``kind``. Raises ``FallowError`` with a sentence for each mistake in ``where``."""
    try:
        return kind.model_validate(document, strict=False)
    except ValidationError as error:
        mistakes = " ".join(_sentence(kind, mistake) for mistake in error.errors())
        raise FallowError(f"{where} cannot be used: {mistakes}") from None


def _lay_over(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise FallowError(f"{override} is not an override: write section.key=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a word without quotes
    *sections, name = key.split(".")
    table: Any = document
    for section in sections:
        if isinstance(table, list):  # optimizer.0.lr
            table = table[int(section)] if section.isdecimal() and int(section) < len(table) else None
        else:
            table = table.setdefault(section, {})
        if not isinstance(table, dict | list):
            raise FallowError(f"{override}: {section} is no section of the recipe.")
    if not isinstance(table, dict):
        raise FallowError(f"{override}: name one by its number, as in {'.'.join(sections)}.0.{name}.")
    table[name] = value


def _sentence(kind: type[Section], mistake: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in mistake["loc"])
    match mistake["type"]:
        case "missing":
            return f"{where} is missing."
        case "extra_forbidden":
            return f"{where} is not known{_suggestion(kind, mistake['loc'])}"
        case "value_error":  # a rule of ours between several keys
            return f"{mistake['ctx']['error']}."
        case _:
            return f"{where} is {mistake['input']!r:.60}: {mistake['msg'][0].lower()}{mistake['msg'][1:]}."


def _suggestion(kind: type[Section], place: tuple[int | str, ...]) -> str:
    """The known key that looks most like the one that is not."""
    section: Any = kind
    for part in place[:-1]:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = getattr(annotation, "__args__", (annotation,))[0]
    near = difflib.get_close_matches(str(place[-1]), section.model_fields, n=1)
    return f": did you mean {near[0]}?" if near else f"; known keys are {', '.join(section.model_fields)}."
