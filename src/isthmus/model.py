"""The multimodal model: unmodified transformers parts, one joint, and the way between them.

`VLM.run` is the whole computation: embed, encode, connect, splice (or keep aside), rule, mask, LLM. Training calls it
with a `Batch`; `forward` and `generate` (in `generation`) are the same computation in the shape that transformers
expects. Nothing here knows a paper: every choice is asked of the aligner.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec

from isthmus import aligner as aligners
from isthmus import fuse, graft, kernels_linear, lora, sites, tokens
from isthmus.config import EncoderConfig, LoRA
from isthmus.encoders import Encoder
from isthmus.generation import Generation
from isthmus.processor import VLMProcessor
from isthmus.types import Batch, ConfigError, Context, DataError, Features, Media, Modality, Output, Past, Side


class VLMConfig(PreTrainedConfig):
    """Everything that the structure of a VLM is a function of.

    Fields:
        text_config: the LLM's own architecture.
        llm: `LLMConfig` fields and the fingerprint of the base weights.
        encoders: per kind, `EncoderConfig` fields, the architecture and the fingerprint.
        aligner: name and options.
        surgery: dotted module path inside the LLM -> [out, in] of a Linear whose shape was changed (pruning).
        lora: LoRA grafts in order of attachment: {globs, name, r, alpha, dropout, dora}.
        trained: globs of base tensors that are saved with the joint: trained in full, merged into, or else changed.
        whole: whether the checkpoint holds the base parts' weights too.
        template: how conversations are rendered (`chat`, `plain`).
    """

    model_type = "isthmus"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: Any = None
    llm: Any = None
    encoders: Any = None
    aligner: Any = None
    surgery: Any = None
    lora: Any = None
    trained: Any = None
    whole: bool = False
    template: str = "chat"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.is_encoder_decoder = bool(self.text_config.is_encoder_decoder)
        for name in ("llm", "encoders", "aligner", "surgery"):
            setattr(self, name, getattr(self, name) or {})
        for name in ("lora", "trained"):
            setattr(self, name, getattr(self, name) or [])

    def encoder(self, kind: str) -> EncoderConfig:
        return EncoderConfig(**self.encoders[kind]["config"])


class VLM(Generation, PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # saves and loads its own way
    """Encoder(s), connector(s) and LLM as one model that trains, generates, saves and loads like any other.

    Parameters are named `encoders.<kind>.*`, `connectors.<kind>.*`, `llm.*` and `heads.*`; what is added inside a
    part contains `.grafts.`.

    Args:
        config: the structure.
        llm: the base LLM, loaded or empty.
        encoders: the encoders by kind.

    Raises:
        ConfigError: the parts do not fit the joint, with the reason.
    """

    config_class = VLMConfig
    processor: VLMProcessor
    encoders: Any
    connectors: Any
    heads: Any
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VLMConfig, llm: PreTrainedModel, encoders: dict[str, Encoder]):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # by which transformers' Trainer counts labels as `forward` does
        config.text_config = llm.config  # the LLM's own, with its attention kernel; ours was a copy
        self.aligner = aligners.build(config.aligner["name"], config.aligner.get("options", {}))
        if config.is_encoder_decoder and not self.aligner.encoder_decoder:
            raise ConfigError(
                f"{self.aligner.name} does not work with an encoder-decoder LLM", "choose a decoder-only LLM"
            )
        if not config.is_encoder_decoder:
            with torch.device("cpu"):  # a plan builds on the meta device, where nothing can be asked
                seen_14 = torch.ones(1, 4, dtype=torch.long)  # four tokens of a picture
                rule, own = self.aligner.rule(seen_14, seen_14), self.aligner.positions(seen_14, seen_14, seen_14)
            fuse.check(llm.config, rule is not None, own is None)
        self.llm = llm.requires_grad_(False)
        self.encoders = nn.ModuleDict(encoders).requires_grad_(False)
        width = sites.embedding(llm).weight.shape[1]
        _resize(llm, config.surgery)
        kernels_linear.use_in_inference(llm, self.encoders)
        self.vocabulary = tokens.add_tokens(llm, len(self.aligner.new_tokens())) + len(self.aligner.new_tokens())
        self.connectors = nn.ModuleDict(
            {kind: self.aligner.connector(kind, encoder, width) for kind, encoder in encoders.items()}
        )
        self.heads = nn.ModuleDict(self.aligner.heads(width))
        additions = list(self.aligner.grafts(llm, self.encoders, width))
        for path, name, addition in additions:
            graft.graft(self, path, name, addition)
        self._lends_side = bool(additions)
        for adapter in config.lora:
            self._attach(adapter)
        self.generation_config = llm.generation_config
        self.post_init()

    def init_weights(self) -> None:
        """Nothing: every part initialises itself, and base weights come from their checkpoints."""

    def get_input_embeddings(self) -> nn.Module:
        return sites.embedding(self.llm)

    # ------------------------------------------------------------------------------------ placeholders

    def placeholder(self, kind: str) -> int:
        """The token id that media vectors overwrite: beyond the vocabulary, so it can be neither typed nor sampled."""
        return self.vocabulary + int(Modality[kind.upper()]) - 1

    def modality(self, ids_BT: Tensor) -> Tensor:
        """What stands at each position, told from the placeholder ids."""
        return (ids_BT - self.vocabulary + 1).clamp(min=0)

    def queries(self, kind: str) -> int:
        """Q: the connector tokens of one medium at the encoder's configured size."""
        return self.connectors[kind].tokens(self.encoders[kind].tokens)

    # ------------------------------------------------------------------------------------ the computation

    def run(
        self,
        batch: Batch,
        past: Past | None = None,
        keep: bool = False,
        need: Literal["hidden", "connected", "encoded"] = "hidden",
        idle: Tensor | None = None,
    ) -> Output:
        """From a batch to the LLM's states.

        Args:
            batch: with `past`, `input_ids_BT` holds the new tokens only, while `segment_BT` and `modality_BT`
                cover the past ones too.
            past: what an earlier call with `keep` returned; its cache grows in place.
            keep: return `Output.past` for the next call.
            need: `connected` stops before the LLM, `encoded` before the connectors.
            idle: a zero added to the LLM's input, so that a gradient goes to what it depends on.
        """
        encoded = {kind: self.encode(kind, media) for kind, media in batch.media.items()}
        connected = {} if need == "encoded" else self.connect(batch, encoded)
        if need != "hidden":
            return self._output(encoded, None, connected)
        embeds_BTD = self.embed(batch, connected)
        if idle is not None:
            embeds_BTD = embeds_BTD + idle.to(embeds_BTD.dtype)
        if self.config.is_encoder_decoder:
            hidden_BUD = self._run_encoder_decoder(batch, embeds_BTD, connected)
            return self._output(encoded, hidden_BUD, connected)
        if past is None:
            past = Past(DynamicCache(config=self.config.text_config) if keep else None)
        past = self.aside(batch, connected, past)
        hidden_BTD, side, positions_BT = self.think(
            embeds_BTD, batch.segment_BT, batch.modality_BT, batch.route_BT, past, batch.branch_BT
        )
        return self._output(encoded, hidden_BTD, connected, positions_BT, side, past if keep else None)

    def connect(self, batch: Batch, encoded: dict[str, Features] | None = None) -> dict[str, Tensor]:
        """Every kind of medium through its encoder (unless it is `encoded`) and connector: y_NQD by kind."""
        known = encoded or {}
        return {kind: self._connect(kind, media, batch, known.get(kind)) for kind, media in batch.media.items()}

    def blank(self, kind: str, batch: Batch) -> Tensor:
        """An empty medium of a kind, connected as one of this batch's first segment: y_NQD with N = 1."""
        first_N = batch.segment_BT.new_zeros(1)
        pixels = self.encoders[kind].blank().to(first_N.device)
        media = Media(row_N=first_N, segment_N=first_N + 1, at_N=first_N, pixels=pixels)
        return self._connect(kind, media, replace(batch, extra_text={}))

    def encode(self, kind: str, media: Media) -> Features:
        """What the connector of a kind reads of media: x [N, S, E], in its dtype, encoded unless it was cached."""
        encoder, connector, features = self.encoders[kind], self.connectors[kind], media.features
        if features is None:
            if media.pixels is None:
                raise DataError(f"{kind} without pixels or features", "collate with a reader of pixels or features")
            with torch.set_grad_enabled(torch.is_grad_enabled() and _learns(encoder)):
                features = encoder(media.pixels.to(next(encoder.parameters()).dtype))
        cast_back = connector.multiplies_first and torch.is_autocast_enabled(media.row_N.device.type)
        return features if cast_back else features.map(lambda x: x.to(next(connector.parameters()).dtype))

    def _connect(self, kind: str, media: Media, batch: Batch, features: Features | None = None) -> Tensor:
        route_N = None if batch.route_BT is None else _first(batch.route_BT, batch.segment_BT, media)
        context = Context(batch.extra_text, route_N, partial(sites.words, self.llm))
        return self.connectors[kind](self.encode(kind, media) if features is None else features, context)

    def embed(self, batch: Batch, connected: dict[str, Tensor]) -> Tensor:
        """Token embeddings, with connected media in place of their placeholders where the joint splices.

        Raises:
            DataError: there are more or fewer placeholders than vectors.
        """
        ids_BT = batch.input_ids_BT
        embeds_BTD = sites.embedding(self.llm)(ids_BT.masked_fill(ids_BT >= self.vocabulary, 0))
        if self.aligner.splices:
            for kind, connector in self.connectors.items():
                y_MD = embeds_BTD[0, :0]
                if kind in connected:
                    y_MD = fuse.rows(connected[kind], batch.media[kind].features, connector.tokens)
                embeds_BTD = fuse.splice(embeds_BTD, ids_BT == self.placeholder(kind), y_MD, kind)
        return embeds_BTD

    def aside(self, batch: Batch, connected: dict[str, Tensor], past: Past) -> Past:
        """The past with this batch's media behind those it holds; unchanged where the joint splices."""
        if self.aligner.splices or not connected:
            return past
        vision_BKQD, media_at_BK = fuse.by_row(connected, batch.media, len(batch.segment_BT))
        cached = batch.segment_BT.shape[1] - batch.input_ids_BT.shape[1]
        media_at_BK = torch.where(media_at_BK < 0, media_at_BK, media_at_BK + cached)
        if past.vision_BKQD is not None and past.media_at_BK is not None:
            vision_BKQD = torch.cat([past.vision_BKQD, vision_BKQD], 1)
            media_at_BK = torch.cat([past.media_at_BK, media_at_BK], 1)
        return Past(past.cache, vision_BKQD, media_at_BK)

    def think(
        self,
        embeds_BTD: Tensor,
        segment_BS: Tensor,
        modality_BS: Tensor,
        route_BS: Tensor | None,
        past: Past,
        branch_BS: Tensor | None = None,
    ) -> tuple[Tensor, Side, Tensor]:
        """The decoder with the joint's positions, rule and side: states of the T new positions, the last of S."""
        new = embeds_BTD.shape[1]
        counted_BS = fuse.positions(segment_BS, branch_BS)
        own_BS = self.aligner.positions(counted_BS, segment_BS, modality_BS)
        positions_BT = (counted_BS if own_BS is None else own_BS)[:, -new:]
        rule = self.aligner.rule(segment_BS, modality_BS)
        mask = fuse.masks(self.config.text_config, embeds_BTD, segment_BS, past.cache, rule, own_BS is None, branch_BS)
        side = self._side(new, segment_BS, modality_BS, route_BS, past)
        states = sites.body(self.llm)(
            inputs_embeds=embeds_BTD,
            attention_mask=mask,
            position_ids=positions_BT,
            past_key_values=past.cache,
            use_cache=past.cache is not None,
            **self._lent(side),
        )
        return states.last_hidden_state, side, positions_BT

    def _side(self, new: int, segment_BS: Tensor, modality_BS: Tensor, route_BS: Tensor | None, past: Past) -> Side:
        """What layers may need for the last `new` positions of the row."""
        segment_BT, modality_BT = segment_BS[:, -new:], modality_BS[:, -new:]
        side = Side(modality_BT, segment_BT, None if route_BS is None else route_BS[:, -new:], past.vision_BKQD)
        if past.media_at_BK is None:
            return side
        column_BT = torch.arange(segment_BS.shape[1], device=segment_BS.device).expand_as(segment_BS)[:, -new:]
        allowed_BTK = self.aligner.media_mask(column_BT, segment_BT, past.media_at_BK)
        last = segment_BS.shape[1] - 1  # a medium at the very end has nothing behind its place yet
        own_BK = segment_BS.gather(1, past.media_at_BK.clamp(0, last))
        return replace(side, media_mask_BTK=allowed_BTK & (own_BK[:, None] == segment_BT[..., None]))

    def _lent(self, side: Side) -> dict[str, Side]:
        """Keyword arguments that carry `side` to the layers, where anything reads it."""
        return {"side": side} if self._lends_side else {}

    # ------------------------------------------------------------------------------------ encoder-decoders

    def _run_encoder_decoder(self, batch: Batch, embeds_BTD: Tensor, connected: dict[str, Tensor]) -> Tensor:
        """The encoder reads prompt and media, the decoder writes the answer."""
        if batch.decoder_ids_BU is None:
            raise DataError("an encoder-decoder needs decoder_ids_BU", "collate with the model's own processor")
        states_BTD = self.read(batch, embeds_BTD, connected)
        return self.tell(batch.decoder_ids_BU, states_BTD, batch.segment_BT, batch.route_BT, None)

    def read(self, batch: Batch, embeds_BTD: Tensor, connected: dict[str, Tensor]) -> Tensor:
        """The encoder's states of prompt and media. Packing and a joint's rule and positions do not apply here."""
        segment_BT, modality_BT = batch.segment_BT, batch.modality_BT
        if segment_BT.max() > 1:
            raise DataError("packed samples cannot share an encoder-decoder's row", "use batching=bucketed")
        past = self.aside(batch, connected, Past(None))
        side = self._side(segment_BT.shape[1], segment_BT, modality_BT, batch.route_BT, past)
        mask_BT = (segment_BT > 0).long()
        encoder = self.llm.get_encoder()
        return encoder(inputs_embeds=embeds_BTD, attention_mask=mask_BT, **self._lent(side)).last_hidden_state

    def tell(
        self,
        ids_BU: Tensor,
        read_BTD: Tensor,
        segment_BT: Tensor,
        route_BT: Tensor | None,
        cache: EncoderDecoderCache | None,
    ) -> Tensor:
        """The decoder's states at the new ids; of the side it knows the route alone."""
        text_BU = torch.zeros_like(ids_BU)
        side = Side(text_BU, text_BU + 1, None if route_BT is None else route_BT.amax(1, True).expand_as(ids_BU))
        decoder = self.llm.get_decoder()
        return decoder(
            input_ids=ids_BU,
            encoder_hidden_states=read_BTD,
            encoder_attention_mask=(segment_BT > 0).long(),
            past_key_values=cache,
            use_cache=cache is not None,
            **self._lent(side),
        ).last_hidden_state

    def _output(
        self,
        encoded: dict[str, Features],
        hidden_BTD: Tensor | None,
        connected: dict[str, Tensor],
        positions_BT: Tensor | None = None,
        side: Side | None = None,
        past: Past | None = None,
    ) -> Output:
        embedding = sites.embedding(self.llm)
        head = sites.head(self.llm)
        return Output(hidden_BTD, connected, head, embedding, positions_BT, side, past, encoded=encoded)

    # ------------------------------------------------------------------------------------ adapters

    def add_lora(self, globs: list[str], how: LoRA, name: str) -> list[str]:
        """Attach LoRA to the Linears that the globs match, and remember it in the config; their names are returned."""
        adapter = {"globs": list(globs), "name": name, **how.model_dump()}
        paths = self._attach(adapter)
        self.config.lora = [*self.config.lora, adapter]
        return paths

    def _attach(self, adapter: dict[str, Any]) -> list[str]:
        how = LoRA(**{key: adapter[key] for key in LoRA.model_fields})
        return lora.attach(self, adapter["globs"], how, adapter["name"])

    def merge_lora(self, name: str) -> list[str]:
        """Fold the LoRA of that name into its hosts, which count as trained from then on; their names are returned.

        Raises:
            ConfigError: there is none, or it cannot be merged (see `lora.merge`); nothing is changed then.
        """
        paths = lora.merge(self, name)
        self.config.lora = [adapter for adapter in self.config.lora if adapter["name"] != name]
        self.config.trained = list(dict.fromkeys([*self.config.trained, *(f"{path}.weight" for path in paths)]))
        return paths


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _first(route_BT: Tensor, segment_BT: Tensor, media: Media) -> Tensor:
    """The route of each medium's segment."""
    here_NT = segment_BT[media.row_N] == media.segment_N[:, None]
    return route_BT[media.row_N].gather(1, here_NT.int().argmax(1, keepdim=True)).squeeze(1)


def _resize(llm: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Give Linears of a pruned LLM the shapes that its checkpoint has."""
    for path, (out, width) in shapes.items():
        parent, _, name = path.rpartition(".")
        old = llm.get_submodule(path)
        if old.weight.shape == (out, width):
            continue
        new = nn.Linear(width, out, bias=old.bias is not None, dtype=old.weight.dtype, device=old.weight.device)
        setattr(llm.get_submodule(parent), name, new)


AutoConfig.register("isthmus", VLMConfig)
AutoModel.register(VLMConfig, VLM)
AutoModelForImageTextToText.register(VLMConfig, VLM)
AutoProcessor.register(VLMConfig, VLMProcessor)
