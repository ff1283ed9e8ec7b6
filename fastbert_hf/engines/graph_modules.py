"""The parts of a model that are exported, as modules that take and give tensors alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.encoder_layer import run_layer
from ..modeling.exit_classifiers import AttentionExitPooler, take_up_query
from ..modeling.families import embed_tokens, get_encoder_family, rotary_embeddings
from ..modeling.int8_layers import Int8Linear
from ..modeling.int8_products import LARGEST_WEIGHT
from ..modeling.modeling_fastbert import FastBertForSequenceClassification
from ..modeling.packed_attention import attend_within_texts


# Added to scores of what must not be seen. Finite, as rows of padding see nothing at all.
UNSEEN = -1e30


class GraphBatch:
    """
    A packed batch in tensors alone, of which a graph can be made: texts of any number and lengths. Linear layers see
    packed tokens; inside of attention alone texts are padded to the longest.

    Args:
        places (`torch.Tensor` of shape `[texts, longest]`): Where each token of a text is in the packed row.
        tokens (`torch.Tensor` of shape `[total_tokens]`): Where each packed token is in the padded form, flattened.
        is_token (`torch.Tensor` of shape `[texts, longest]`, bool): Whether there is a token; else padding.
        position_embeddings (`dict`, *optional*): As in [`PackedBatch`].
    """

    received = sizes = None

    def __init__(self, places, tokens, is_token, position_embeddings=None):
        self.places, self.tokens, self.is_token = places, tokens, is_token
        self.position_embeddings = position_embeddings

    @property
    def first_tokens(self) -> torch.Tensor:
        return self.places[:, 0]

    def padded(self, states: torch.Tensor) -> torch.Tensor:
        """Return packed states, `[total_tokens, ...]`, as `[texts, longest, ...]`, with any others at padding."""
        return states.index_select(0, self.places.flatten()).unflatten(0, self.places.shape)

    def mean_of_texts(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As [`PackedBatch.mean_of_texts`]."""
        is_token = self.is_token.to(hidden_states.dtype).unsqueeze(-1)
        return (self.padded(hidden_states[0]) * is_token).sum(1) / is_token.sum(1)


@attend_within_texts.register
def attend_in_graph(
    batch: GraphBatch, query, key, value, scaling=None, dropout=0.0, sliding_window=None, queries_per_text=None
) -> torch.Tensor:
    """Attend inside each text, as [`attend_within_texts`] does."""
    # From [1, heads, total_tokens, head_dim] to [texts, heads, longest, head_dim].
    key, value = (batch.padded(states[0].transpose(0, 1)).transpose(1, 2) for states in (key, value))
    query = query[0].transpose(0, 1)
    query = batch.padded(query) if queries_per_text is None else query.unflatten(0, (-1, queries_per_text))
    query = query.transpose(1, 2)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scaling) @ key.transpose(-1, -2)
    seen = batch.is_token[:, None, None]
    if sliding_window is not None:
        places = torch.arange(batch.places.shape[1], device=query.device)
        seen = seen & ((places[:, None] - places).abs() < sliding_window)
    attended = (scores + torch.where(seen, 0.0, UNSEEN)).softmax(-1) @ value
    attended = attended.transpose(1, 2).flatten(0, 1)  # [texts * longest, heads, head_dim]
    return (attended.index_select(0, batch.tokens) if queries_per_text is None else attended).unsqueeze(0)


class Levels:
    """Where the int8 layers of a graph read how many steps a token is rounded to: a number that the graph is given."""

    given: torch.Tensor | None = None


