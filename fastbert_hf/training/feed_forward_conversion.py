"""Convert dense feed-forward layers of a trained encoder into fast ones, on texts without labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.families import FeedForwardParts, get_encoder_family, max_text_tokens
from ..modeling.fast_feedforward import LeafTree
from ..modeling.feed_forward_settings import check_feed_forward, feed_forward_holders, put_feed_forward
from ..modeling.int8_layers import has_int8_layers
from ..rows import PaddingCollator, encoded_rows


# Rounds of 2-means at each node, and of fitting master and leaves in turn.
SPLIT_ROUNDS = 10
FIT_ROUNDS = 3
# Of the mean squared activation, on the diagonal of the normal equations.
RIDGE = 1e-2


def convert_feed_forward(
    model: PreTrainedModel,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    share: float = 0.125,
    depth: int | None = None,
    master_share: float | None = None,
    layers: list[int] | None = None,
    steps: int = 100,
    max_tokens: int = 30_000,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """
    Convert the feed-forward layers of a model in place, so that every token meets only a share of the neurons. Labels
    are not needed. What is lost is small, and [`BackboneDistillationTrainer`] repairs most of it; then the students
    need their [`SelfDistillationTrainer`] again.

    Args:
        model ([`FastBertForSequenceClassification`]): In float32. Stock classifiers are wrapped by `from_classifier`.
        rows: Texts like those that the model will read, as [`encoded_rows`] takes them; a few thousand are enough.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The model's, where `rows` are texts.
        share (`float`): Part of the neurons that a token meets, in (0, 1]; the master's among them.
        depth (`int`, *optional*):
            Levels of decisions; `2 ** depth` leaves. Unless given, all leaves together hold about the neurons of the
            dense layer: more of them are a little better, and slow down texts whose few tokens reach most leaves. 0
            makes a narrower dense layer.
        master_share (`float`, *optional*):
            Part of the neurons that every token meets, at most `share`. Unless given, half of `share` where there are
            two leaves, of which few tokens would read both, and none where there are more.
        layers (`list[int]`, *optional*): Numbers of the layers to convert, from 1; all unless given.
        steps (`int`): Training steps of each layer on what it reads, after it was fitted.
        max_tokens (`int`): Tokens that each layer is fitted on, drawn at random from those of the rows.
        seed (`int`): Of that drawing.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `list` of `dict`: For each converted layer its `layer`, the `error` that is left (mean squared, in units of the
        variance of what the dense layer gives, on tokens that it was not fitted on), and the shares of the tokens in
        the `smallest_leaf` and the `largest_leaf`.

    Example:

    ```python
    >>> model = FastBertForSequenceClassification.from_classifier("org/my-finetuned-bert")
    >>> convert_feed_forward(model, texts, tokenizer, share=0.25)
    >>> BackboneDistillationTrainer(model, args, teacher=dense_model, train_dataset=texts, ...).train()
    >>> SelfDistillationTrainer(model, SelfDistillationArguments("outputs"), train_dataset=texts, ...).train()
    ```
    """
    check_shares(share, master_share)
    check_is_dense(model)
    parts = get_encoder_family(model.config.text_config).feed_forward
    first_layer = parts.holders(model.fastbert.layers()[0])[0]
    tree = tree_of(share, first_layer.get_submodule(parts.down).in_features, depth, master_share)
    settings = {"form": "leaves", **tree, **({} if layers is None else {"layers": sorted(layers)})}
    check_feed_forward(settings, model.config.num_hidden_layers)

    def make_layer(dense: DenseLayer, tokens: torch.Tensor) -> LeafTree:
        layer = from_dense(dense, tokens, **tree)
        tune_layer(layer, dense, tokens, steps)
        return layer

    read = read_inputs(model, rows, tokenizer, layers, max_tokens, seed, progress)
    report = replace_each(model, make_layer, read, layers, progress)
    model.config.feed_forward = settings
    return report


def replace_each(
    model: PreTrainedModel,
    make_layer: Callable[[DenseLayer, torch.Tensor], nn.Module],
    read: list[torch.Tensor],
    layers: list[int] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """
    Replace feed-forward layers of a model in place.

    Args:
        model ([`FastBertForSequenceClassification`]): Its config is left as it is.
        make_layer (`Callable`): From a [`DenseLayer`] and what it reads, `[T, hidden_size]`, to what takes its place.
        read (`list[torch.Tensor]`): From [`read_inputs`].
        layers (`list[int]`, *optional*), progress (`bool`): As in [`convert_feed_forward`].

    Returns:
        `list` of `dict`: As [`convert_feed_forward`].
    """
    parts = get_encoder_family(model.fastbert.backbone.config).feed_forward
    made, report, chosen = [], [], chosen_holders(model, layers)
    with tqdm(total=len(chosen), desc="Converting layers", disable=not progress) as bar:
        for (number, holder), tokens in zip(chosen, read, strict=True):
            dense = DenseLayer.of(holder, parts)
            fitted, unseen = tokens.split([len(tokens) - len(tokens) // 10, len(tokens) // 10])
            made.append(make_layer(dense, fitted))
            report.append({"layer": number, **measure_layer(made[-1], dense, unseen)})
            bar.update()
    for (_, holder), layer in zip(chosen, made, strict=True):
        put_feed_forward(holder, parts.place, parts.passed, layer.to(model.device))
    model.eval()
    return report


def chosen_holders(model: PreTrainedModel, layers: list[int] | None) -> list[tuple[int, nn.Module]]:
    """Return what holds a feed-forward layer, in the order of the layers, with the number of its layer."""
    holders = feed_forward_holders(model.fastbert.backbone, layers)
    return [(number, holder) for number, of_layer in holders.items() for holder in of_layer]


def check_is_dense(model: PreTrainedModel) -> None:
    """Raise a `ValueError` unless the feed-forward layers of a model can be converted."""
    if model.config.feed_forward is not None:
        raise ValueError(
            f"the model was converted already (config.feed_forward={model.config.feed_forward}): load the dense one."
        )
    if has_int8_layers(model):
        raise ValueError("the model has int8 layers, and layers are fitted in float32: convert it before, then round.")
    if model.dtype is not torch.float32:
        raise ValueError(f"the model is in {model.dtype}, and layers are fitted in float32: model.float()")


def check_shares(share: float, master_share: float | None) -> None:
    """Raise a `ValueError` unless these may be the share of a token, and the part of it that all tokens meet."""
    if not 0 < share <= 1 or not 0 <= (master_share or 0) <= share:
        raise ValueError(
            f"share must be in (0, 1] and master_share from 0 to share, got share={share!r} and "
            f"master_share={master_share!r}. Example: share=0.25, master_share=0.0"
        )


def tree_of(share: float, neurons: int, depth: int | None = None, master_share: float | None = None) -> dict[str, int]:
    """
    Return `depth`, `leaf_size` and `master_size` of a layer in which a token meets a share of so many neurons. The
    other arguments are those of [`convert_feed_forward`].
    """
    depth = max(round(math.log2(1 / share)), 0) if depth is None else depth
    if master_share is None:
        master_share = share / 2 if depth == 1 else 0.0
    master_size = round(master_share * neurons)
    return {"depth": depth, "leaf_size": max(round(share * neurons) - master_size, 1), "master_size": master_size}


def read_inputs(
    model: PreTrainedModel,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layers: list[int] | None = None,
    max_tokens: int = 30_000,
    seed: int = 0,
    progress: bool = True,
) -> list[torch.Tensor]:
    """
    Return what each feed-forward layer reads in texts, `[at most max_tokens, hidden_size]` on the CPU. The arguments
    are those of [`convert_feed_forward`].
    """
    parts = get_encoder_family(model.fastbert.backbone.config).feed_forward
    holders = [holder for _, holder in chosen_holders(model, layers)]
    limit = max_text_tokens(model.config.text_config)
    limit = limit if tokenizer is None else min(limit, tokenizer.model_max_length)
    rows = encoded_rows(rows, tokenizer, limit)
    if len(rows) == 0:
        raise ValueError("there are no rows: give some hundreds of texts like those that the model will read.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    collator, kept, is_training = PaddingCollator.of(model), [[] for _ in holders], model.training

    def keep(own: list[torch.Tensor]) -> Any:
        return lambda module, arguments: own.append(arguments[0].detach().flatten(0, -2).cpu())

    hooks = [
        holder.get_submodule(parts.up).register_forward_pre_hook(keep(own))
        for holder, own in zip(holders, kept, strict=True)
    ]
    model.eval()
    try:
        with torch.no_grad(), tqdm(total=max_tokens, desc="Reading texts", disable=not progress) as bar:
            for start in range(0, len(order), 32):
                batch = collator([rows[row] for row in order[start : start + 32]])
                batch.pop("labels", None)
                model.fastbert(**{name: value.to(model.device) for name, value in batch.items()})
                tokens = sum(map(len, kept[0]))
                bar.update(min(tokens, max_tokens) - bar.n)
                if tokens >= max_tokens:
                    break
    finally:
        for hook in hooks:
            hook.remove()
        model.train(is_training)
    generator = torch.Generator().manual_seed(seed)
    everything = [torch.cat(own) for own in kept]
    return [tokens[torch.randperm(len(tokens), generator=generator)[:max_tokens]] for tokens in everything]


@dataclass(frozen=True)
class DenseLayer:
    """
    A dense feed-forward layer.

    Args:
        up (`nn.Linear`), down (`nn.Linear`): Its two products.
        activation (`nn.Module`): Between them.
        gated (`bool`): Whether `up` makes a second number for every neuron, with which it is multiplied.
    """

    up: nn.Linear
    down: nn.Linear
    activation: nn.Module
    gated: bool = False

    @classmethod
    def of(cls, holder: nn.Module, parts: FeedForwardParts) -> DenseLayer:
        """Return a copy on the CPU of the feed-forward layer that a module holds."""
        names = (parts.up, parts.down, parts.activation)
        return cls(*(copy.deepcopy(holder.get_submodule(name)).cpu() for name in names), parts.gated)

    def outputs(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the layer gives, `[T, hidden_size]`."""
        return nn.functional.linear(self.neurons(tokens), self.down.weight, self.down.bias)

    def neurons(self, tokens: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Return the activations of all neurons, `[T, neurons]`, or of the chosen ones."""
        rows = self.rows(chosen)
        outputs = nn.functional.linear(
            tokens, self.up.weight[rows], None if self.up.bias is None else self.up.bias[rows]
        )
        if not self.gated:
            return self.activation(outputs)
        outputs, gates = outputs.chunk(2, -1)
        return self.activation(outputs) * gates

    def rows(self, chosen: torch.Tensor | None) -> torch.Tensor:
        """Return the rows of `up` that belong to the chosen neurons, those of their gates last."""
        number = self.down.in_features
        chosen = torch.arange(number) if chosen is None else chosen
        return torch.cat([chosen, chosen + number]) if self.gated else chosen


@torch.no_grad()
def from_dense(
    dense: DenseLayer,
    tokens: torch.Tensor,
    depth: int = 4,
    leaf_size: int = 96,
    master_size: int = 0,
    node_weights: torch.Tensor | None = None,
    **settings,
) -> LeafTree:
    r"""
    Make a fast feed-forward layer of a dense one. Its nodes halve the tokens again and again by balanced 2-means; each
    leaf takes the neurons that matter most to its tokens, by mean \\( |a_j| \cdot \lVert w_j \rVert \\) of activation
    and output weights; the master takes those that matter most to all of them. Outputs are fitted by ridge regression.

    Args:
        dense ([`DenseLayer`]): What is converted.
        tokens (`torch.Tensor` of shape `[T, hidden_size]`): What the layer reads in texts, float32.
        depth, leaf_size, master_size (`int`), settings: As in [`LeafTree`].
        node_weights (`torch.Tensor` of shape `[2 ** depth - 1, hidden_size]`, *optional*):
            Directions of the nodes, in place of those of 2-means; their biases still halve the tokens.
    """
    leaves = 2**depth
    if len(tokens) < 2 * leaves:
        raise ValueError(f"{leaves} leaves need at least {2 * leaves} tokens to be fitted on, got {len(tokens)}.")
    weight, bias, leaf = split_tokens(tokens, depth, node_weights)
    activations = dense.neurons(tokens)
    wanted = nn.functional.linear(activations, dense.down.weight, dense.down.bias)
    norms = dense.down.weight.norm(dim=0)
    master = (activations.abs().mean(0) * norms).topk(master_size).indices
    cells = [(leaf == number).nonzero()[:, 0] for number in range(leaves)]
    chosen = []
    for cell in cells:
        scores = activations[cell].abs().mean(0) * norms
        scores[master] = -1
        chosen.append(scores.topk(leaf_size).indices)

    layer = LeafTree(tokens.shape[1], dense.activation, depth, leaf_size, master_size, gated=dense.gated, **settings)
    layer.node_weight.copy_(weight), layer.node_bias.copy_(bias)
    of_master = activations[:, master]
    master_out = dense.down.weight[:, master].T.clone()
    for last in [False] * (FIT_ROUNDS if master_size else 0) + [True]:
        from_leaves = torch.zeros_like(wanted)
        for number, (cell, own) in enumerate(zip(cells, chosen, strict=True)):
            inputs = activations[cell][:, own]
            out, out_bias = ridge(inputs, wanted[cell] - of_master[cell] @ master_out)
            layer.leaf_out[number], layer.leaf_out_bias[number] = out, out_bias
            from_leaves[cell] = inputs @ out + out_bias
        if not last:
            master_out, _ = ridge(of_master, wanted - from_leaves, centred=False)
    for number, own in enumerate(chosen):
        rows = dense.rows(own)
        layer.leaf_in[number] = dense.up.weight[rows].T
        layer.leaf_in_bias[number] = 0.0 if dense.up.bias is None else dense.up.bias[rows]
    if master_size:
        rows = dense.rows(master)
        layer.master_in.weight.copy_(dense.up.weight[rows])
        layer.master_in.bias.copy_(torch.zeros(len(rows)) if dense.up.bias is None else dense.up.bias[rows])
        layer.master_out.weight.copy_(master_out.T)
    return layer


def split_tokens(
    tokens: torch.Tensor, depth: int, node_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Halve the tokens at every node. Return weights and biases of the nodes, and the leaf of each token."""
    nodes = 2**depth - 1
    weight, bias = tokens.new_zeros(nodes, tokens.shape[1]), tokens.new_zeros(nodes)
    leaf = torch.zeros(len(tokens), dtype=torch.long)
    cells = [torch.arange(len(tokens))]
    for node in range(nodes):
        cell = cells[node]
        own = tokens[cell]
        weight[node] = two_means(own) if node_weights is None else node_weights[node]
        places = own @ weight[node]
        # Between the two tokens in the middle, so that rounding sends none of them to the other side.
        bias[node] = -places.sort().values[(len(own) - 1) // 2 : (len(own) - 1) // 2 + 2].mean()
        to_right = places + bias[node] > 0
        cells += [cell[~to_right], cell[to_right]]
    for number, cell in enumerate(cells[nodes:]):
        leaf[cell] = number
    return weight, bias, leaf


def two_means(tokens: torch.Tensor) -> torch.Tensor:
    """Return the direction between two equally large clusters of tokens, `[hidden_size]`."""
    centred = tokens - tokens.mean(0)
    if len(tokens) > tokens.shape[1]:
        places = centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    else:  # too few to be worth it
        places = centred[:, centred.square().sum(0).argmax()]
    to_right = places > places.median()
    for _ in range(SPLIT_ROUNDS):
        direction = centred[to_right].mean(0) - centred[~to_right].mean(0)
        places = centred @ direction
        before, to_right = to_right, places > places.median()
        if torch.equal(before, to_right):
            break
    return direction


def ridge(inputs: torch.Tensor, wanted: torch.Tensor, centred: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights `[inputs, outputs]` and biases with which inputs come nearest to what is wanted."""
    means = (inputs.mean(0), wanted.mean(0)) if centred else (inputs.new_zeros(inputs.shape[1]), wanted.new_zeros(()))
    inputs, wanted = (inputs - means[0]).double(), (wanted - means[1]).double()
    products = inputs.T @ inputs
    products.diagonal().add_(RIDGE * products.diagonal().mean() + 1e-9)
    weights = torch.linalg.solve(products, inputs.T @ wanted).float()
    return weights, means[1] - means[0] @ weights


def tune_layer(
    layer: nn.Module, dense: DenseLayer, tokens: torch.Tensor, steps: int = 400, batch_tokens: int = 1024
) -> None:
    """Train the neurons of a converted layer, not nodes that only decide, to give what the dense one gives."""
    if steps == 0:
        return
    with torch.no_grad():
        wanted = dense.outputs(tokens)
        spread = wanted.var(0).mean()
    decides = ("node_weight", "node_bias")
    learns = [parameter for name, parameter in layer.named_parameters() if name not in decides]
    optimizer = torch.optim.Adam(learns, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(tokens), (batch_tokens,), generator=generator)
            loss = ((layer(tokens[rows]) - wanted[rows]) ** 2).mean() / spread
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    layer.zero_grad()


@torch.no_grad()
def measure_layer(layer: nn.Module, dense: DenseLayer, tokens: torch.Tensor) -> dict[str, float]:
    """Return how far a layer is from the dense one on some tokens, and how evenly they fill its leaves, if any."""
    wanted = dense.outputs(tokens)
    measured = {"error": (((layer(tokens) - wanted) ** 2).mean() / wanted.var(0).mean()).item()}
    if isinstance(layer, LeafTree):
        shares = torch.bincount(layer.leaves_of(tokens), minlength=2**layer.depth) / len(tokens)
        measured |= {"smallest_leaf": shares.min().item(), "largest_leaf": shares.max().item()}
    return measured
