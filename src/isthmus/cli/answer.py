"""`isthmus chat`, `import` and `export`: talking to a model, and exchanging it with transformers' own classes."""

from __future__ import annotations

from contextlib import closing
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


class Kind(StrEnum):
    """What questions are about, for joints that treat kinds of tasks apart."""

    image = "image"
    region = "region"


def chat(
    model: Model,
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="Pictures of the first question.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask once, print the answer, leave.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Only the likeliest tokens that together have this probability.", min=0.01, max=1)
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Of the draws above temperature 0.  \\[default: another each time]")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system turn.  \\[default: the model's own]")] = None,
    route: Annotated[
        Kind | None,
        typer.Option(help="Ask about pictures as wholes or about places in them, where the joint treats these apart."),
    ] = None,
    device: Device = "auto",
    dtype: DType = "float32",
    endpoint: Endpoint = None,
    key_env: KeyEnv = None,
    remote: Settings = None,
) -> None:
    """Talk to a model in the terminal; pictures by path, answers streamed.

    In the conversation, `/image PATH` shows a picture with the next question, `/new` starts afresh, `/quit` leaves.
    Ctrl-C stops an answer.
    """
    from rich.console import Console

    console = Console(highlight=False)
    conversation = Conversation(list(image or []), system)
    if endpoint is not None:
        from isthmus.cli.options import remote_of

        limits: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        further = ({"top_p": top_p} if top_p < 1 else {}) | ({"route": route.value} if route else {})
        limits |= {"options": further} if further else {}
        with remote_of(model, endpoint, key_env, remote, **limits) as far:
            _talk(console, far, conversation, prompt, model)
            typer.echo(str(far.usage), err=True)
        return

    import torch

    from isthmus.cli.options import load_for_thread
    from isthmus.serving.facts import facts
    from isthmus.speakers.local import Local
    from isthmus.types import Route

    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    sampling: dict[str, Any] = drawn if temperature else {}
    if seed is not None:
        torch.manual_seed(seed)
    loaded = load_for_thread(model, dtype, device)
    near = Local(loaded, route=Route[route.upper()] if route else None, max_new_tokens=max_tokens, **sampling)
    _talk(console, near, conversation, prompt, model, facts(loaded))


def _talk(
    console, speaker, conversation: Conversation, prompt: str | None, name: str, about: dict[str, str] | None = None
) -> None:
    """One question, or a conversation until its end; `about` says of what the model is made, where that is known."""
    from rich.markup import escape

    if prompt is not None:
        _reply(console, speaker, conversation, prompt)
        return
    console.print(
        f"[dim]{name}. /image PATH shows a picture, /new starts afresh, Ctrl-C stops an answer, /quit leaves.[/dim]"
    )
    if about is not None:
        told = " · ".join(f"{what}: {value}" for what, value in about.items())
        console.print(f"[dim]{escape(told)}[/dim]")
    while True:
        try:
            said = console.input("[bold cyan]you[/bold cyan] ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if said == "/quit":
            break
        if said == "/new":
            conversation = Conversation([], conversation.system)
        elif said.startswith("/image "):
            conversation.show(console, Path(said.removeprefix("/image ").strip()).expanduser())
        elif said.startswith("/"):
            console.print(f"[red]no such command: {escape(said)}[/red]\n[yellow]/image PATH, /new, /quit[/yellow]")
        elif said:
            try:
                _reply(console, speaker, conversation, said)
            except KeyboardInterrupt:
                conversation.stop()
                console.print("\n[dim]stopped[/dim]")


class Conversation:
    """The turns so far, pictures that wait for the next question, and the pieces of the answer that is being given."""

    def __init__(self, waiting: list[Path], system: str | None = None):
        from isthmus.types import Turn

        self.turns: list[Turn] = [] if system is None else [Turn.say("system", system)]
        self.waiting, self.system = waiting, system
        self.shown: list[Path] = []
        self.pieces: list[str] = []

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
        self.shown, self.waiting, self.pieces = self.waiting, [], []

    def hear(self) -> None:
        """The answer is as whole as it will be."""
        from isthmus.types import Turn

        self.turns.append(Turn.say("assistant", "".join(self.pieces).strip()))

    def stop(self) -> None:
        """What was said so far is the answer; where nothing was, the question is as if it had not been asked."""
        if "".join(self.pieces).strip():
            self.hear()
        else:
            self.turns.pop()
            self.waiting = [*self.shown, *self.waiting]


def _reply(console, speaker, conversation: Conversation, said: str) -> None:
    """Ask, print the answer as it comes, and remember it."""
    conversation.ask(said)
    with closing(speaker.stream(conversation.turns)) as pieces:
        for piece in pieces:
            conversation.pieces.append(piece)
            console.print(piece, end="", markup=False)
    console.print()
    conversation.hear()


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
    from isthmus.exporting import llava, peft

    if onto is not None:
        hosts = peft.import_adapter(source, onto, out, part, name)
        typer.echo(f"{out}: {onto} with LoRA {name!r} on {len(hosts)} Linears of {part}")
        return
    _check_no_adapter(source)
    report = llava.import_llava(source, out)
    typer.echo(f"{out}: largest difference of logits {report.difference:.2e}")


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Where the exported directory goes.")],
    to: Annotated[
        Target, typer.Option(help="A class of transformers, GGUF for llama.cpp, ONNX, or peft's folders.")
    ] = Target.llava,
) -> None:
    """Write a model as a class of transformers, GGUF or ONNX, LoRA merged, its numbers checked; or LoRA for peft."""
    from isthmus.exporting import blip2, gguf, llava, onnx, peft

    match to:
        case Target.peft:
            for folder, hosts in peft.export_adapters(model, out).items():
                typer.echo(f"{folder}: LoRA on {hosts} Linears")
            return
        case Target.onnx:
            told = f"encoder and joint, largest difference of vectors {onnx.export(model, out).difference:.2e}"
        case Target.gguf:
            written = gguf.export(model, out)
            notes = "".join(f"\nnote: {note}" for note in written.notes)
            told = f"largest difference of logits {written.parity.difference:.2e}{notes}"
        case Target.llava:
            told = f"largest difference of logits {llava.export(model, out).difference:.2e}"
        case Target.blip2 | Target.instructblip:
            told = f"largest difference of logits {blip2.export(model, out, to.value).difference:.2e}"
    typer.echo(f"{out}: {told}")


def _check_no_adapter(source: Path) -> None:
    from isthmus.errors import ConfigError
    from isthmus.exporting.peft_file import CONFIG

    if (source / CONFIG).is_file():
        raise ConfigError(f"{source} is an adapter of peft, not a model", "say which model it goes on: --onto MODEL")
