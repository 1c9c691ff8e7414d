"""Of what a model is made, in a few words for whoever talks to it: on the chat page and in the terminal."""

from __future__ import annotations

from isthmus import cards
from isthmus.model import VLM


def facts(model: VLM) -> dict[str, str]:
    """Of what the model is made, as a reader would ask; where its parts lie on the server's disk is not told."""
    named = {kind: cards.called(model.config.encoder(kind).source) for kind in model.config.encoders}
    encoders = list(named.values()) if len(named) == 1 else [f"{kind}: {name}" for kind, name in named.items()]
    parameters = sum(each.numel() for each in model.parameters())
    joint = sum(each.numel() for each in model.connectors.parameters())
    return {
        "Language model": cards.called(model.config.llm["config"]["source"]),
        "Encoder": ", ".join(encoders) or "none",
        "Joint": model.aligner.name,
        "Parameters": f"{_millions(parameters)}, of which {_millions(joint)} join the two",
    }


def _millions(count: int) -> str:
    """Two digits or more."""
    return f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{count / 1e6:.2g} M" if count >= 1e5 else f"{count:,}"
