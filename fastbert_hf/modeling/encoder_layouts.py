"""How to embed and step through each encoder family: one row of a table per family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .faster_linears import faster_linears
from .packed_batch import PackedBatch


@dataclass(frozen=True)
class EncoderLayout:
    """
    Where the parts of a stock encoder are, as dotted names below the `AutoModel`.

    Args:
        layers (`str`): The list of layers, or of the layer groups that ALBERT repeats.
        embedding_inputs (`tuple`): What the embeddings take beside `input_ids` or `inputs_embeds`.
        positions (`str`):
            `"learned"` counts from 0, `"after_padding"` from `pad_token_id + 1` and skips padding ids, `"rotary"`
            gives every layer its `position_embeddings`.
        projection (`str`, *optional*): From the embedding width to the hidden width, where the two differ.
        final_norm (`str`, *optional*): The normalisation that a pre-norm encoder applies once, after its last layer.
        has_pooler (`bool`): Whether the stock class takes `add_pooling_layer`.
        head (`tuple`, *optional*):
            `(dense, out_proj)`: the two Linears of the family's stock classifier, as names below the
            `AutoModelForSequenceClassification`. `None` where that head has another structure.
        head_activation (`str`): Activation between the two, also that of linear exits.
    """

    layers: str = "encoder.layer"
    embedding_inputs: tuple[str, ...] = ("token_type_ids", "position_ids")
    positions: str = "learned"
    projection: str | None = None
    final_norm: str | None = None
    has_pooler: bool = True
    head: tuple[str, str] | None = ("classifier.dense", "classifier.out_proj")
    head_activation: str = "tanh"


ENCODER_LAYOUTS = {
    "bert": EncoderLayout(head=("bert.pooler.dense", "classifier")),
    "ernie": EncoderLayout(
        embedding_inputs=("token_type_ids", "position_ids", "task_type_ids"), head=("ernie.pooler.dense", "classifier")
    ),
    "roberta": EncoderLayout(positions="after_padding"),
    "xlm-roberta": EncoderLayout(positions="after_padding"),
    "camembert": EncoderLayout(positions="after_padding"),
    "data2vec-text": EncoderLayout(positions="after_padding"),
    "electra": EncoderLayout(projection="embeddings_project", has_pooler=False, head_activation="gelu"),
    "distilbert": EncoderLayout(
        layers="transformer.layer",
        embedding_inputs=("position_ids",),
        has_pooler=False,
        head=("pre_classifier", "classifier"),
        head_activation="relu",
    ),
    "albert": EncoderLayout(
        layers="encoder.albert_layer_groups",
        projection="encoder.embedding_hidden_mapping_in",
        head=("albert.pooler", "classifier"),
    ),
    "modernbert": EncoderLayout(
        layers="layers",
        embedding_inputs=(),
        positions="rotary",
        final_norm="final_norm",
        has_pooler=False,
        head=None,
    ),
}


def get_encoder_layout(text_config: PreTrainedConfig) -> EncoderLayout:
    """The layout of a backbone's family, or a `ValueError` that lists the supported ones."""
    layout = ENCODER_LAYOUTS.get(text_config.model_type)
    if layout is None:
        raise ValueError(
            f"A backbone of type {text_config.model_type!r} is not supported. Supported are: "
            f"{', '.join(ENCODER_LAYOUTS)} (BERT-WWM, MacBERT and RoBERTa-wwm are of type bert)."
        )
    if getattr(text_config, "is_decoder", False):
        raise ValueError(
            "The backbone's config says is_decoder=True, but FastBERT reads whole texts: set is_decoder=False in it."
        )
    return layout


def encoder_layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """The module of every layer, first to last; ALBERT repeats its own."""
    modules = backbone.get_submodule(get_encoder_layout(backbone.config).layers)
    num_layers = backbone.config.num_hidden_layers
    return [modules[int(index / (num_layers / len(modules)))] for index in range(num_layers)]


def max_text_tokens(text_config: PreTrainedConfig) -> int:
    """Tokens of the longest text that a backbone reads."""
    first = text_config.pad_token_id + 1 if get_encoder_layout(text_config).positions == "after_padding" else 0
    return text_config.max_position_embeddings - first


def too_long(length: int, limit: int, text: str = "a text") -> ValueError:
    """The error of a text of `length` tokens for a model that reads at most `limit`."""
    return ValueError(
        f"{text} has {length} tokens, but this model reads at most {limit}: let the tokenizer cut it, as in "
        f"tokenizer(texts, truncation=True, max_length={limit}) or "
        f"classifier(texts, truncation=True, max_length={limit})."
    )


