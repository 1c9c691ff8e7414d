"""`isthmus serve`: a model behind OpenAI's protocol."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from isthmus.cli.options import Device, DType

LOOPBACK = ("localhost", "127.0.0.1", "::1")
HIDDEN = ("0.0.0.0", "::")


def serve(
    model: Annotated[str, typer.Argument(help="A directory that `isthmus train` wrote, or a hub name.")],
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 is every interface, and then needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any free one.", min=0, max=65535)] = 8000,
    api_key_env: Annotated[str | None, typer.Option(help="The environment variable that holds the key.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call it.  \\[default: the folder's name]")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name under which clients may call this server. Repeatable.")
    ] = None,
    media_host: Annotated[
        list[str] | None, typer.Option(help="A host from which pictures may be fetched; none by default. Repeatable.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Answers decoded together.", min=1)] = 16,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more get 429.", min=1)] = 64,
    context: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer.  \\[default: the LLM's]", min=2)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 1024,
    deadline: Annotated[float, typer.Option(help="Seconds that a request may take.", min=0.1)] = 300.0,
    prefix_mb: Annotated[int, typer.Option(help="Memory for earlier conversations, in MB.", min=0)] = 512,
    picture_mb: Annotated[int, typer.Option(help="Memory for features of earlier pictures, in MB.", min=0)] = 256,
    grace: Annotated[int, typer.Option(help="Seconds for running answers when the server is stopped.", min=0)] = 30,
    device: Device = "auto",
    dtype: DType = "float32",
) -> None:
    """Answer OpenAI's clients over HTTP: chat with pictures, streamed or whole, and embeddings. Ctrl-C stops it.

    The key comes from the environment variable that --api-key-env names. Without one, only this machine is served.
    """
    key = _key(api_key_env, host)
    try:
        from isthmus.serving.run import listen, serve_forever
    except ImportError as error:
        from isthmus.errors import ConfigError

        raise ConfigError(f"{error.name} is not installed", "pip install 'isthmus[serve]'") from None
    from pathlib import Path

    from isthmus.cli.options import load_for_thread
    from isthmus.serving.engine import Engine, Sizes
    from isthmus.serving.fetching import Fetcher
    from isthmus.serving.http import Access, Server
    from isthmus.serving.limits import Limits

    listening = listen(host, port)
    sizes = Sizes(max_batch, queue, context, prefix_bytes=prefix_mb << 20, picture_bytes=picture_mb << 20)
    engine = Engine(load_for_thread(model, dtype, device), sizes)
    server = Server(
        engine,
        name or Path(model).resolve().name,
        Access(key, _names(host, allow_host or [])),
        Limits(tokens=max_tokens, deadline=deadline),
        Fetcher(frozenset(each.lower() for each in media_host or ())),
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    address = f"http://{host if ':' not in host else f'[{host}]'}:{listening.getsockname()[1]}"
    typer.echo(f"{server.name} at {address}/v1" + ("" if key else ", no key"))
    typer.echo(f"a page to chat at {address}/")
    serve_forever(server, listening, grace)
    typer.echo("stopped")


def _names(host: str, further: list[str]) -> frozenset[str]:
    """How the server may be called; on all interfaces, where a key is a must, by any name unless some are given."""
    if host in HIDDEN and not further:
        return frozenset()
    given = (f"[{name}]" if ":" in name and not name.startswith("[") else name for name in (host, *further))
    return frozenset({"localhost", "127.0.0.1", "[::1]", *given})


def _key(variable: str | None, host: str) -> str | None:
    """The key that clients must send.

    Raises:
        ConfigError: the variable is empty, or anybody on the network could ask without a key.
    """
    from isthmus.errors import ConfigError

    key = os.environ.get(variable, "").strip() if variable else None
    if key == "":
        raise ConfigError(f"the environment variable {variable} holds no key", f"export {variable}=... first")
    if key is None and host not in LOOPBACK:
        raise ConfigError(f"{host} can be reached from other machines, and no key is set", "set --api-key-env VARIABLE")
    return key
