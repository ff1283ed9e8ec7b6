"""FastBertModel: a stock encoder whose layers run on packed batches."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_fastbert import FastBertConfig
from .encoder_layouts import (
    check_texts,
    embed_tokens,
    encoder_layers,
    get_encoder_layout,
    packed_position_ids,
    padded_position_ids,
    rotary_embeddings,
    run_layer,
)
from .packed_batch import PACKED_ATTENTION, PackedBatch, PaddedLayout, pack_padded
from .pretrained_fastbert import FastBertPreTrainedModel


class FastBertModel(FastBertPreTrainedModel):
    """
    A stock encoder whose layers run on packed batches. Takes what the encoder takes and returns the same hidden
    states, with zeros at padding.

    Args:
        config ([`FastBertConfig`]): `config.text_config` is the encoder's.

    Example:

    ```python
    >>> from transformers import BertConfig
    >>> from fastbert_hf import FastBertConfig, FastBertModel

    >>> model = FastBertModel(FastBertConfig(text_config=BertConfig(num_hidden_layers=2))).eval()
    >>> model(input_ids=torch.tensor([[2, 7, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 768])
    ```
    """

    # AutoModel reads a classifier's checkpoint, too, and needs none of its exits.
    _keys_to_ignore_on_load_unexpected = [r"^exits\.", r"^shared_pooler\."]

    def __init__(self, config: FastBertConfig):
        super().__init__(config)
        layout = get_encoder_layout(config.text_config)
        # Chunks of the feed-forward layers must divide the number of tokens, which no packed batch can promise.
        config.text_config.chunk_size_feed_forward = 0
        arguments = {"add_pooling_layer": False} if layout.has_pooler else {}
        self.backbone = AutoModel.from_config(config.text_config, attn_implementation=PACKED_ATTENTION, **arguments)
        self.supports_gradient_checkpointing = self.backbone.supports_gradient_checkpointing
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.backbone.set_input_embeddings(value)

    def embed(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **inputs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, PackedBatch, PaddedLayout]:
        """
        Packs a padded batch and runs the embedding layer on it. Arguments as in `forward`.

        Returns:
            `tuple`: the embeddings, `[1, total_tokens, hidden_size]`, the [`PackedBatch`], and the [`PaddedLayout`]
            that it came from.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens.dim() != (2 if input_ids is not None else 3):
            raise ValueError(
                f"input_ids must be [batch_size, sequence_length] (inputs_embeds one more), got {list(tokens.shape)}."
            )
        if attention_mask is None:
            attention_mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if attention_mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"attention_mask must be [batch_size, sequence_length] = {list(tokens.shape[:2])}, got "
                f"{list(attention_mask.shape)}."
            )
        packed_batch, layout = pack_padded(attention_mask, self.config._attn_implementation)
        if position_ids is None:
            check_texts(self.backbone, packed_batch)
            position_ids = padded_position_ids(self.backbone, input_ids)
        inputs.update(input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids)
        packed_inputs = {name: layout.pack(value) for name, value in inputs.items() if value is not None}
        return *self.embed_packed(packed_batch, packed_inputs), layout

    def embed_packed(
        self, packed_batch: PackedBatch, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, PackedBatch]:
        """
        Runs the embedding layer on packed tokens.

        Args:
            packed_batch (`PackedBatch`): Where the texts are.
            inputs (`dict`): `input_ids`, `token_type_ids`, ..., `[1, total_tokens]` each, as in `forward`.

        Returns:
            `tuple`: the embeddings, `[1, total_tokens, hidden_size]`, and the [`PackedBatch`] with the position
            embeddings of rotary families.
        """
        if self.backbone.config._attn_implementation != PACKED_ATTENTION:
            raise ValueError(
                f"the backbone's attention was changed to {self.backbone.config._attn_implementation!r}, with which "
                "the texts of a batch would read each other. Choose the kernel on the model instead: "
                "model.set_attn_implementation('sdpa')"
            )
        position_ids = inputs.get("position_ids")
        if position_ids is None:
            position_ids = packed_position_ids(self.backbone, packed_batch, inputs.get("input_ids"))
        hidden_states = embed_tokens(self.backbone, {**inputs, "position_ids": position_ids})
        position_embeddings = rotary_embeddings(self.backbone, hidden_states, position_ids)
        return hidden_states, replace(packed_batch, position_embeddings=position_embeddings)

    def layers(self) -> list[nn.Module]:
        """The stock layer of every depth, first to last."""
        return encoder_layers(self.backbone)

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        What an exit or a caller reads of a layer's output: normalised, where the encoder does so once at its end.
        """
        name = get_encoder_layout(self.backbone.config).final_norm
        return hidden_states if name is None else self.backbone.get_submodule(name)(hidden_states)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        task_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """
        Args:
            input_ids (`torch.Tensor` of shape `[batch_size, sequence_length]`): Padded tokens, on either side.
            attention_mask (`torch.Tensor` of shape `[batch_size, sequence_length]`, *optional*):
                1 for tokens, 0 for padding. All are tokens unless given.
            token_type_ids (`torch.Tensor` of shape `[batch_size, sequence_length]`, *optional*):
                0 for the first text of a pair and 1 for the second.
            position_ids (`torch.Tensor` of shape `[batch_size, sequence_length]` or `[1, sequence_length]`,
                *optional*):
                Counted from each text's first token, as its family does, unless given.
            inputs_embeds (`torch.Tensor` of shape `[batch_size, sequence_length, embedding_size]`, *optional*):
                In place of `input_ids`.
            task_type_ids (`torch.Tensor` of shape `[batch_size, sequence_length]`, *optional*): For ERNIE.
            output_hidden_states (`bool`, *optional*): Whether to return the output of every layer.
            output_attentions (`bool`, *optional*): Not available; `True` is an error.

        Returns:
            `BaseModelOutput`: `last_hidden_state` of shape `[batch_size, sequence_length, hidden_size]`, zero at
            padding.
        """
        refuse_attentions(self.config, output_attentions)
        hidden_states, packed_batch, layout = self.embed(
            input_ids,
            attention_mask,
            inputs_embeds,
            position_ids,
            token_type_ids=token_type_ids,
            task_type_ids=task_type_ids,
        )
        states = [hidden_states]
        for layer in self.layers():
            states.append(run_layer(layer, states[-1], packed_batch))
        states[-1] = self.final_norm(states[-1])
        keeps_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutput(
            last_hidden_state=layout.unpack(states[-1]),
            hidden_states=tuple(map(layout.unpack, states)) if keeps_states else None,
        )


def refuse_attentions(config: FastBertConfig, output_attentions: bool | None) -> None:
    """Attention maps of a packed batch are never formed, so asking for them is an error."""
    if config.output_attentions if output_attentions is None else output_attentions:
        raise ValueError(
            "output_attentions is not available: packed batches never form the attention maps. Leave it out."
        )