def check_texts(backbone: PreTrainedModel, packed_batch: PackedBatch) -> None:
    """Raises a `ValueError` if a text is too long, or has a gap that the family cannot skip."""
    longest, limit = packed_batch.lengths.max().item(), max_text_tokens(backbone.config)
    if longest > limit:
        raise too_long(longest, limit)
    if get_encoder_layout(backbone.config).positions == "rotary":
        # The sliding window counts places, which a gap would shift: the stock encoder counts the gap in.
        last_tokens = packed_batch.first_tokens + packed_batch.lengths.to(packed_batch.first_tokens.device) - 1
        if (packed_batch.position_ids[0, last_tokens].cpu() != packed_batch.lengths - 1).any():
            raise ValueError(
                f"attention_mask has zeros inside a text, which a {backbone.config.model_type} backbone cannot skip: "
                "leave those tokens out of input_ids, so that zeros mark padding only."
            )


def padded_position_ids(backbone: PreTrainedModel, input_ids: torch.Tensor | None) -> torch.Tensor | None:
    """
    The position ids of padded tokens, `[batch_size, sequence_length]`, where the family tells them from the ids, those
    in gaps of a text included. Else `None`.
    """
    if input_ids is None or get_encoder_layout(backbone.config).positions != "after_padding":
        return None
    return backbone.embeddings.create_position_ids_from_input_ids(input_ids, backbone.config.pad_token_id)


def packed_position_ids(
    backbone: PreTrainedModel, packed_batch: PackedBatch, input_ids: torch.Tensor | None
) -> torch.Tensor:
    """
    The position ids that the family gives to texts without gaps.

    Args:
        backbone (`PreTrainedModel`): The stock encoder.
        packed_batch (`PackedBatch`): Where the texts are.
        input_ids (`torch.Tensor` of shape `[1, total_tokens]`, *optional*): The packed tokens.

    Returns:
        `torch.Tensor` of shape `[1, total_tokens]`.
    """
    if get_encoder_layout(backbone.config).positions != "after_padding":
        return packed_batch.position_ids
    padding_id = backbone.config.pad_token_id
    position_ids = packed_batch.position_ids + padding_id + 1
    if input_ids is None:
        return position_ids
    # A padding id inside a text has no place of its own, and those after it move up.
    is_padding = (input_ids == padding_id).long()
    counts = is_padding.cumsum(1)  # [1, total_tokens], over all texts
    before = (counts - is_padding)[:, packed_batch.first_tokens]  # [1, texts]
    inside = counts - before.repeat_interleave(packed_batch.lengths.to(counts.device), 1)
    return (position_ids - inside).masked_fill(is_padding.bool(), padding_id)


def embed_tokens(backbone: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    The embedding layer on packed tokens.

    Args:
        backbone (`PreTrainedModel`): The stock encoder.
        inputs (`dict`):
            `input_ids` (`[1, total_tokens]`) or `inputs_embeds` (`[1, total_tokens, embedding_size]`), `position_ids`,
            and what else the caller gave. What the family's embeddings do not take is left out, as the stock class
            does.

    Returns:
        `torch.Tensor` of shape `[1, total_tokens, hidden_size]`.
    """
    layout = get_encoder_layout(backbone.config)
    takes = ("input_ids", "inputs_embeds", *layout.embedding_inputs)
    arguments = {name: inputs.get(name) for name in takes if inputs.get(name) is not None}
    hidden_states = backbone.embeddings(**{"input_ids": None, **arguments})
    # ELECTRA has its projection only where the two widths differ.
    if layout.projection is not None and hasattr(backbone, layout.projection.partition(".")[0]):
        hidden_states = backbone.get_submodule(layout.projection)(hidden_states)
    return hidden_states


def rotary_embeddings(
    backbone: PreTrainedModel, hidden_states: torch.Tensor, position_ids: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]] | None:
    """Cosine and sine per attention type, each `[1, total_tokens, head_dim]`, or `None` for learned positions."""
    if get_encoder_layout(backbone.config).positions != "rotary":
        return None
    types = dict.fromkeys(backbone.config.layer_types)
    return {kind: backbone.rotary_emb(hidden_states, position_ids, kind) for kind in types}


def run_layer(layer: nn.Module, hidden_states: torch.Tensor, packed_batch: PackedBatch) -> torch.Tensor:
    """One stock layer on packed hidden states, `[1, total_tokens, hidden_size]` to the same shape."""
    arguments = {"packed_batch": packed_batch}
    if packed_batch.position_embeddings is not None:
        arguments["position_embeddings"] = packed_batch.position_embeddings[layer.attention_type]
    with faster_linears(hidden_states):
        return layer(hidden_states, None, **arguments)
