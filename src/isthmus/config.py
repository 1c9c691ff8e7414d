"""The recipe: what is joined, how it is trained and how it is measured, as frozen typed values.

A recipe is a Python function that returns a `Recipe`; YAML and JSON are the same fields written down, and the
command line overrides them by dotted name (`stages.align.lr=1e-3`). An unknown key is an error that names the
nearest known one. Nothing here is an import path, and nothing is ever executed from a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from isthmus.errors import ConfigError
from isthmus.errors import nearest as nearest
from isthmus.overrides import OneOf, assign, explain, plain, written
from isthmus.overrides import parse_value as parse_value

Model = TypeVar("Model", bound=BaseModel)
FILES = (".yaml", ".yml", ".json")
"""How the names of recipes' files end."""
LATER: dict[str, Any] = {"exclude_if": lambda value: value in (None, {})}
"""Of fields that came later: recipes that leave them out keep their fingerprints."""


class Frozen(BaseModel):
    """A value of the recipe: immutable, every key known, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def but(self, **changes: Any) -> Self:
        """A copy with fields replaced, validated again.

        Raises:
            ConfigError: a field is unknown, or a value does not fit its field.
        """
        return check(type(self), {**self.model_dump(), **changes}, type(self).__name__)


def _named(key: str) -> BeforeValidator:
    """Lets people write a bare name where a mapping is expected: `encoder: lite0` is `encoder: {source: lite0}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str | int | float) else value)


# ---------------------------------------------------------------------------------------------- parts


class EncoderConfig(Frozen):
    """A frozen tower that turns pixels into `Features`."""

    source: str = "efficientnet-lite0"
    """An embedded part, a folder, or a model's name on a hub."""
    revision: str | None = None
    layer: int | str = -2
    """Which state is `x_NSE`: a transformer's hidden state by index (-2 is the penultimate, as in LLaVA), or the
    name of a depth of a convolutional encoder. Ignored where the source has only one."""
    class_token: Literal["drop", "keep"] = "drop"
    taps: tuple[int | str, ...] = ()
    """Other depths that a joint reads; only these are computed and cached."""
    image_size: int | None = None
    """Side of the square input in pixels; None is the encoder's own."""
    bits: Literal[4, 8] | None = None
    """Hold the Linears in so many bits; they are then frozen, and LoRA trains beside them."""
    aspect: Literal["crop", "pad", "squash"] = "pad"
    """How a picture becomes square: centre crop, letter-box with the mean colour (LLaVA-1.5), or stretch."""
    architecture: dict[str, Any] | None = None
    """The source's own config, inline, so that `plan` needs neither hub nor folder."""
    also: tuple[Annotated[EncoderConfig, _named("source")], ...] = ()
    """Encoders that see the same picture beside this one."""
    join: Literal["concatenate", "interleave"] = "concatenate"
    """Their tokens side by side along the width, or, place by place, one behind the other."""


class LLMConfig(Frozen):
    """The language model that speaks."""

    source: str = "smollm2-135m-instruct"
    revision: str | None = None
    attention: Literal["isthmus", "sdpa", "eager", "flex_attention", "flash_attention_2"] = "isthmus"
    """transformers' attention kernel; `isthmus` is sdpa but on a CPU, for short and for causal rows (see `kernels`)."""
    bits: Literal[4, 8] | None = None
    """Hold the Linears in so many bits, all but the head; they are then frozen, and LoRA trains beside them."""
    architecture: dict[str, Any] | None = None
    """The source's own config, inline, so that `plan` needs neither hub nor folder."""


class AlignerConfig(Frozen):
    """The joint, by name, with the options of its paper (checked against the aligner's own schema)."""

    name: str = "llava"
    options: dict[str, Any] = Field(default_factory=dict)


# ---------------------------------------------------------------------------------------------- training


class LoRA(Frozen):
    """Low-rank update of the Linears that a glob matches: W + (alpha / r) B A. Hu et al., arXiv 2106.09685."""

    r: int = Field(16, ge=1)
    alpha: float = 32.0
    dropout: float = Field(0.0, ge=0, lt=1)
    dora: bool = False
    """Weight-decomposed: the column norms train apart. Liu et al., arXiv 2402.09353."""


class Train(Frozen):
    """How the parameters that a glob matches are trained."""

    lr: float | None = Field(None, gt=0)  # None takes the stage's
    weight_decay: float = Field(0.0, ge=0)
    decay_all: bool | None = Field(None, **LATER)
    """Whether biases, norms and gates decay as well as matrices, as in OpenFlamingo."""
    mode: Literal["full", "frozen"] | LoRA = "full"


class ObjectiveConfig(Frozen):
    """One term of the loss."""

    name: str
    weight: float = 1.0
    options: dict[str, Any] = Field(default_factory=dict)


class Source(Frozen):
    """One data set of a mix, by name of an embedded set or as a file, with its share."""

    name: str
    weight: float = Field(1.0, gt=0)
    """Share of the draws; shares are normalised over the mix."""
    split: str = "train"
    images: Path | None = None
    """Folder that relative picture paths start from."""
    limit: int | None = Field(None, ge=1)
    """At most this many samples, the first ones of the set's own order."""
    options: dict[str, Any] = Field(default_factory=dict)
    route: int | None = Field(None, ge=0, le=1, **LATER)
    """The kind of its tasks (`types.Route`), for joints that treat kinds apart; None lets every sample tell its own."""
    tags: dict[str, Any] = Field(default_factory=dict, **LATER)
    """What a tagger puts beside every picture (`prepare.tags.Tagging`); nothing by default."""


class Budget(Frozen, OneOf):
    """How long a stage lasts; exactly one is given. Minutes are turned into steps once and then frozen."""

    steps: int | None = Field(None, ge=0)
    samples: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    minutes: float | None = Field(None, gt=0)


Writing: TypeAlias = Literal["chat", "plain", "prefix", "documents"]
"""How a conversation is written: `chat` is the LLM's own template; `plain` is LLaVA's first stage, media, then the
answer, then the end; `prefix` is the same with the answer's first words given, to the encoder of an encoder-decoder;
`documents` has all turns in their order with nothing between."""
OneObjective: TypeAlias = Annotated[ObjectiveConfig, _named("name")]
OneSource: TypeAlias = Annotated[Source, _named("name")]
OneTrain: TypeAlias = Annotated[Train, _named("lr")]


class Stage(Frozen):
    """One leg of the training: data, what trains, the loss and how long."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    data: tuple[OneSource, ...]
    train: dict[str, OneTrain]
    """Ordered map from parameter globs to how they train; the last match wins, no match is frozen, and a glob
    that matches nothing is an error. `connectors.*` and `llm.*` are the usual ones."""
    objectives: tuple[OneObjective, ...] = (ObjectiveConfig(name="lm"),)
    budget: Budget
    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(16, ge=1)
    """Samples per optimizer step."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches that one optimizer step is split into; `batch_size` is divisible by it."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the rate rises linearly from 0."""
    floor: float | None = Field(None, ge=0, lt=1, **LATER)
    """Share of the rate that `schedule` ends at; None is 0."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    clip: float | None = Field(1.0, gt=0)
    """Largest global gradient norm; None leaves gradients alone."""
    max_length: int = Field(2048, ge=8)
    """Decoder tokens per sample. Media spans are atomic: see `overlong`."""
    overlong: Literal["error", "drop", "oldest"] = "error"
    """A longer sample: refuse, drop it (counted), or drop its oldest turns."""
    mixing: float | None = Field(None, ge=0, **LATER)
    """Shares are weights times the sets' sizes to this power: 0.5 is the root, 1 / T a temperature; None is 0."""
    batching: Literal["bucketed", "shuffled", "packed"] = "bucketed"
    max_media: int | None = Field(None, ge=1, **LATER)
    """Pictures that a packed row holds, beside its `max_length` tokens; None is no limit."""
    template: Writing = "chat"
    after_media: bool | None = Field(None, **LATER)
    """Nothing is learnt before a sample's first picture, as in OpenFlamingo; a sample without one is learnt whole. None
    is no."""
    evaluate_every: float | None = Field(0.25, gt=0, le=1)
    """Validation loss after this share of the stage; None only at its end."""
    save_every: float | None = Field(0.25, gt=0, le=1)
    recompute: bool = False
    """Activation checkpointing of the LLM's layers, and of those of encoders that train."""

    joint: dict[str, Any] = Field(default_factory=dict, **LATER)
    """Options of the joint that this stage sets, from it on; only such as change no parameters."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        return self


class Engine(Frozen):
    """How the machine does the work. Nothing here changes what is learnt, so a run may go on with other values."""

    cache: bool | None = Field(None, **LATER)
    """Keep the features of an encoder that no stage trains, so that each picture is encoded once; None is yes. Without
    it pictures are encoded in every step: for sets whose features no disk holds."""
    workers: int = Field(0, ge=0)
    """Processes that prepare batches ahead; 0 prepares them between steps."""
    keep: int = Field(2, ge=1)
    """Resumable checkpoints that stay; the best one by validation loss stays besides."""
    save_async: bool = False
    """Write checkpoints beside the training; the weights are copied first."""
    compile: bool = False
    """`torch.compile` the LLM's layers."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Over several processes: replicate what trains, or shard it (FSDP2)."""
    shard_frozen: bool = True
    """With `fsdp`, shard frozen parts too; otherwise every process holds them whole."""
    tensorboard: bool = False
    """Write TensorBoard events beside `metrics.jsonl`."""
    forecast: bool = True
    """Say before the training what it will take, and afterwards what it took; that costs a core some ten seconds."""


# ---------------------------------------------------------------------------------------------- recipe


class TaskConfig(Frozen):
    """One task of the evaluation; without a limit it has 500 items, or all those of a file of the user's own."""

    name: str
    limit: int | None = Field(None, ge=1)
    baseline_limit: int | None = Field(None, ge=1)
    """Items, drawn among the task's, that the model before training and the controls are asked; None: all."""
    controls: tuple[Literal["blind", "shuffled"], ...] = ("blind", "shuffled")
    """Baselines measured beside it: the picture blanked, and pictures exchanged between items."""
    options: dict[str, Any] = Field(default_factory=dict)


OneEncoder: TypeAlias = Annotated[EncoderConfig, _named("source")]
OneTask: TypeAlias = Annotated[TaskConfig, _named("name")]


class Recipe(Frozen):
    """Encoder, LLM and joint; the stages of their training; the evaluation; one seed."""

    name: str = Field("recipe", pattern=r"^[^\s/\\.-][^/\\\x00-\x1f]*$", max_length=100)  # a folder's, too
    about: str = ""  # one line of what it is
    encoder: OneEncoder = EncoderConfig()
    """The image encoder."""
    more_encoders: dict[Literal["video", "audio"], OneEncoder] = Field(default_factory=dict)
    """Refused in files and overrides: no data feed them yet."""
    llm: Annotated[LLMConfig, _named("source")] = LLMConfig()
    aligner: Annotated[AlignerConfig, _named("name")] = AlignerConfig()
    system: str | None = None
    """The system turn of conversations that have none; None leaves it to the LLM's chat template."""
    start: str | None = Field(None, **LATER)
    """A saved or imported model whose weights the first stage begins with; None composes it of the parts."""
    stages: tuple[Stage, ...] = ()
    eval: tuple[OneTask, ...] = ()
    engine: Engine = Engine()
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of frozen parts; what trains keeps float32 masters. `auto` asks the machine (see `doctor`)."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names repeat: {names}")
        return self

    @property
    def encoders(self) -> dict[str, EncoderConfig]:
        """Every encoder by kind."""
        return {"image": self.encoder, **{str(kind): encoder for kind, encoder in self.more_encoders.items()}}

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"no stage named {name!r}", f"stages are {[s.name for s in self.stages]}")

    @property
    def last(self) -> Stage:
        """The stage that ends the training.

        Raises:
            ConfigError: there is none.
        """
        if not self.stages:
            remedy = "write at least one into `stages`; `isthmus recipes --show llava` shows what one looks like"
            raise ConfigError(f"the recipe {self.name} has no stages: nothing would be trained", remedy)
        return self.stages[-1]

    def fingerprint(self) -> str:
        """Twelve hex digits that change with any field but `engine`."""
        canonical = json.dumps(self.model_dump(mode="json", exclude={"engine"}), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def override(self, assignments: Sequence[str]) -> Recipe:
        """A copy with dotted assignments applied: `["stages.align.lr=1e-3", "llm=./my-llm"]`.

        A unit of a budget takes the place of another: `stages.align.budget.steps=2`.

        Raises:
            ConfigError: a key is unknown, a value does not fit its field, or an encoder has no data.
        """
        tree = self.model_dump()
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals:
                raise ConfigError(f"override {assignment!r} has no '='", "write key=value, e.g. seed=1")
            assign(tree, Recipe, path.strip(), parse_value(text, path.strip()))
        return _fed(check(Recipe, tree, "override", dotted=True), "override")

    def save(self, path: Path) -> None:
        """Write as YAML or JSON, by the file's ending."""
        tree = self.model_dump(mode="json")
        text = json.dumps(tree, indent=2) if path.suffix == ".json" else written(tree)
        path.write_text(text, encoding="utf-8")


def read(path: str | Path) -> Recipe:
    """Read a recipe from YAML or JSON.

    Raises:
        ConfigError: not there, unreadable, not a mapping, a key is there twice, or a field is unknown or wrong.
    """
    path = Path(path)
    try:
        tree = plain(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = sorted(each.name for each in path.parent.glob("*") if each.suffix in FILES)
        raise ConfigError(
            f"no file {path}{nearest(path.name, beside)}",
            "check the path; `isthmus recipes --show NAME --brief` prints a recipe to begin with",
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.cause}", error.remedy) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = str(error).splitlines()[0]
        raise ConfigError(
            f"{path}: cannot be read as YAML or JSON ({cause})", "check the path and the syntax"
        ) from None
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: a recipe is a mapping of fields", "see `isthmus recipes --show NAME`")
    return parse(tree, str(path))


def parse(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validate a tree of plain values; what is wrong is told as by `check`."""
    return _fed(check(Recipe, tree, where), where)


def _fed(recipe: Recipe, where: str) -> Recipe:
    """The recipe, unless an encoder of it would never see data."""
    if recipe.more_encoders:
        cause = f"{where}: more_encoders: no data feed an encoder of {' or '.join(recipe.more_encoders)}"
        raise ConfigError(cause, "leave it out; frames of a video are pictures (options of its data: {frames: 8})")
    return recipe


def check(model: type[Model], tree: Mapping[str, Any], where: str, dotted: bool = False) -> Model:
    """Validate `tree` against any of our schemas; faults become one `ConfigError`, with what an unknown key may mean.

    Args:
        dotted: whether the values were written as overrides, so that a remedy is written so, too.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        cause, remedy = explain(model, tree, error, dotted)
        raise ConfigError(f"{where}: {cause}", remedy) from None
