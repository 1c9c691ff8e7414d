"""A VLM as transformers calls it: `forward` for logits and a loss, `generate` by transformers' own loops, and its
directory.

Media are connected once, before decoding starts. Each step then carries the row's full-length modality, since the
joint's rule and positions are functions of whole rows and generate slices everything else to the current step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from isthmus import sites, storage
from isthmus.processor import refuse
from isthmus.rows import Rows, check_routes, fit, recall, remember, routes
from isthmus.types import IGNORE, Batch, ConfigError, DataError, Media, Modality, Past

if TYPE_CHECKING:
    from isthmus.model import VLM, VLMConfig

HUB = {"token", "cache_dir", "force_download", "local_files_only", "proxies"}
"""How transformers looks a name up in a hub; ours are looked up by the environment's settings alone."""
LOADING = HUB | {"adapter_kwargs", "_from_auto", "_from_pipeline", "_commit_hash", "trust_remote_code"}
LOADING |= {"use_safetensors", "low_cpu_mem_usage"}
"""Arguments of transformers' loader that change nothing here."""
SAVING = {"safe_serialization", "max_shard_size", "save_function", "save_original_format", "token"}
"""And of its `save_pretrained`."""
STEPPING = {"position_ids", "cache_position", "is_first_iteration", "tokenizer", "assistant_tokenizer"}
"""And what `generate` passes to `forward`, which knows it by itself."""
BLIND = ("assistant_model", "assistant_early_exit", "guidance_scale", "prefill_chunk_size")
"""What makes transformers' `generate` run a model on the ids of the prompt alone, where no picture is."""
LOOKUP = "prompt_lookup_num_tokens"


