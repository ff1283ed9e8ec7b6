"""What is particular to each encoder family: one row of a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .packed_batch import PackedBatch


class Seam(NamedTuple):
    """
    The two halves of a layer, which together compute what the whole layer computes. Between them tokens can be merged,
    and either half can be replaced. In pre-norm families what crosses the seam is the residual stream.
    """

    # From a layer, its input [1, total_tokens, hidden_size] and its attention's keywords to what crosses the seam.
    attention: Callable[[nn.Module, torch.Tensor, dict[str, Any]], torch.Tensor]
    # From a layer and what crosses the seam to the layer's output.
    feed_forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    # The modules of a layer that are not called as a whole then.
    opened: Callable[[nn.Module], tuple[nn.Module, ...]] = lambda layer: (layer,)


def _albert_attention(group: nn.Module, hidden_states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    *before, last = group.albert_layers  # most checkpoints have one
    for layer in before:
        hidden_states = layer(hidden_states, None, **arguments)
    return last.attention(hidden_states, None, **arguments)[0]


def _albert_feed_forward(group: nn.Module, crossing: torch.Tensor) -> torch.Tensor:
    layer = group.albert_layers[-1]
    return layer.full_layer_layer_norm(layer.ff_chunk(crossing) + crossing)


BERT_SEAM = Seam(
    lambda layer, states, arguments: layer.attention(states, None, **arguments)[0],
    lambda layer, crossing: layer.feed_forward_chunk(crossing),
)
DISTILBERT_SEAM = Seam(
    lambda layer, states, arguments: layer.sa_layer_norm(layer.attention(states, None, **arguments)[0] + states),
    lambda layer, crossing: layer.output_layer_norm(layer.ffn(crossing) + crossing),
)
ALBERT_SEAM = Seam(_albert_attention, _albert_feed_forward, lambda group: (group, group.albert_layers[-1]))
MODERNBERT_SEAM = Seam(
    lambda layer, states, arguments: states + layer.attn(layer.attn_norm(states), attention_mask=None, **arguments)[0],
    lambda layer, crossing: crossing + layer.mlp(layer.mlp_norm(crossing)),
)


class FeedForwardParts(NamedTuple):
    """
    Where a layer has its feed-forward half, as names below the module that holds it. Another layer of that kind takes
    `place`, and what is still called after it, `passed`, then hands on what it gets.
    """

    place: str = "intermediate"
    passed: tuple[str, ...] = ("output.dense",)
    up: str = "intermediate.dense"
    activation: str = "intermediate.intermediate_act_fn"
    down: str = "output.dense"
    gated: bool = False  # whether `up` makes a second number for every neuron, with which it is multiplied
    holders: Callable[[nn.Module], tuple[nn.Module, ...]] = lambda layer: (layer,)


BERT_FEED_FORWARD = FeedForwardParts()
DISTILBERT_FEED_FORWARD = FeedForwardParts(
    "ffn.lin1", ("ffn.activation", "ffn.lin2"), "ffn.lin1", "ffn.activation", "ffn.lin2"
)
ALBERT_FEED_FORWARD = FeedForwardParts(
    "ffn",
    ("activation", "ffn_output"),
    "ffn",
    "activation",
    "ffn_output",
    holders=lambda group: (*group.albert_layers,),
)
MODERNBERT_FEED_FORWARD = FeedForwardParts("mlp", (), "mlp.Wi", "mlp.act", "mlp.Wo", gated=True)


@dataclass(frozen=True)
class EncoderFamily:
    """
    Where the parts of a stock encoder are, as dotted names below the `AutoModel`, and what they take.

    Args:
        layers (`str`): The list of layers, or of the layer groups that ALBERT repeats.
        embedding_inputs (`tuple`): What the embeddings take beside `input_ids` or `inputs_embeds`.
        positions (`str`):
            `"learned"` counts from 0, `"after_padding"` from `pad_token_id + 1` and skips padding ids, `"rotary"`
            gives every layer its `position_embeddings`.
        projection (`str`, *optional*): From the embedding width to the hidden width, where the two differ.
        final_norm (`str`, *optional*): The normalisation that a pre-norm encoder applies once, after its last layer.
        seam ([`Seam`]): The halves of a layer.
        feed_forward ([`FeedForwardParts`]): What the second half consists of.
        has_pooler (`bool`): Whether the stock class takes `add_pooling_layer`.
        head (`tuple`, *optional*):
            `(dense, out_proj)`: the two Linears of the family's stock classifier, as names below the
            `AutoModelForSequenceClassification`. `None` where that head has another structure.
        head_activation (`str`): Activation between the two, also that of linear exits.
        token_head (`str`, *optional*):
            The Linear of the family's stock classifier of tokens, as a name below the
            `AutoModelForTokenClassification`. `None` where that head has another structure.
        span_head (`str`, *optional*): Likewise of the `AutoModelForQuestionAnswering`.
    """

    layers: str = "encoder.layer"
    embedding_inputs: tuple[str, ...] = ("token_type_ids", "position_ids")
    positions: str = "learned"
    projection: str | None = None
    final_norm: str | None = None
    seam: Seam = BERT_SEAM
    feed_forward: FeedForwardParts = BERT_FEED_FORWARD
    has_pooler: bool = True
    head: tuple[str, str] | None = ("classifier.dense", "classifier.out_proj")
    head_activation: str = "tanh"
    token_head: str | None = "classifier"
    span_head: str | None = "qa_outputs"


ENCODER_FAMILIES = {
    "bert": EncoderFamily(head=("bert.pooler.dense", "classifier")),
    "ernie": EncoderFamily(
        embedding_inputs=("token_type_ids", "position_ids", "task_type_ids"), head=("ernie.pooler.dense", "classifier")
    ),
    "roberta": EncoderFamily(positions="after_padding"),
    "xlm-roberta": EncoderFamily(positions="after_padding"),
    "camembert": EncoderFamily(positions="after_padding"),
    "data2vec-text": EncoderFamily(positions="after_padding"),
    "electra": EncoderFamily(projection="embeddings_project", has_pooler=False, head_activation="gelu"),
    "distilbert": EncoderFamily(
        layers="transformer.layer",
        embedding_inputs=("position_ids",),
        seam=DISTILBERT_SEAM,
        feed_forward=DISTILBERT_FEED_FORWARD,
        has_pooler=False,
        head=("pre_classifier", "classifier"),
        head_activation="relu",
    ),
    "albert": EncoderFamily(
        layers="encoder.albert_layer_groups",
        projection="encoder.embedding_hidden_mapping_in",
        seam=ALBERT_SEAM,
        feed_forward=ALBERT_FEED_FORWARD,
        head=("albert.pooler", "classifier"),
    ),
    "modernbert": EncoderFamily(
        layers="layers",
        embedding_inputs=(),
        positions="rotary",
        final_norm="final_norm",
        seam=MODERNBERT_SEAM,
        feed_forward=MODERNBERT_FEED_FORWARD,
        has_pooler=False,
        head=None,
        token_head=None,
        span_head=None,
    ),
}


def get_encoder_family(text_config: PreTrainedConfig) -> EncoderFamily:
    """Return the family of a backbone, or raise a `ValueError` that lists the supported ones."""
    family = ENCODER_FAMILIES.get(text_config.model_type)
    if family is None:
        raise ValueError(
            f"A backbone of type {text_config.model_type!r} is not supported. Supported are: "
            f"{', '.join(ENCODER_FAMILIES)} (BERT-WWM, MacBERT and RoBERTa-wwm are of type bert)."
        )
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(text_config, name, False):
            raise ValueError(
                f"The backbone's config says {name}=True, but FastBERT reads whole texts: set {name}=False in it."
            )
    return family


def encoder_layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """Return the module of every layer, first to last; ALBERT repeats its own."""
    modules = backbone.get_submodule(get_encoder_family(backbone.config).layers)
    num_layers = backbone.config.num_hidden_layers
    return [modules[int(index / (num_layers / len(modules)))] for index in range(num_layers)]


def max_text_tokens(text_config: PreTrainedConfig) -> int:
    """Return the tokens of the longest text that a backbone reads."""
    first = text_config.pad_token_id + 1 if get_encoder_family(text_config).positions == "after_padding" else 0
    return text_config.max_position_embeddings - first


def too_long(length: int, limit: int, text: str = "a text") -> ValueError:
    """Return the error of a text of `length` tokens for a model that reads at most `limit`."""
    return ValueError(
        f"{text} has {length} tokens, but this model reads at most {limit}: let the tokenizer cut it, as in "
        f"tokenizer(texts, truncation=True, max_length={limit}) or "
        f"classifier(texts, truncation=True, max_length={limit})."
    )


def padded_position_ids(backbone: PreTrainedModel, input_ids: torch.Tensor | None) -> torch.Tensor | None:
    """
    Return the position ids of padded tokens, `[batch_size, sequence_length]`, where the family tells them from the
    ids, those in gaps of a text included; else `None`.
    """
    if input_ids is None or get_encoder_family(backbone.config).positions != "after_padding":
        return None
    return backbone.embeddings.create_position_ids_from_input_ids(input_ids, backbone.config.pad_token_id)


def packed_position_ids(
    backbone: PreTrainedModel, packed_batch: PackedBatch, input_ids: torch.Tensor | None
) -> torch.Tensor:
    """Return the position ids that the family gives to texts without gaps, `[1, total_tokens]` as `input_ids`."""
    if get_encoder_family(backbone.config).positions != "after_padding":
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
    Run the embedding layer on packed tokens and return `[1, total_tokens, hidden_size]`.

    Args:
        backbone (`PreTrainedModel`): The stock encoder.
        inputs (`dict`):
            `input_ids` (`[1, total_tokens]`) or `inputs_embeds` (one dimension more), `position_ids`, and what else
            the caller gave. What the family's embeddings do not take is left out, as the stock class does.
    """
    family = get_encoder_family(backbone.config)
    takes = ("input_ids", "inputs_embeds", *family.embedding_inputs)
    arguments = {name: inputs.get(name) for name in takes if inputs.get(name) is not None}
    hidden_states = backbone.embeddings(**{"input_ids": None, **arguments})
    # ELECTRA has its projection only where the two widths differ.
    if family.projection is not None and hasattr(backbone, family.projection.partition(".")[0]):
        hidden_states = backbone.get_submodule(family.projection)(hidden_states)
    return hidden_states


def rotary_embeddings(
    backbone: PreTrainedModel, hidden_states: torch.Tensor, position_ids: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]] | None:
    """Return cosine and sine per attention type, `[1, total_tokens, head_dim]`, `None` for learned positions."""
    types = rotary_types(backbone.config)
    return {kind: backbone.rotary_emb(hidden_states, position_ids, kind) for kind in types} or None


def rotary_types(text_config: PreTrainedConfig) -> list[str]:
    """Return the types of attention that have rotary embeddings of their own; none for learned positions."""
    is_rotary = get_encoder_family(text_config).positions == "rotary"
    return list(dict.fromkeys(text_config.layer_types)) if is_rotary else []
