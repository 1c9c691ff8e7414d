"""`isthmus data filter | make | probe`: choose samples, have conversations written, learn which data are worth it."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from isthmus.cli.options import (
    AsJson,
    Device,
    Endpoint,
    FileSettings,
    Images,
    KeyEnv,
    Overrides,
    RecipeName,
    Settings,
    form_of,
    pairs,
)
from isthmus.errors import ConfigError, DataError

if TYPE_CHECKING:
    from isthmus.data.formats import Form
    from isthmus.data.records import Records
    from isthmus.data.writers import To
    from isthmus.prepare.filters import Measure
    from isthmus.speakers import Speaker
    from isthmus.types import Sample

Item = TypeVar("Item")
KINDS = "conversation,detail,reasoning"
QUICK = 2.0
"""Seconds that work may take before a bar tells how far it is."""

Data = Annotated[Path, typer.Argument(help="A file or folder of samples (see docs/data.md).")]
Target = Annotated[
    Path, typer.Argument(help="What is written; its ending says how: .json, .jsonl, .parquet, a folder.")
]
Clip = Annotated[str | None, typer.Option(help="A CLIP's or SigLIP's folder, for score.")]
Joint = Annotated[str | None, typer.Option(help="A directory that `isthmus train` wrote, for dependence.")]


def choose(
    path: Data,
    out: Target,
    keep: Annotated[list[str], typer.Option("--keep", "-k", help="words=3..60, score=top70%, side=3sigma ...")],
    images: Images = None,
    options: FileSettings = None,
    clip: Clip = None,
    joint: Joint = None,
    device: Device = "auto",
    against: Annotated[
        list[Path] | None,
        typer.Option(help="same-picture and same-text look in this file instead, such as a test set; again for more."),
    ] = None,
    numbers: Annotated[Path | None, typer.Option(help="Write every sample's numbers here, one JSON per line.")] = None,
    as_json: AsJson = False,
) -> None:
    """Keep the samples that all rules let pass, and say how many each rule dropped."""
    from isthmus.data import writers
    from isthmus.prepare import filters

    rules = [filters.Rule.parse(rule) for rule in keep]
    measures = _measures([rule.operator for rule in rules], clip, joint, device)
    kind = _kind(out)
    if numbers is not None:  # found out now, and not after all the measuring
        numbers.parent.mkdir(parents=True, exist_ok=True)
        numbers.touch()
    if against:
        _hold(measures, against)
    found = opened(form_of(path, images, options))
    with watched("measuring", len(found)) as passing:
        stats = filters.measured(passing(every(found)), measures)
    left = filters.kept(stats, rules)
    if numbers is not None:
        _write_numbers(numbers, found, stats)
    if not len(left.numbers):
        counts = ", ".join(f"{operator} dropped {count:,}" for operator, count in left.dropped.items())
        raise DataError(f"no sample is left of {len(found):,} ({counts})", "loosen the rules; --numbers FILE tells why")
    with watched("writing", len(left.numbers)) as passing:
        written = writers.write(passing(map(found.__getitem__, left.numbers.tolist())), out, kind)
    told = {"samples": len(found), "kept": written, "dropped": dict(left.dropped), "faulty": found.skipped}
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    for operator, count in left.dropped.items():
        typer.echo(f"{operator:>14}  dropped {count:,}")
    typer.echo(f"{out}: {written:,} of {len(found):,} samples")


def make(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Files or folders of samples; what they say of one picture is joined."),
    ],
    out: Target,
    model: Annotated[str, typer.Argument(help="A directory that `isthmus train` wrote; a name at --endpoint.")],
    kinds: Annotated[
        str, typer.Option(help="Of conversation, detail, reasoning; description by a model that sees.")
    ] = KINDS,
    limit: Annotated[int | None, typer.Option(help="At most so many pictures.")] = None,
    images: Images = None,
    options: FileSettings = None,
    endpoint: Endpoint = None,
    key_env: KeyEnv = None,
    remote: Settings = None,
    device: Device = "auto",
) -> None:
    """Have a model write conversations from captions, or describe pictures; -r cache=FOLDER makes it resumable."""
    from isthmus.cli.options import remote_of
    from isthmus.data import writers
    from isthmus.prepare import instructions

    kind, wanted = _kind(out), cast("list[instructions.Kind]", kinds.split(","))
    if set(wanted) - set(instructions.REQUESTS):
        raise ConfigError(f"cannot make {kinds}", f"kinds are {', '.join(instructions.REQUESTS)}")
    found = [opened(form_of(path, images, options)) for path in paths]
    with watched("gathering", sum(map(len, found))) as passing:
        bare = set(wanted) == {"description"}
        seen = instructions.gathered(passing(chain.from_iterable(map(every, found))), limit, bare)
    made = instructions.Made()
    if endpoint is not None:
        with remote_of(model, endpoint, key_env, remote, max_tokens=1024) as far, watched("asking", len(seen)) as asked:
            writers.write(instructions.make(asked(seen), wanted, far, made), out, kind)
        typer.echo(str(far.usage), err=True)
    else:
        near = _near(model, device, pairs(remote))
        with watched("asking", len(seen)) as asked:
            writers.write(instructions.make(asked(seen), wanted, near, made), out, kind)
    for rule, count in made.refused.most_common():
        typer.echo(f"{count:,} left out: {rule}")
    typer.echo(f"{out}: {made.samples:,} samples about {len(seen):,} pictures")


def _near(model: str, device: str, given: dict[str, Any]) -> Speaker:
    """A model in this process, whose answers are kept where `cache` says.

    Raises:
        ConfigError: another setting is given, which only an endpoint has.
    """
    from isthmus import storage
    from isthmus.assembly import load
    from isthmus.cli.options import on
    from isthmus.speakers.kept import Kept
    from isthmus.speakers.local import Local

    if foreign := sorted(set(given) - {"cache"}):
        raise ConfigError(f"{', '.join(foreign)}: settings of an endpoint", "name it with --endpoint; here only cache")
    near = Local(load(model, "auto", on(device)), max_new_tokens=512)
    if "cache" not in given:
        return near
    identity = {"weights": storage.fingerprint(model), "decoding": near.decode, "dtype": str(near.model.dtype)}
    return Kept(near, Path(str(given["cache"])), identity, _tell)


def probe(
    recipe: RecipeName,
    path: Data,
    fixed: Annotated[Path, typer.Option("--on", help="Samples that every training is measured on.")],
    operators: Annotated[str, typer.Option(help="Whose numbers split the data.")] = "words,repetition,sharpness",
    steps: Annotated[int, typer.Option(help="Of each training.")] = 100,
    seeds: Annotated[int, typer.Option(help="Trainings per pool.")] = 3,
    size: Annotated[
        int | None, typer.Option(help="Samples of a pool.  \\[default: those that a training draws, a third at most]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=2, help="2 tries intersections of the best pools too.")] = 1,
    images: Images = None,
    options: FileSettings = None,
    clip: Clip = None,
    joint: Joint = None,
    device: Device = "auto",
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Train the recipe's last stage on equal pools of the data, and rank what splits them by the loss elsewhere."""
    from isthmus.cli.options import on, recipe_of
    from isthmus.prepare import filters
    from isthmus.prepare import probe as probing
    from isthmus.training.trial import Trial

    chosen, measures = recipe_of(recipe, overrides), _measures(operators.split(","), clip, joint, device)
    found, held = (opened(form_of(file, images, options)) for file in (path, fixed))
    with watched("measuring", len(found)) as passing:
        stats = filters.measured(passing(every(found)), measures)
    silent = [name for name, values in stats.items() if not probing.thirds(values)]
    if len(silent) == len(stats):
        raise DataError(f"{', '.join(silent)}: not three different numbers, so no thirds", "name other --operators")
    for name in silent:
        _tell(f"{name}: not three different numbers, so no thirds; left out")
    trial = Trial(chosen, found.__getitem__, list(every(held)), steps, on(device))
    drawn = steps * chosen.last.batch_size
    pools, many = probing.pools(stats, size=drawn if size is None else size), range(seeds)
    reports = [probing.rank(pools, trial, many, _tell)]
    second = probing.combined(reports[0], stats) if rounds == 2 else []
    if second:
        chance = [pool for pool in pools if pool.part == probing.RANDOM]
        reports.append(probing.rank(probing.equal([*second, *chance]), trial, many, _tell))
    if as_json:
        typer.echo(json.dumps([report.told() for report in reports], indent=2))
        return
    for report in reports:
        for one in report.outcomes:
            typer.echo(
                f"{one.part:>32}  {one.mean:.4f} ± {one.deviation:.4f}  {one.change:+.1%}  of {one.size} samples"
            )
        typer.echo(f"{report.compared} pools were compared with the random one; among many, some look good by chance")


