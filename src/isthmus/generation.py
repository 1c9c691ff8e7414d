"""A VLM as transformers calls it: `forward` for logits and a loss, and `generate` with every decoding strategy.

Media are connected once, before decoding starts. Each step then carries the row's full-length modality, since the
joint's rule and positions are functions of whole rows and generate slices everything else to the current step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from isthmus import sites
from isthmus.types import IGNORE, Batch, Media, Modality, Past

if TYPE_CHECKING:
    from isthmus.model import VLM


class Generation(GenerationMixin):
    """The part of a VLM that speaks transformers' own conventions."""

    def forward(
        self: VLM,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        modality: Tensor | None = None,
        route: Tensor | None = None,
        vision: Tensor | None = None,
        media_at: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits for ids and pictures, and the mean loss where labels are given.

        Position ids are not asked for: they follow from padding and the joint.

        Args:
            input_ids: [B, T] with the processor's placeholders.
            attention_mask: [B, past + T], 0 at padding.
            pixel_values: [N, C, H, W], all images of the batch in order of appearance.
            labels: [B, T], unshifted, -100 where there is no loss.
            modality, route: [B, past + T], carried by `generate`; pass `modality` when continuing a cache by hand
                that holds images.
            vision, media_at: connected media of a joint that keeps them aside.
            logits_to_keep: the last n positions, or a [T] index or mask.
        """
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        rows, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(rows, cached + length, dtype=torch.long, device=self.device)
        if inputs_embeds is None:
            batch = self.as_batch(input_ids, attention_mask[:, -length:], pixel_values)
            connected = self.connect(batch)
            inputs_embeds = self.embed(batch, connected)
            if modality is None:
                modality = nn.functional.pad(batch.modality_BT, (cached, 0))
            if connected:
                vision, media_at = self.aside(batch, connected)
        if modality is None:
            modality = torch.zeros_like(attention_mask)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        past = Past(past_key_values, vision, media_at)
        hidden_BTD, _, _ = self.think(inputs_embeds, (attention_mask > 0).long(), modality, route, past)
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep if logits_to_keep else None, None)
        logits = sites.head(self.llm)(hidden_BTD[:, logits_to_keep])
        loss = None
        if labels is not None:
            flat = logits[:, :-1].flatten(0, 1).float()
            loss = nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORE)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    @torch.no_grad()
    def generate(self: VLM, inputs: Tensor | Batch | None = None, **kwargs: Any) -> Any:
        """As in transformers, from `input_ids, attention_mask, pixel_values` or from a left-padded `Batch`.

        Media are connected once, so beams and later steps cost no second look. Returned ids start with the
        prompt, as is usual for decoder-only models; those of an encoder-decoder hold the answer alone.
        """
        batch = inputs if isinstance(inputs, Batch) else self._prompt(inputs, kwargs)
        connected = self.connect(batch)
        embeds_BTD, mask_BT = self.embed(batch, connected), (batch.segment_BT > 0).long()
        if self.config.is_encoder_decoder:
            states = self.read(embeds_BTD, batch.segment_BT)
            return self.llm.generate(encoder_outputs=states, attention_mask=mask_BT, **kwargs)
        vision_BKQD, media_at_BK = self.aside(batch, connected)
        carried = {
            "modality": batch.modality_BT,
            "route": batch.route_BT,
            "vision": vision_BKQD,
            "media_at": media_at_BK,
        }
        answer = super().generate(inputs_embeds=embeds_BTD, attention_mask=mask_BT, **carried, **kwargs)
        sequences = answer if isinstance(answer, Tensor) else answer.sequences
        prompt = batch.input_ids_BT.repeat_interleave(len(sequences) // len(embeds_BTD), 0)
        whole = torch.cat([prompt, sequences], 1)
        if isinstance(answer, Tensor):
            return whole
        answer.sequences = whole
        return answer

    def _prompt(self: VLM, ids_BT: Tensor | None, kwargs: dict[str, Any]) -> Batch:
        """The processor's tensors, taken out of generate's arguments, as a batch."""
        ids_BT = kwargs.pop("input_ids", ids_BT)
        mask_BT = kwargs.pop("attention_mask", None)
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        return self.as_batch(ids_BT, mask_BT, kwargs.pop("pixel_values", None))

    def create_masks_for_generate(self, attention_mask: Tensor | None, **unused: Any) -> Tensor | None:
        """The 2-D mask as it is: a mask built here, without the modality, would lose the joint's rule."""
        return attention_mask

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        """Carry modality and route along over the whole row: what is generated is text of the same route."""
        updated = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        updated["modality"] = nn.functional.pad(updated["modality"], (0, num_new_tokens))
        if updated.get("route") is not None:
            last = updated["route"][:, -1:].expand(-1, num_new_tokens)
            updated["route"] = torch.cat([updated["route"], last], 1)
        return updated

    def as_batch(self: VLM, ids_BT: Tensor, mask_BT: Tensor, pixels: Tensor | None) -> Batch:
        """Ids, mask and pixels as a batch of one segment per row; media are told from the placeholders."""
        modality_BT, media = self.modality(ids_BT), {}
        if pixels is not None:
            row_M, column_M = (modality_BT == Modality.IMAGE).nonzero(as_tuple=True)
            first = slice(None, None, self.queries("image"))
            row_N = row_M[first]
            media["image"] = Media(row_N, torch.ones_like(row_N), column_M[first], pixels=pixels)
        return Batch(ids_BT, (mask_BT > 0).long(), modality_BT, media=media)
