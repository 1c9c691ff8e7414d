"""`isthmus chat`, `import` and `export`: talking to a model, and exchanging it with transformers' own classes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.cli.options import Device, DType, Endpoint, KeyEnv, Settings

Model = Annotated[str, typer.Argument(help="A directory that `isthmus train` wrote, or a hub name.")]


class Target(StrEnum):
    """What a model can be exported to."""

    llava = "llava"
    blip2 = "blip2"
    instructblip = "instructblip"
    gguf = "gguf"
    onnx = "onnx"
    peft = "peft"


def chat(
    model: Model,
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="Pictures of the first question.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask once, print the answer, leave.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    device: Device = "auto",
    dtype: DType = "float32",
    endpoint: Endpoint = None,
    key_env: KeyEnv = None,
    remote: Settings = None,
) -> None:
    """Talk to a model in the terminal; pictures by path, answers streamed.

    In the conversation, `/image PATH` shows a picture with the next question, `/new` starts afresh, `/quit` leaves.
    """
    from rich.console import Console

    console = Console(highlight=False)
    conversation = Conversation(list(image or []))
    if endpoint is not None:
        from isthmus.cli.options import remote_of

        limits = {"max_tokens": max_tokens, "temperature": temperature}
        with remote_of(model, endpoint, key_env, remote, **limits) as far:
            _talk(console, far, conversation, prompt, model)
            typer.echo(str(far.usage), err=True)
        return

    from isthmus.assembly import load
    from isthmus.cli.options import on
    from isthmus.speakers.local import Local

    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    near = Local(load(model, dtype, on(device)), max_new_tokens=max_tokens, **sampling)
    _talk(console, near, conversation, prompt, model)


def _talk(console, speaker, conversation: Conversation, prompt: str | None, name: str) -> None:
    """One question, or a conversation until its end."""
    from rich.markup import escape

    if prompt is not None:
        _reply(console, speaker, conversation, prompt)
        return
    console.print(f"[dim]{name}. /image PATH shows a picture, /new starts afresh, /quit leaves.[/dim]")
    while True:
        try:
            said = console.input("[bold cyan]you[/bold cyan] ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if said == "/quit":
            break
        if said == "/new":
            conversation = Conversation([])
        elif said.startswith("/image "):
            conversation.show(console, Path(said.removeprefix("/image ").strip()).expanduser())
        elif said.startswith("/"):
            console.print(f"[red]no such command: {escape(said)}[/red]\n[yellow]/image PATH, /new, /quit[/yellow]")
        elif said:
            _reply(console, speaker, conversation, said)


class Conversation:
    """The turns so far, and pictures that wait for the next question."""

    def __init__(self, waiting: list[Path]):
        from isthmus.types import Turn

        self.turns: list[Turn] = []
        self.waiting = waiting

    def show(self, console, path: Path) -> None:
        """Keep a picture for the next question, if it can be read."""
        from isthmus.data.media import open_image
        from isthmus.types import DataError

        try:
            open_image(path)
        except DataError as error:
            console.print(f"[red]{error.cause}[/red]\n[yellow]{error.remedy}[/yellow]")
        else:
            self.waiting.append(path)

    def ask(self, said: str) -> None:
        from isthmus.types import Image, Turn

        self.turns.append(Turn.say("user", *(Image(path) for path in self.waiting), said))
        self.waiting = []

    def hear(self, answer: str) -> None:
        from isthmus.types import Turn

        self.turns.append(Turn.say("assistant", answer))


def _reply(console, speaker, conversation: Conversation, said: str) -> None:
    """Ask, print the answer as it comes, and remember it."""
    conversation.ask(said)
    pieces = []
    for piece in speaker.stream(conversation.turns):
        pieces.append(piece)
        console.print(piece, end="", markup=False)
    console.print()
    conversation.hear("".join(pieces).strip())


def import_(
    source: Annotated[
        Path, typer.Argument(help="A LLaVA directory of transformers, or an adapter folder of peft (LoRA, DoRA).")
    ],
    out: Annotated[Path, typer.Argument(help="Where the Isthmus directory goes.")],
    onto: Annotated[str | None, typer.Option(help="The Isthmus model that a peft adapter is put onto.")] = None,
    part: Annotated[str, typer.Option(help="Its part that the adapter was trained on: llm, encoders.image.")] = "llm",
    name: Annotated[str, typer.Option(help="What the adapter is called in the model.")] = "adapter",
) -> None:
    """Bring an existing model in, and check that its logits are the same; or put a peft adapter onto a model."""
    from isthmus.exporting import import_adapter, import_llava

    if onto is not None:
        hosts = import_adapter(source, onto, out, part, name)
        typer.echo(f"{out}: {onto} with LoRA {name!r} on {len(hosts)} Linears of {part}")
        return
    _check_no_adapter(source)
    report = import_llava(source, out)
    typer.echo(f"{out}: largest difference of logits {report.difference:.2e}")


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Where the exported directory goes.")],
    to: Annotated[
        Target, typer.Option(help="A class of transformers, GGUF for llama.cpp, ONNX, or peft's folders.")
    ] = Target.llava,
) -> None:
    """Write a model as a class of transformers, GGUF or ONNX, LoRA merged, its numbers checked; or LoRA for peft."""
    from isthmus.exporting import export as to_llava
    from isthmus.exporting import export_adapters
    from isthmus.exporting_blip2 import export as to_blip2
    from isthmus.exporting_gguf import export as to_gguf
    from isthmus.exporting_onnx import export as to_onnx

    if to is Target.peft:
        for folder, hosts in export_adapters(model, out).items():
            typer.echo(f"{folder}: LoRA on {hosts} Linears")
        return
    if to is Target.onnx:
        report = to_onnx(model, out)
        typer.echo(f"{out}: encoder and joint, largest difference of vectors {report.difference:.2e}")
        return
    if to is Target.gguf:
        written = to_gguf(model, out)
        typer.echo(f"{out}: largest difference of logits {written.parity.difference:.2e}")
        for note in written.notes:
            typer.echo(f"note: {note}")
        return
    report = to_llava(model, out) if to is Target.llava else to_blip2(model, out, to.value)
    typer.echo(f"{out}: largest difference of logits {report.difference:.2e}")


def _check_no_adapter(source: Path) -> None:
    from isthmus.errors import ConfigError
    from isthmus.lora import CONFIG

    if (source / CONFIG).is_file():
        raise ConfigError(f"{source} is an adapter of peft, not a model", "say which model it goes on: --onto MODEL")
