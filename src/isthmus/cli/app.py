"""The table of contents of the command line: every verb, and how an error becomes two lines and an exit code."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from isthmus.cli import answer, compare, data, gap, house, measure, parity, plan, runs, serve, torture, train
from isthmus.errors import IsthmusError


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"isthmus {version('isthmus')}")
        raise typer.Exit


def whole(
    told: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version it is.")
    ] = False,
) -> None:
    """Options that come before any verb."""


app = typer.Typer(
    callback=whole,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Build, align, compare and serve multimodal language models.",
    epilog="Start with [bold]isthmus data fetch demo[/bold] and [bold]isthmus demo[/bold].",
)

app.command("demo")(train.demo)
app.command("train")(train.train)
app.command("compare")(compare.compare)
app.command("plan")(plan.plan)
app.command("eval")(measure.evaluate)
app.command("gap")(gap.gap)
app.command("runs")(runs.runs)
app.command("chat")(answer.chat)
app.command("serve")(serve.serve)
app.command("import")(answer.import_)
app.command("export")(answer.export)
app.command("parity")(parity.parity)
app.command("recipes")(house.recipes)
app.command("papers")(house.papers)
app.command("doctor")(house.doctor)
app.add_typer(data.app, name="data", help="Fetch, check and look at data.")
app.add_typer(torture.app, name="torture", help="Kill training, and see that nothing is lost.")


def main() -> None:
    """Run a verb. Exit codes: 0 ok, 1 failure, 2 bad config or usage, 3 bad data, 4 not finite, 130 interrupted."""
    try:
        app()
    except IsthmusError as error:
        _complain(error.cause, error.remedy)
        sys.exit(error.code)
    except OSError as error:
        if error.filename is None:  # not a matter of a path that was named
            raise
        _complain(f"{error.filename}: {error.strerror}", "check the path, and who may read and write there")
        sys.exit(1)
    except KeyboardInterrupt:
        _complain("interrupted", "the same command goes on from the last saved step")
        sys.exit(130)


def _complain(cause: str, remedy: str) -> None:
    """Two lines on standard error."""
    typer.secho(f"error: {cause}", fg="red", err=True)
    if remedy:
        typer.secho(f"remedy: {remedy}", fg="yellow", err=True)


if __name__ == "__main__":
    main()