@contextlib.contextmanager
def watched(title: str, total: int | None = None) -> Iterator[Callable[[Iterable[Item]], Iterator[Item]]]:
    """What items pass through to be counted: by a bar on a terminal if it takes long, by nothing elsewhere."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield iter
        return
    from rich.console import Console

    from isthmus.training import log

    begun = time.monotonic()
    with log.counting(Console(stderr=True), title) as report:

        def passing(items: Iterable[Item]) -> Iterator[Item]:
            for done, item in enumerate(items, 1):
                yield item
                if time.monotonic() - begun > QUICK:
                    report(done, total)

        yield passing


def opened(form: Form) -> Records:
    """The samples of a file, which is read through if it has changed."""
    from rich.console import Console
    from rich.text import Text

    from isthmus.data.records import Records

    with Console(stderr=True).status(Text(f"reading {form.path}")):
        return Records(form)


def every(found: Records) -> Iterator[Sample]:
    return map(found.__getitem__, range(len(found)))


def _tell(told: str) -> None:
    typer.echo(told, err=True)


def _measures(names: list[str], clip: str | None, joint: str | None, device: str) -> dict[str, Measure]:
    """Operators by name; those that need a model load it once."""
    from isthmus.cli.options import on
    from isthmus.prepare import filters

    return {name: filters.measure(name, clip, joint, on(device)) for name in dict.fromkeys(names)}


def _hold(measures: dict[str, Measure], files: list[Path]) -> None:
    """Have what finds copies look for them in these files, each read by itself."""
    from isthmus.prepare.copies import Copies

    finders = [measure for measure in measures.values() if isinstance(measure, Copies)]
    if not finders:
        raise ConfigError("no rule looks for copies in --against", "add -k same-picture=..0 or -k same-text=..0")
    found = [opened(form_of(file, None, None)) for file in files]
    for finder in finders:
        with watched("looking at --against", sum(map(len, found))) as passing:
            finder.against(passing(chain.from_iterable(map(every, found))))


def _kind(out: Path) -> To:
    """How to write there.

    Raises:
        ConfigError: the ending does not say it, or something is there already.
    """
    from isthmus.data import writers

    if out.suffix not in writers.ENDINGS:
        known = ", ".join(filter(None, writers.ENDINGS))
        raise ConfigError(f"{out} does not say how to write", f"end it in {known}, or none")
    writers.refuse_taken(out)
    return writers.ENDINGS[out.suffix]


def _write_numbers(file: Path, found: Records, stats: dict[str, Any]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for number in range(len(found)):
            row = {name: None if values[number] != values[number] else values[number] for name, values in stats.items()}
            stream.write(json.dumps({"id": found[number].id, **row}) + "\n")