class GraphLinear(nn.Module):
    """Takes the place of an `nn.Linear` in a graph, where its weights lie as they are multiplied, by their names."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().T.contiguous())  # [in_features, out_features]
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        outputs = tokens @ self.weight
        return outputs if self.bias is None else outputs + self.bias


class GraphKey(nn.Module):
    """
    Takes the place of the key layer of an exit in a graph, where one product takes up the queries of all heads: then
    the order in which engines add does not depend on how many texts there are.

    Args:
        layer (`nn.Linear`): In whose place.
        num_heads (`int`): Of the attention.
    """

    def __init__(self, layer: nn.Linear, num_heads: int):
        super().__init__()
        of_heads = layer.weight.detach().unflatten(0, (num_heads, -1))
        self.register_buffer("weight", torch.block_diag(*of_heads))  # [heads * head_dim, heads * in_features]


@take_up_query.register
def _(layer: GraphKey, query: torch.Tensor) -> torch.Tensor:
    return (query.flatten(1) @ layer.weight).unflatten(-1, (query.shape[1], -1))


class GraphInt8Linear(nn.Module):
    """
    Takes the place of an [`Int8Linear`] in a graph.

    Args:
        layer ([`Int8Linear`]): In whose place.
        product (`Callable`): How a backend multiplies; see [`Backend`].
        levels ([`Levels`]): Of the graph.
    """

    def __init__(self, layer: Int8Linear, product: Callable, levels: Levels):
        super().__init__()
        self.product, self.levels = product, levels
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float()
        sums = layer.weight.sum(1, dtype=torch.int64).float() * layer.weight_scale
        self.register_buffer("weight", layer.weight.T.contiguous())  # [in_features, out_features]
        self.register_buffer("weight_scale", layer.weight_scale)
        # Each product takes one of these: what is made of weights in a graph would be made of the random ones.
        self.register_buffer("bias", bias)
        self.register_buffer("added", torch.stack([sums, bias]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        outputs = self.product(tokens.reshape(-1, self.weight.shape[0]), self)
        return outputs.view(*tokens.shape[:-1], self.weight.shape[1])


class EmbeddingsGraph(nn.Module):
    """
    The embeddings of packed tokens, `[1, total_tokens, hidden_size]`, and the rotary ones, cosine and sine of each
    attention type.
    """

    def __init__(self, backbone: PreTrainedModel):
        super().__init__()
        self.backbone = backbone

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what it takes, `[1, total_tokens]` each."""
        family = get_encoder_family(self.backbone.config)
        rotary = ("position_ids",) if family.positions == "rotary" else ()
        return ("input_ids", *family.embedding_inputs, *rotary)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self.inputs, inputs, strict=True))
        hidden_states = embed_tokens(self.backbone, named)
        rotary = rotary_embeddings(self.backbone, hidden_states, named["position_ids"]) or {}
        return (hidden_states, *(part for pair in rotary.values() for part in pair))


class LayersGraph(nn.Module):
    """Some layers one after the other: gives what each of them does, `[1, total_tokens, hidden_size]`."""

    def __init__(
        self, backbone: PreTrainedModel, layers: Sequence[nn.Module], attention_types: list[str], levels: Levels
    ):
        super().__init__()
        self.levels = levels
        self.seam, self.attention_types = get_encoder_family(backbone.config).seam, attention_types
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden_states, places, tokens, is_token, self.levels.given, *rotary = inputs
        pairs = zip(rotary[::2], rotary[1::2], strict=True)
        embeddings = dict(zip(self.attention_types, pairs, strict=True)) or None
        batch = GraphBatch(places, tokens, is_token, embeddings)
        outputs = []
        for layer in self.layers:
            hidden_states, _ = run_layer(self.seam, layer, hidden_states, batch)
            outputs.append(hidden_states)
        self.levels.given = None  # what it is in a trace lives no longer
        return tuple(outputs)


class ExitGraph(nn.Module):
    """One exit, with what normalises a layer's output before it: gives `[texts, num_labels]`."""

    def __init__(self, model: FastBertForSequenceClassification, depth: int):
        super().__init__()
        name = get_encoder_family(model.config.text_config).final_norm
        self.final_norm = nn.Identity() if name is None else model.fastbert.backbone.get_submodule(name)
        self.exit_classifier, self.shared_pooler = model.exits[depth - 1], model.shared_pooler

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        hidden_states, places, is_token = inputs
        batch = GraphBatch(places, None, is_token)
        return self.exit_classifier(self.final_norm(hidden_states), batch, self.shared_pooler)


class ProbeGraph(nn.Module):
    """
    A product of bytes whose sums are the first to be wrong on a processor that adds them in 16 bits, for tokens of
    ones: what comes out is [`wanted`] where it is exact.
    """

    width, outputs = 256, 32

    def __init__(self, product: Callable):
        super().__init__()
        layer = Int8Linear(self.width, self.outputs, bias=False)
        layer.weight = self.wanted().div(self.width).to(torch.int8)[:, None].repeat(1, self.width)
        layer.weight_scale = torch.ones(self.outputs)
        self.levels = Levels()
        self.product = GraphInt8Linear(layer, product, self.levels)

    @classmethod
    def wanted(cls) -> torch.Tensor:
        """Return what each output of a token is, `[outputs]`."""
        return torch.tensor([1.0, -1.0]).repeat(cls.outputs // 2) * LARGEST_WEIGHT * cls.width

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        hidden_states, self.levels.given = inputs
        outputs = self.product(hidden_states)
        self.levels.given = None
        return outputs


def put_graph_layers(module: nn.Module, product: Callable, levels: Levels) -> None:
    """Put what stands for them in a graph in place of linear layers, those in int8 and others."""
    made: dict[nn.Module, nn.Module] = {}  # what layers share stays shared
    for part in module.modules():
        if isinstance(part, AttentionExitPooler):
            part.exit_key = GraphKey(part.exit_key, part.num_heads)
    for name, part in list(module.named_modules(remove_duplicate=False)):
        if part not in made and isinstance(part, Int8Linear):
            made[part] = GraphInt8Linear(part, product, levels)
        elif part not in made and isinstance(part, nn.Linear):
            made[part] = GraphLinear(part)
        if part in made:
            module.set_submodule(name, made[part])
