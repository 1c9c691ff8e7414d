"""Dotted names: overrides of nested mappings (`stages.align.lr=1e-3`), and what a name that is unknown may mean.

Lists of named things are walked by name or index, and are called by their names when something in them is wrong.
Values are read as YAML in which no key is twice.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from isthmus.errors import ConfigError, nearest

SCHEMA = "`isthmus recipes --schema` lists every key"
FEW = 12
"""Names that a remedy lists; what has more is a recipe, a stage or the engine, which the schema has."""
NAME, KEY = "NAME", "KEY"
"""What stand in a field's path for the items of a list and of a mapping."""
Path: TypeAlias = tuple[str, ...]

ELSEWHERE = {
    theirs: ours
    for ours, names in {
        "lr": "learning_rate mm_projector_lr base_lr",
        "batch_size": "per_device_train_batch_size train_batch_size global_batch_size",
        "accumulate": "gradient_accumulation_steps accumulate_grad_batches grad_accum",
        "budget.steps": "max_steps max_iters total_steps num_steps",
        "budget.epochs": "num_train_epochs num_epochs max_epochs",
        "recompute": "gradient_checkpointing activation_checkpointing",
        "schedule": "lr_scheduler_type lr_scheduler scheduler",
        "warmup": "warmup_ratio warmup_steps",
        "floor": "min_lr_ratio",
        "betas": "adam_beta1 adam_beta2",
        "clip": "max_grad_norm gradient_clip_val grad_clip",
        "max_length": "max_seq_length max_seq_len model_max_length cutoff_len",
        "batching": "packing group_by_length",
        "mode.r": "lora_r lora_rank",
        "mode.alpha": "lora_alpha",
        "mode.dropout": "lora_dropout",
        "mode.dora": "use_dora",
        "evaluate_every": "eval_steps",
        "save_every": "save_steps",
        "engine.keep": "save_total_limit",
        "engine.workers": "dataloader_num_workers num_workers",
        "engine.tensorboard": "report_to",
        "dtype": "bf16 fp16 torch_dtype precision",
        "llm.source": "model_name_or_path base_model language_model",
        "llm.attention": "attn_implementation",
        "llm.bits": "load_in_4bit load_in_8bit",
        "encoder.source": "vision_tower",
        "encoder.layer": "mm_vision_select_layer",
        "aligner.name": "mm_projector_type",
        "data": "data_path dataset datasets",
        "data.NAME.images": "image_folder",
    }.items()
    for theirs in names.split()
}
"""What fields are called in other toolkits, and the end of their path here."""
EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
"""Numbers that YAML 1.1 takes for texts."""
SHARES = {"warmup", "evaluate_every", "save_every"}
"""Fields that are shares of a stage, where others count steps."""


class OneOf(BaseModel):
    """A schema of which exactly one field is given; an override of one takes the place of another."""

    @model_validator(mode="before")
    @classmethod
    def _which(cls, value: Any) -> Any:
        if isinstance(value, str | int | float):
            first, *_ = names = list(cls.model_fields)
            told = {"value": value, "first": first, "names": ", ".join(names)}
            raise PydanticCustomError("bare", "{value} of which: {names}?", told)
        return value

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"a {type(self).__name__.lower()} is one of {names}; got {given or 'none'}")
        return self