class Generation(GenerationMixin):
    """The part of a VLM that speaks transformers' own conventions; `self` is the VLM."""

    accepts_loss_kwargs = True
    """To transformers' Trainer: `forward` divides by `num_items_in_batch`."""

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_at: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Cache | None = None,
        modality: Tensor | None = None,
        route: Tensor | int | None = None,
        vision: Tensor | None = None,
        media_at: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits for ids and pictures, and the mean loss where labels are given.

        Position ids are not asked for: they follow from padding and the joint.

        Args:
            input_ids: [B, T] with the processor's placeholders.
            attention_mask: [B, past + T], 0 at padding.
            pixel_values: [N, C, H, W], all images of the batch in order of appearance.
            image_at: [N, 2], row and column of each image, as the processor gives them; told from the placeholders
                where it is left out.
            instruction_ids: [N, L], what the connector reads beside each image, -1 at padding (see `Reading`).
            labels: [B, T], unshifted, -100 where there is no loss; there is none at placeholders either.
            decoder_input_ids: [B, U], with labels of that shape, for an encoder-decoder; made from labels where they
                are left out, as transformers makes them, and each then predicts the label in its own column.
            encoder_outputs: its encoder's states, where they are known already.
            modality: [B, past + T], what stands where; told from the ids, and of a cache from what rides on it, where
                it is left out.
            route: of which kind the tasks are (`types.Route`), where the joint treats kinds apart: one number, one per
                row, one per id [B, T], or [B, past + T]. A cache goes on on its own.
            vision, media_at: connected media of a joint that keeps them aside; they ride on a cache as well.
            logits_to_keep: the last n positions, or a [T] index or mask.
            num_items_in_batch: the labels of a whole optimizer step, of which these are a part; the loss is then their
                sum divided by it.
            return_dict: False answers with a tuple of what there is, in the order of the output's fields; None as the
                config says.

        Raises:
            ConfigError: an argument of transformers that has no meaning here, such as `output_hidden_states`.
            DataError: there are no ids; or an encoder-decoder is given neither decoder_input_ids nor labels; or the
                cache or the routes are of other rows, or these no kinds of tasks.
        """
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        targets = None if labels is None else labels[:, 1:]
        refuse(more, "forward", "call model.run, or hook the layers, for what it does not return", STEPPING)
        if use_cache is False:
            past_key_values = None
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if route is not None and not cached:
            check_routes(route)
        if self.config.is_encoder_decoder:
            if decoder_input_ids is None:
                decoder_input_ids, targets = self._shifted(labels), labels
            if encoder_outputs is None:
                batch = self.as_batch(_ids(input_ids), attention_mask, pixel_values, image_at, instruction_ids, route)
                attention_mask, route = batch.segment_BT, batch.route_BT
                encoder_outputs = self._read(batch)
            read_BTD: Any = encoder_outputs.last_hidden_state
            route = None if route is None else routes(route, read_BTD[..., 0], read_BTD.shape[1])
            hidden_BTD = self.tell(decoder_input_ids, read_BTD, attention_mask, route, past_key_values)
            return self._answer(hidden_BTD, targets, logits_to_keep, past_key_values, num_items_in_batch, as_tuple)
        given: Any = _ids(input_ids) if inputs_embeds is None else inputs_embeds
        rows, length = given.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(rows, cached + length, dtype=torch.long, device=self.device)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        segment_BS, ids_BT = (attention_mask > 0).long(), attention_mask[:, -length:]
        held = recall(past_key_values, segment_BS) if modality is None else Rows(modality)
        vision = held.vision_BKQD if vision is None else vision
        past = Past(past_key_values, vision, held.media_at_BK if media_at is None else media_at)
        route = held.route_BS if route is None else routes(route, ids_BT, segment_BS.shape[1])
        modality_BT = torch.zeros_like(ids_BT)
        if inputs_embeds is None:
            batch = self.as_batch(input_ids, ids_BT, pixel_values, image_at, instruction_ids)
            batch.route_BT = None if route is None else route[:, -length:]
            connected = self.connect(batch)
            inputs_embeds, modality_BT = self.embed(batch, connected), batch.modality_BT
            past = self.aside(replace(batch, segment_BT=segment_BS), connected, past)
        modality = fit(torch.cat([held.modality_BS, modality_BT], 1), segment_BS.shape[1])
        hidden_BTD, _, _ = self.think(inputs_embeds, segment_BS, modality, route, past)
        remember(past, modality, route)
        return self._answer(hidden_BTD, targets, logits_to_keep, past_key_values, num_items_in_batch, as_tuple)

    def _shifted(self: Any, labels: Tensor | None) -> Tensor:
        """What an encoder-decoder's decoder reads to write labels, as its family shifts them."""
        shift = getattr(self.llm, "prepare_decoder_input_ids_from_labels", None)
        if labels is None or shift is None:
            remedy = "pass them" if shift is None else "pass them, or labels to make them from"
            raise DataError("an encoder-decoder needs decoder_input_ids", remedy)
        return shift(labels=labels)

    def _answer(
        self: Any,
        hidden_BTD: Tensor,
        targets: Tensor | None,
        logits_to_keep: int | Tensor,
        cache: Cache | None,
        items: int | Tensor | None,
        as_tuple: bool,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss where targets of the first of them are given: its mean, or its sum by `items`."""
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)
        logits = sites.head(self.llm)(hidden_BTD[:, kept])
        loss = None
        if targets is not None:
            flat = logits[:, : targets.shape[1]].flatten(0, 1).float()
            wanted = targets.masked_fill(self.modality(targets) > 0, IGNORE).flatten()
            loss = nn.functional.cross_entropy(
                flat, wanted, ignore_index=IGNORE, reduction="mean" if items is None else "sum"
            )
            loss = loss if items is None else loss / items
        answer = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return answer.to_tuple() if as_tuple else answer

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self: Any, inputs: Tensor | Batch | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers, from what the processor returns or from a left-padded `Batch`.

        Media are connected once, so beams and later steps cost no second look. `route` (one number, or one per row)
        says of which kind the tasks are, where the joint treats kinds apart; a `Batch` says it itself.

        Returned ids start with the prompt, as is usual for decoder-only models; those of an encoder-decoder hold the
        answer alone, and its cache is a dynamic one.

        Raises:
            ConfigError: `max_length`, which counts the prompt, is used up by it; or a way of decoding is asked for that
                runs on ids alone (`BLIND`), or prompt lookup for several prompts or a padded one.
            DataError: there is no prompt.
        """
        _check_mode(self.generation_config, kwargs)
        batch = inputs if isinstance(inputs, Batch) else self._prompt(inputs, kwargs)
        carried: dict[str, Any] = {"attention_mask": (batch.segment_BT > 0).long(), "route": batch.route_BT}
        if self.config.is_encoder_decoder:
            # T5's config counts the encoder's layers; the decoder's own, which sizes the cache, counts the decoder's
            config = self.llm.get_decoder().config
            cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
            carried |= {"encoder_outputs": self._read(batch), "past_key_values": cache}
            return GenerationMixin.generate(self, **carried, **kwargs)
        _check_prompt(self.generation_config, kwargs, batch.segment_BT)
        connected = self.connect(batch)
        embeds_BTD, past = self.embed(batch, connected), self.aside(batch, connected, Past(None))
        carried |= {"modality": batch.modality_BT, "vision": past.vision_BKQD, "media_at": past.media_at_BK}
        answer: Any = GenerationMixin.generate(self, inputs_embeds=embeds_BTD, **carried, **kwargs)
        sequences = answer if isinstance(answer, Tensor) else answer.sequences
        prompt = batch.input_ids_BT.repeat_interleave(len(sequences) // len(embeds_BTD), 0)
        whole = torch.cat([prompt, sequences], 1)
        if isinstance(answer, Tensor):
            return whole
        answer.sequences = whole
        return answer

    def _read(self: Any, batch: Batch) -> BaseModelOutput:
        """An encoder-decoder's encoder on a batch, as transformers passes it around."""
        connected = self.connect(batch)
        return BaseModelOutput(self.read(batch, self.embed(batch, connected), connected))

    def _prompt(self: Any, ids_BT: Tensor | None, kwargs: dict[str, Any]) -> Batch:
        """The processor's tensors, taken out of generate's arguments, as a batch."""
        ids_BT = _ids(kwargs.pop("input_ids", ids_BT))
        names = ("attention_mask", "pixel_values", "image_at", "instruction_ids", "route")
        if kwargs.get("route") is not None:
            check_routes(kwargs["route"])
        return self.as_batch(ids_BT, *(kwargs.pop(name, None) for name in names))

    def create_masks_for_generate(self, attention_mask: Tensor | None, **unused: Any) -> Tensor | None:
        """The 2-D mask as it is: a mask built here, without the modality, would lose the joint's rule."""
        return attention_mask

    def as_batch(
        self: Any,
        ids_BT: Tensor,
        mask_BT: Tensor | None = None,
        pixels: Tensor | None = None,
        image_at: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        route: Tensor | int | None = None,
    ) -> Batch:
        """Ids, mask, pixels, their places and what is asked of them as a batch of one segment per row.

        Args:
            route: one number, one per row, or one per id.

        Raises:
            DataError: the places of the pixels are neither given nor to be told from placeholders; or the routes are
                of other rows.
        """
        modality_BT, media = self.modality(ids_BT), {}
        if pixels is not None:
            if image_at is None:
                image_at = (modality_BT == Modality.IMAGE).nonzero()[:: max(1, self.queries("image"))]
            if len(image_at) != len(pixels):
                raise DataError(
                    f"{len(pixels)} pictures for {len(image_at)} places in the text",
                    "pass on everything that the model's own processor returns",
                )
            row_N, at_N = image_at.unbind(1)
            media["image"] = Media(row_N, torch.ones_like(row_N), at_N, pixels=pixels)
        segment_BT = torch.ones_like(ids_BT) if mask_BT is None else (mask_BT > 0).long()
        extra_text = {} if instruction_ids is None else {"image": instruction_ids}
        route_BT = None if route is None else routes(route, ids_BT, ids_BT.shape[1])
        return Batch(ids_BT, segment_BT, modality_BT, media=media, route_BT=route_BT, extra_text=extra_text)

    # ------------------------------------------------------------------------------------ its vocabulary

    def get_output_embeddings(self: Any) -> nn.Module | None:
        """The LLM's own head: by it transformers and peft tell whether it is tied, and leave it out of all Linears."""
        return self.llm.get_output_embeddings()

    def resize_token_embeddings(  # type: ignore[override]
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """The embedding as it is; its size is fixed, because the placeholders of media are the ids right behind it.

        Raises:
            ConfigError: it would change; nothing is changed then.
        """
        table = self.get_input_embeddings()
        wanted = table.num_embeddings if new_num_tokens is None else new_num_tokens
        if wanted != table.num_embeddings or wanted % (pad_to_multiple_of or 1):
            raise ConfigError(
                f"the vocabulary of a joint model cannot be resized from {table.num_embeddings} to {wanted} tokens",
                "resize the LLM alone, save it, and compose with it; a joint names tokens of its own in new_tokens()",
            )
        return table

    # ------------------------------------------------------------------------------------ its directory

    def save_pretrained(
        self: Any,
        folder: str | Path,
        whole: bool | None = None,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **more: Any,
    ) -> None:
        """Write a Hugging Face directory: config, weights, generation settings, processor.

        Args:
            whole: with the base parts' weights; otherwise those that are still the base's own stay where they are and
                are referred to by source and fingerprint, and what was added, trained or changed by other code is
                written: the base is read once more to compare. None keeps the form
                in which the model was loaded or imported; a freshly composed one is referred to.
            is_main_process: False writes nothing, as one of several processes.
            state_dict: tensors that were gathered elsewhere, in place of the model's own.

        Raises:
            ConfigError: base parts are to be referred to that are not there; or other code has added tensors to the
                model or resized it; or an argument of transformers that has no meaning here.
        """
        refuse(more, "save_pretrained", "upload the folder with `hf upload` once it is written", SAVING)
        if is_main_process:
            storage.save(self, Path(folder), whole, state_dict)

    @classmethod
    def from_pretrained(
        cls: Any,
        folder: str | Path,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        config: VLMConfig | None = None,
        **more: Any,
    ) -> VLM:
        """A model from a directory (or hub name) that `save_pretrained` wrote, in eval mode.

        Args:
            dtype: of the base parts; `auto` is the one that they were saved in. `torch_dtype` is its older name.
            attn_implementation: the LLM's attention kernel (`LLMConfig.attention`), in place of the model's own.
            config: in place of the one in the directory, as the Auto classes pass it.

        Raises:
            IsthmusError: a key is missing or unexpected, a file is damaged, or a base part is not the one it was.
            ConfigError: an argument of transformers that has no meaning here.
        """
        remedy = "place it with .to(device); fewer bits are composed with `bits` of the recipe"
        refuse(more, "from_pretrained", remedy, LOADING)
        return storage.load(cls, folder, torch_dtype or dtype, revision, attn_implementation, config)


def _ids(given: Tensor | None) -> Tensor:
    """
    Raises:
        DataError: there are none.
    """
    if given is None:
        raise DataError("there are no input_ids", "pass what the processor returns: model.generate(**inputs)")
    return given


def _asked(own: GenerationConfig, given: dict[str, Any], name: str) -> Any:
    """A setting as `generate` reads it: from its arguments, from the config among them, or from the model's own."""
    found = (given.get(name), getattr(given.get("generation_config"), name, None), getattr(own, name, None))
    return next((each for each in found if each is not None), None)


def _check_mode(own: GenerationConfig, given: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: a way of decoding that would not see the pictures.
    """
    asked = {name: _asked(own, given, name) for name in BLIND}
    if asked["guidance_scale"] == 1:  # transformers does nothing then
        del asked["guidance_scale"]
    refuse(asked, "generate", "leave it out; greedy search, beams, sampling and prompt lookup work")


def _check_prompt(own: GenerationConfig, given: dict[str, Any], segment_BT: Tensor) -> None:
    """
    Raises:
        ConfigError: `max_length` alone says how long an answer may be, and the prompt is that long already; or the
            prompt of prompt lookup is padded, which cuts the mask by a count that knows no embedded prompt.
    """
    new, length, lookup = (_asked(own, given, name) for name in ("max_new_tokens", "max_length", LOOKUP))
    prompt = segment_BT.shape[1]
    if new is None and length is not None and length <= prompt:
        raise ConfigError(
            f"max_length={length} counts the prompt too, which has {prompt} tokens",
            "say how long the answer may be: max_new_tokens",
        )
    if lookup is not None and (len(segment_BT) > 1 or not segment_BT.all()):
        raise ConfigError(f"{LOOKUP} takes one prompt without padding", "pass prompts one at a time, or leave it out")
