"""FastBertModel: a stock encoder whose layers run on packed batches."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from .compiled_layers import CompilesLayers, untraced_forward
from .configuration_fastbert import FastBertConfig
from .engine import TorchEngine
from .families import encoder_layers, get_encoder_family, max_text_tokens, padded_position_ids, too_long
from .feed_forward_settings import replace_feed_forward
from .packed_attention import PACKED_ATTENTION
from .packed_batch import PackedBatch, Padding, pack_padded
from .pretrained_fastbert import FastBertPreTrainedModel
from .scheduler import ActiveBatch, Trace, run_layers
from .token_coarsening import Coarsening


class FastBertModel(CompilesLayers, FastBertPreTrainedModel):
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
        family = get_encoder_family(config.text_config)
        # Chunks of the feed-forward layers must divide the number of tokens, which no packed batch can promise.
        config.text_config.chunk_size_feed_forward = 0
        arguments = {"add_pooling_layer": False} if family.has_pooler else {}
        self.backbone = AutoModel.from_config(config.text_config, attn_implementation=PACKED_ATTENTION, **arguments)
        if config.feed_forward is not None:
            replace_feed_forward(self.backbone, config.feed_forward)
        self.supports_gradient_checkpointing = self.backbone.supports_gradient_checkpointing
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.backbone.set_input_embeddings(value)

    def layers(self) -> list[nn.Module]:
        """Return the stock layer of every depth, first to last."""
        return encoder_layers(self.backbone)

    def pack(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        **inputs: torch.Tensor | None,
    ) -> tuple[PackedBatch, dict[str, torch.Tensor], Padding]:
        """
        Pack a padded batch: return the packed one, its inputs, `[1, total_tokens]` each, and their padding. `rows` are
        as in [`pack_padded`], the rest is as in `forward`.
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
        packed_batch, padding = pack_padded(attention_mask, self.config._attn_implementation, rows)
        if position_ids is None:
            longest, limit = packed_batch.lengths.max().item(), max_text_tokens(self.backbone.config)
            if longest > limit:
                raise too_long(longest, limit)
            position_ids = padded_position_ids(self.backbone, input_ids)
        inputs.update(input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids)
        return packed_batch, {k: padding.unpad(v) for k, v in inputs.items() if v is not None}, padding

    @untraced_forward
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
        Return what the encoder returns.

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
        packed_batch, inputs, padding = self.pack(
            input_ids,
            attention_mask,
            inputs_embeds,
            position_ids,
            token_type_ids=token_type_ids,
            task_type_ids=task_type_ids,
        )
        keeps_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        engine = TorchEngine(self.backbone, coarsening=Coarsening.of(self.config.coarsening))
        trace = Trace(every_state=bool(keeps_states))
        hidden_states, packed_batch = engine.embed(packed_batch, inputs, padding)
        # No exit may answer, so every text runs through every layer.
        batch = ActiveBatch(hidden_states, packed_batch, torch.zeros(len(packed_batch.rows), engine.num_layers))
        run_layers(engine, None, [batch], [engine.num_layers], trace=trace)
        *states, last = trace.hidden_states
        states = tuple(map(padding.pad, (*states, engine.final_norm(last))))
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=states if keeps_states else None)


def refuse_attentions(config: FastBertConfig, output_attentions: bool | None) -> None:
    """Raise a `ValueError` if attention maps are asked for, which a packed batch never forms."""
    if config.output_attentions if output_attentions is None else output_attentions:
        raise ValueError(
            "output_attentions is not available: packed batches never form the attention maps. Leave it out."
        )