class Once(yaml.SafeLoader):
    """YAML, and so JSON, of which no mapping has a key twice; what `<<` merges into one may be overruled.

    `1e-3` is a number, as in JSON and YAML 1.2; in YAML 1.1 only `1.0e-3` is.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in seen:
                raise ConfigError(
                    f"the key {key.value!r} stands in line {seen[name]} and again in line {line}",
                    "keep one of the two, or join what they hold; stages are items of one list",
                )
            seen[name] = line
        return node


class Quoting(yaml.SafeDumper):
    """Writes YAML that `Once` reads as the same values: a text that looks like `1e-3` stands in quotes."""


for reads_or_writes in (Once, Quoting):
    reads_or_writes.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("+-.0123456789"))


def plain(text: str) -> Any:
    """Plain values from YAML or JSON.

    Raises:
        ConfigError: a key is there twice.
        yaml.YAMLError: it is neither, or a value looks like a date or a number and is none.
    """
    try:
        loader = Once(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (ValueError, LookupError, AttributeError) as error:  # what the library's constructors stumble over
        raise yaml.YAMLError(f"a value that looks like a date or a number and is none: {error}") from None
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def written(tree: Mapping[str, Any]) -> str:
    """Plain values as YAML that `plain` reads as the same values."""
    return yaml.dump(tree, Dumper=Quoting, sort_keys=False)


def parse_value(text: str, key: str = "") -> Any:
    """The value of an override, read as YAML: `1e-3` is a number, `[a, b]` a list, `null` None, `"1e-3"` a text.

    Raises:
        ConfigError: in the value of this key, a key is there twice.
    """
    try:
        return plain(text)
    except yaml.YAMLError:
        return text
    except ConfigError as error:
        raise ConfigError(f"{key and f'{key}='}{text}: {error.cause}", error.remedy) from None


def assign(tree: Any, model: type[BaseModel], path: str, value: Any) -> None:
    """Set a value inside the nested mappings and lists of a schema's dump; a key may have dots, as globs have.

    Where one field alone may be given, it takes the place of another.
    """
    names, walked = path.split("."), list[str]()
    while True:
        key = _key(tree, names)
        names = names[key.count(".") + 1 :]
        place = _place(tree, key, walked[-1] if walked else "", path)
        walked.append(key)
        if not names:
            break
        if isinstance(tree, dict):
            if key not in tree:
                raise ConfigError(f"{path}: unknown key {key!r}{nearest(key, list(tree))}", SCHEMA)
            if isinstance(tree[key], tuple):
                tree[key] = list(tree[key])
            if not isinstance(tree[key], dict | list):
                tree[key] = {}
        tree = tree[place]
    if value is not None and any(issubclass(owner, OneOf) for way, owner in fields(model) if _fits(way, walked)):
        tree.clear()
    tree[place] = value


def _key(tree: Any, names: list[str]) -> str:
    """The next key: the longest that is there, or else the next name."""
    there = set(tree) if isinstance(tree, dict) else {_called(item, "") for item in tree}
    joined = (".".join(names[:count]) for count in range(len(names), 1, -1))
    return next((key for key in joined if key in there), names[0])


def _place(tree: Any, key: str, owner: str, whole: str) -> Any:
    """Where `key` is in a mapping (itself) or a list (the index of the item of that name)."""
    if isinstance(tree, dict):
        return key
    names = [_called(item, "") for item in tree]
    index = names.index(key) if key in names else int(key) if key.isdigit() else -1
    if not 0 <= index < len(tree):
        raise ConfigError(f"{whole}: no {owner} named {key!r}{nearest(key, names)}", f"there are {names}")
    return index


def _called(item: Any, otherwise: str) -> str:
    """The name of a list's item."""
    name = item.get("name") if isinstance(item, Mapping) else getattr(item, "name", None)
    return name if isinstance(name, str) else otherwise


# ---------------------------------------------------------------------------------------------- a schema's fields


def fields(model: type[BaseModel], above: Sequence[type] = ()) -> Iterator[tuple[Path, type[BaseModel]]]:
    """Every field below a schema by its path, with the schema that has it."""
    for name, field in model.model_fields.items():
        yield (name,), model
        for between, inner in _schemas(field.annotation):
            if inner not in (*above, model):
                yield from (((name, *between, *path), owner) for path, owner in fields(inner, (*above, model)))


def _schemas(annotation: Any) -> Iterator[tuple[Path, type[BaseModel]]]:
    """The schemas that an annotation may hold, each with what stands before its fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield (), annotation
    origin = get_origin(annotation)
    step = (NAME,) if origin in (tuple, list) else (KEY,) if origin is dict else ()
    for within in get_args(annotation):
        yield from (((*step, *path), inner) for path, inner in _schemas(within))


def _shared(path: Sequence[str], names: Sequence[str]) -> int:
    """How many first steps of a field's path are the same as names that were written."""
    for count, (step, name) in enumerate(zip(path, names)):
        if step not in (NAME, KEY, name):
            return count
    return min(len(path), len(names))


def _fits(path: Sequence[str], names: Sequence[str]) -> bool:
    return len(path) == len(names) == _shared(path, names)


# ---------------------------------------------------------------------------------------------- what is wrong


def explain(model: type[BaseModel], tree: Any, error: ValidationError, dotted: bool) -> tuple[str, str]:
    """All faults in one line, and a remedy; `dotted` where they are written as overrides, not as mappings."""
    found = [(_names(model, tree, fault), fault) for fault in error.errors()]
    ways = [names for names, _ in found]
    # of a union's branches, the one that comes furthest is meant
    deepest = [(names, fault) for names, fault in found if not any(names == way[: len(names)] != way for way in ways)]
    causes = [_cause(model, names, fault, dotted) for names, fault in deepest or found]
    remedies = [_remedy(names, fault, dotted) for names, fault in deepest or found]
    return "; ".join(dict.fromkeys(causes)), next(filter(None, remedies), _known(model))


def _known(model: type[BaseModel]) -> str:
    """What may be written: the options of a part, which no schema of a recipe has, by name."""
    names = list(model.model_fields)
    if len(names) > FEW:
        return SCHEMA
    return f"options are {', '.join(names)}" if names else "it has no options: leave them out"


def _names(model: type[BaseModel], tree: Any, fault: Any) -> list[str]:
    """Where a fault is, by the names that were written, without those of a union's branches."""
    known, names, node = {path[-1] for path, _ in fields(model)}, list[str](), tree
    for step in fault["loc"]:
        node = vars(node) if isinstance(node, BaseModel) else node
        if isinstance(node, Mapping) and step in node:
            names.append(str(step))
            node = node[step]
        elif isinstance(node, Sequence) and not isinstance(node, str) and isinstance(step, int) and step < len(node):
            node = node[step]
            name = _called(node, "")
            names.append(name if re.fullmatch(r"[\w-]+", name) else str(step))
        elif step in known or fault["type"] == "missing":
            names.append(str(step))
            node = None
    return names


def _cause(model: type[BaseModel], names: Sequence[str], fault: Any, dotted: bool) -> str:
    at = ".".join(names)
    if fault["type"] == "extra_forbidden":
        return f"unknown key {at!r}{_meant(model, names, fault['input'], dotted)}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{at}: {message}" if at else message


def _remedy(names: Sequence[str], fault: Any, dotted: bool) -> str:
    """How the value is written, where it is right but for its form."""
    value = fault["input"]
    if fault["type"] == "bare":
        form = f"{{{fault['ctx']['first']}: {value}}}"
    elif fault["type"] == "tuple_type" and isinstance(value, str):
        form = f"[{value}]"
    else:
        return ""
    return f"write {'.'.join(names)}={form}" if dotted else f"write {'.'.join(names[-1:])}: {form}"


def _meant(model: type[BaseModel], names: Sequence[str], value: Any, dotted: bool) -> str:
    """`; did you mean 'x'?`, with the whole way to a field that stands elsewhere; or nothing.

    The field is one that is called so in another toolkit, one of that name elsewhere, or the nearest, best beside it.
    """
    *above, key = names
    paths = [path for path, _ in fields(model)]
    end = tuple(ELSEWHERE.get(key.lower(), key).split("."))
    found = [path for path in paths if path[-len(end) :] == end]
    how = "; did you mean {!r}?"
    if key.lower() in ELSEWHERE and found:
        counted = key.lower().endswith("_steps") and end[-1] in SHARES
        how = "; it is called {!r} here" + ", and is a share of all steps" * counted
    beside = [path for path in paths if _fits(path[:-1], above)]
    for some in (beside, paths):
        close = [] if found else difflib.get_close_matches(key, sorted({path[-1] for path in some}), 1, 0.5)
        found = found or [path for path in some if path[-1] in close]
    if not found:
        return ""
    path = max(found, key=lambda path: (_shared(path, above), -len(path)))
    shared = _shared(path, above)
    if dotted or shared < len(above) or NAME in path[shared:]:
        return how.format(".".join((*above[:shared], *path[shared:])))
    *way, last = path[shared:]
    text = f"{last}: {_short(value)}" if way else last
    for step in reversed(way):
        text = f"{step}: {{{text}}}"
    return how.format(text)


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | int | float) else "…"
