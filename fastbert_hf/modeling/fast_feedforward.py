"""Feed-forward layers of which every token meets only a part: the neurons on its way down a binary tree."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from .loaded_operators import operators_are_loaded


# Decisions of the first levels are one small product; deeper nodes are read one by one, on a token's way alone.
LEVELS_AT_ONCE = 6
# What is faster is measured for 1, 2, 4, ... tokens up to so many, and is the same for more.
MANY_TOKENS = 1024
# More than the caches of a processor hold: 64 MiB.
CACHED_FLOATS = 2**24
# Standard deviation of new weights, as BERT's own and UltraFastBERT's.
INITIAL_DEVIATION = 0.02


class LeafTree(nn.Module):
    r"""
    A binary tree of depth D whose nodes only decide, with a small dense block at each of its \\( 2^D \\) leaves (Fast
    Feedforward Networks, Belcak and Wattenhofer, 2023, arXiv 2308.14711), and one that every token meets beside (the
    master leaf of Charalampopoulos et al., 2024, arXiv 2405.16836). A depth of 0 is a dense feed-forward layer.

    In inference each token goes to one leaf: right of a node whose logit is above 0. In training it does so, too,
    where `routing` is `"hard"`; where it is `"soft"` the output is the mixture of all leaves, by the probabilities of
    the ways to them.

    Args:
        hidden_size (`int`): Width of what comes in and of what goes out.
        activation (`Callable`): Between the two products of a block.
        depth (`int`): Levels of nodes, D.
        leaf_size (`int`): Neurons of each leaf.
        master_size (`int`): Neurons that every token meets.
        gated (`bool`): Whether each neuron is multiplied with a second product, its gate, as in ModernBERT.
        routing (`str`): `"hard"` or `"soft"`.
        hardening (`float`):
            Weight of the entropy of the decisions in the loss, summed over nodes and averaged over tokens. It makes
            the decisions of soft routing hard.
        balance (`float`):
            Weight of \\( 2^D \sum_i f_i P_i \\) in the loss, with the share \\( f_i \\) of the tokens that leaf i gets
            and its mean probability \\( P_i \\) (Switch Transformer, Eq. 4). It fills the leaves evenly.
        region_leak (`float`): Probability with which a decision is turned round in soft training.

    Hardening and balance join the gradients, not the loss that is reported. So neither the steps of a gradient
    accumulation nor the loss scaling of float16 divide or multiply them.
    """

    def __init__(
        self,
        hidden_size: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
        depth: int = 3,
        leaf_size: int = 96,
        master_size: int = 0,
        gated: bool = False,
        routing: str = "hard",
        hardening: float = 0.0,
        balance: float = 0.0,
        region_leak: float = 0.0,
    ):
        super().__init__()
        self.depth, self.leaf_size, self.gated, self.activation = depth, leaf_size, gated, activation
        self.routing, self.hardening, self.balance, self.region_leak = routing, hardening, balance, region_leak
        leaves, rows = 2**depth, 2 if gated else 1
        self.node_weight = nn.Parameter(torch.empty(leaves - 1, hidden_size))
        self.node_bias = nn.Parameter(torch.empty(leaves - 1))
        self.leaf_in = nn.Parameter(torch.empty(leaves, hidden_size, rows * leaf_size))
        self.leaf_in_bias = nn.Parameter(torch.empty(leaves, rows * leaf_size))
        self.leaf_out = nn.Parameter(torch.empty(leaves, leaf_size, hidden_size))
        self.leaf_out_bias = nn.Parameter(torch.empty(leaves, hidden_size))
        if master_size:
            self.master_in = nn.Linear(hidden_size, rows * master_size)
            self.master_out = nn.Linear(master_size, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights from normal(0, 0.02), and set the biases to 0."""
        _reset(self)

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates of one token in inference, beside those of the master's linear layers."""
        return (nodes_read(self.depth) + (3 if self.gated else 2) * self.leaf_size) * self.node_weight.shape[1]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)  # [T, hidden_size]
        # Hard routing has the same gradients on either path, and the sparse one is faster.
        output = self.dense(tokens) if self.training and self.routing == "soft" else self.sparse(tokens)
        if self.training and self.depth and (self.hardening or self.balance):
            output = WithLoss.apply(output, self.auxiliary_loss(tokens))
        if hasattr(self, "master_in"):
            output = output + self.master_out(self._activate(self.master_in(tokens)))
        return output.view_as(hidden_states)

    def leaves_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the leaf of every token, `[T]`, for tokens of shape `[T, hidden_size]`."""
        if self.depth == 0:
            return torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        if self.depth > LEVELS_AT_ONCE:
            nodes, logits = self.ways(tokens)
            node = 2 * nodes[:, 0, -1:] + 1 + (logits[:, 0, -1:] > 0)
        else:  # two calls for each level
            steps = (nn.functional.linear(tokens, self.node_weight, self.node_bias) > 0).long() + 1
            node = steps[:, :1]
            for _ in range(self.depth - 1):
                node = steps.gather(1, node).add_(node, alpha=2)
        return node[:, 0] - (2**self.depth - 1)

    def leaf_of_one(self, token: torch.Tensor) -> int:
        """Return the leaf of a single token, `[1, hidden_size]`, with the fewest calls."""
        if self.depth > LEVELS_AT_ONCE:
            return int(self.leaves_of(token))
        logits, node = nn.functional.linear(token, self.node_weight, self.node_bias)[0].tolist(), 0
        for _ in range(self.depth):
            node = 2 * node + 1 + (logits[node] > 0)
        return node - (2**self.depth - 1)

    def ways(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nodes that decide for each token, and their logits: `[T, 1, depth]` each."""
        return descend(tokens, self.node_weight[None], self.node_bias[None], self.depth)

    def probabilities(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how likely each leaf is, `[T, 2 ** D]`, and how likely each node sends to the right, `[T, nodes]`."""
        to_right = torch.sigmoid(nn.functional.linear(tokens, self.node_weight, self.node_bias))
        decided = to_right
        if self.training and self.region_leak:
            turned = torch.rand_like(to_right) < self.region_leak
            decided = torch.where(turned, 1 - to_right, to_right)
        leaves = tokens.new_ones(len(tokens), 1)
        for level in decided.split([2**level for level in range(self.depth)], 1) if self.depth else ():
            leaves = torch.stack([leaves * (1 - level), leaves * level], -1).flatten(1)
        return leaves, to_right

    def dense(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute every leaf for every token and weight them, by a mask or softly in training: `[T, hidden_size]`."""
        leaves = 2**self.depth
        if self.training and self.routing == "soft":
            weights = self.probabilities(tokens)[0]
        else:
            weights = nn.functional.one_hot(self.leaves_of(tokens), leaves).to(tokens.dtype)
        neurons = torch.einsum("th,lhn->tln", tokens, self.leaf_in) + self.leaf_in_bias
        neurons = self._activate(neurons) * weights.unsqueeze(-1)
        return neurons.flatten(1) @ self.leaf_out.flatten(0, 1) + weights @ self.leaf_out_bias

    def sparse(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute for every token its own leaf alone: tokens are sorted by leaf, and each leaf is one product."""
        # Of a single token there is nothing to sort, and two products of PyTorch's are all that is left.
        if len(tokens) > 1 and uses_operators(tokens, self.leaf_in) and operators_are_faster(self, tokens):
            return self.by_operators(tokens)
        return self.by_pytorch(tokens)

    def by_operators(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what `sparse` does, with the compiled operators."""
        groups = torch.ops.fastbert_hf.sort_by_leaf(tokens, self.node_weight, self.node_bias, self.depth)
        product = torch.ops.fastbert_hf.grouped_linear
        neurons = self._activate(product(tokens, *groups, self.leaf_in, self.leaf_in_bias))
        return product(neurons, *groups, self.leaf_out, self.leaf_out_bias)

    def by_pytorch(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what `sparse` does, with PyTorch's own operators."""
        if len(tokens) == 1 or self.depth == 0:
            own = self.leaf_of_one(tokens) if self.depth else 0
            neurons = self._activate(torch.addmm(self.leaf_in_bias[own], tokens, self.leaf_in[own]))
            return torch.addmm(self.leaf_out_bias[own], neurons, self.leaf_out[own])
        leaf = self.leaves_of(tokens)
        order = leaf.argsort(stable=True)
        counts = torch.bincount(leaf, minlength=2**self.depth).tolist()
        neurons = self._activate(grouped_linear(tokens[order], counts, self.leaf_in, self.leaf_in_bias))
        outputs = grouped_linear(neurons, counts, self.leaf_out, self.leaf_out_bias)
        return torch.empty_like(tokens).index_copy(0, order, outputs)

    def _activate(self, neurons: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return self.activation(neurons)
        neurons, gates = neurons.chunk(2, -1)
        return self.activation(neurons) * gates

    def auxiliary_loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what hardens and balances the decisions, weighted, for tokens of shape `[T, hidden_size]`."""
        probabilities, to_right = self.probabilities(tokens.detach())
        entropy = (torch.special.entr(to_right) + torch.special.entr(1 - to_right)).sum(1).mean()
        shares = torch.bincount(self.leaves_of(tokens), minlength=2**self.depth) / len(tokens)
        balance = len(shares) * (shares * probabilities.mean(0)).sum()
        return self.hardening * entropy + self.balance * balance

    def extra_repr(self) -> str:
        return f"depth={self.depth}, leaf_size={self.leaf_size}, routing={self.routing!r}"


class NeuronTrees(nn.Module):
    r"""
    K binary trees of depth D in which every node is a neuron: a token meets the \\( D + 1 \\) neurons on its way down
    each tree, right where a neuron's logit is above 0, and the outputs are summed (UltraFastBERT, Belcak and
    Wattenhofer, 2023, arXiv 2311.10770, Algorithm 1). Its 1x11 has one tree of depth 11. Routing is hard from the
    first step and has no gradient. Trees of depth 0 are the neurons of a dense layer; without any tree the layer adds
    nothing but its bias.

    Args:
        hidden_size (`int`): Width of what comes in and of what goes out.
        activation (`Callable`): Of the neurons.
        trees (`int`): K.
        depth (`int`): D, the levels below the root.
        bias (`bool`): Whether the output has one. The paper's has none.
    """

    def __init__(
        self,
        hidden_size: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
        trees: int = 1,
        depth: int = 11,
        bias: bool = False,
    ):
        super().__init__()
        self.trees, self.depth, self.activation = trees, depth, activation
        nodes = 2 ** (depth + 1) - 1
        self.node_in = nn.Parameter(torch.empty(trees, nodes, hidden_size))
        self.node_in_bias = nn.Parameter(torch.empty(trees, nodes))
        self.node_out = nn.Parameter(torch.empty(trees, nodes, hidden_size))
        self.out_bias = nn.Parameter(torch.empty(hidden_size)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights from normal(0, 0.02), and set the biases to 0."""
        _reset(self)

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates of one token in inference."""
        return self.trees * (nodes_read(self.depth + 1) + self.depth + 1) * self.node_in.shape[-1]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)  # [T, hidden_size]
        return self.sparse(tokens).view_as(hidden_states)

    def ways(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nodes that decide for each token, and their logits: `[T, trees, depth]` each."""
        return descend(tokens, self.node_in, self.node_in_bias, self.depth)

    def dense(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute every neuron for every token, `[T, hidden_size]`, and mask those that are not on its way."""
        logits = nn.functional.linear(tokens, self.node_in.flatten(0, 1), self.node_in_bias.flatten())
        logits = logits.unflatten(1, self.node_in.shape[:2])  # [T, K, nodes]
        with torch.no_grad():
            nodes = follow(lambda node: logits.gather(2, node.unsqueeze(2))[..., 0], logits[..., 0], self.depth + 1)[0]
            mask = torch.zeros_like(logits).scatter_(2, nodes, 1)
        output = (self.activation(logits) * mask).flatten(1) @ self.node_out.flatten(0, 1)
        return output if self.out_bias is None else output + self.out_bias

    def sparse(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute for every token the neurons on its way alone, `[T, hidden_size]`."""
        if self.trees == 0:
            output = torch.zeros_like(tokens)
            return output if self.out_bias is None else output + self.out_bias
        activation = known_activation(self.activation)
        if activation is not None and uses_operators(tokens, self.node_in):
            weights = (self.node_in, self.node_in_bias, self.node_out, self.out_bias)
            return torch.ops.fastbert_hf.neuron_trees(tokens, *weights, self.depth + 1, activation)
        nodes, logits = descend(tokens, self.node_in, self.node_in_bias, self.depth + 1)
        first = torch.arange(self.trees, device=tokens.device)[:, None] * self.node_in.shape[1]
        output = nn.functional.embedding_bag(
            (nodes + first).flatten(1),
            self.node_out.flatten(0, 1),
            mode="sum",
            per_sample_weights=self.activation(logits).flatten(1),
        )
        return output if self.out_bias is None else output + self.out_bias

    def extra_repr(self) -> str:
        return f"trees={self.trees}, depth={self.depth}"


def grouped_linear(tokens: torch.Tensor, counts: list[int], weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """
    Multiply sorted tokens with the weights of their groups: `[T, out]`.

    Args:
        tokens (`torch.Tensor` of shape `[T, in]`): Those of group 0 first, then those of group 1, and so on.
        counts (`list[int]`): Tokens of each group.
        weight, bias (`torch.Tensor` of shape `[groups, in, out]` and `[groups, out]`): Of each group.
    """
    # `unbind` and not an index, whose gradient would be as large as all groups for each of them.
    groups = list(zip(bias.unbind(), tokens.split(counts), weight.unbind(), strict=True))
    return torch.cat([torch.addmm(*group) for group in groups if len(group[1])] or [torch.addmm(*groups[0])])


def descend(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Follow every token down every tree.

    Args:
        tokens (`torch.Tensor` of shape `[T, hidden_size]`): What is read.
        weight, bias (`torch.Tensor` of shape `[trees, nodes, hidden_size]` and `[trees, nodes]`):
            Of the nodes, level by level: below node i are 2i + 1, and 2i + 2 for a logit above 0.
        levels (`int`): How many nodes a token meets in each tree.

    Returns:
        `tuple` of two `torch.Tensor` of shape `[T, trees, levels]`: The nodes that each token meets, and their logits.
    """
    if uses_operators(tokens, weight):
        return torch.ops.fastbert_hf.descend(tokens, weight, bias, levels)
    trees, nodes, hidden_size = weight.shape
    at_once = 2 ** min(levels, LEVELS_AT_ONCE) - 1
    upper = nn.functional.linear(tokens, weight[:, :at_once].flatten(0, 1), bias[:, :at_once].flatten())
    upper = upper.unflatten(1, (trees, at_once))
    first = torch.arange(trees, device=tokens.device) * nodes
    weight, bias = weight.flatten(0, 1), bias.flatten()

    def logit_of(node: torch.Tensor) -> torch.Tensor:
        if len(done) < LEVELS_AT_ONCE:
            return upper.gather(2, node.unsqueeze(2))[..., 0]
        place = (node + first).flatten()
        rows = weight.index_select(0, place).view(*node.shape, hidden_size)
        return (rows @ tokens.unsqueeze(2))[..., 0] + bias[place].view(node.shape)

    done: list[torch.Tensor] = []
    return follow(logit_of, upper[..., 0], levels, done)


# Activations that the operators know, by the names of their functions and modules.
ACTIVATIONS = {"gelu": 0, "GELU": 0, "GELUActivation": 0, "relu": 1, "ReLU": 1}


def known_activation(activation: Callable[[torch.Tensor], torch.Tensor]) -> int | None:
    """Return the number by which the operators know an activation, `None` if they do not."""
    if getattr(activation, "approximate", "none") != "none":
        return None
    return ACTIVATIONS.get(getattr(activation, "__name__", type(activation).__name__))


def uses_operators(tokens: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the compiled operators were loaded ([`load_operators`]) and can take these tensors."""
    return (
        tokens.device.type == "cpu"
        and tokens.dtype is weight.dtype is torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and tokens.is_contiguous()
        and operators_are_loaded()
    )


# By the shape of a layer, how many tokens and threads: whether the operators are faster than PyTorch's own.
_FASTER: dict[tuple, bool] = {}


def operators_are_faster(layer: LeafTree, tokens: torch.Tensor) -> bool:
    """
    Return whether the operators are clearly faster than PyTorch's own products for so many tokens in such a layer. It
    is measured on these tokens, once in a process for each power of two: some hundredths of a second.
    """
    doublings = (min(len(tokens), MANY_TOKENS) - 1).bit_length()
    key = (layer.leaf_in.shape, layer.gated, doublings, torch.get_num_threads())
    if key not in _FASTER:
        own, runs = tokens[:MANY_TOKENS], (layer.by_operators, layer.by_pytorch)
        seconds: dict[Callable, list[float]] = {run: [] for run in runs}
        others = torch.empty(CACHED_FLOATS)
        for _ in range(3):
            for run in runs:
                others.fill_(1.0)  # in a model the weights of other layers were read since
                start = time.perf_counter()
                run(own)
                seconds[run].append(time.perf_counter() - start)
        # Where they are about equal, every process would choose anew.
        _FASTER[key] = median(seconds[runs[0]]) < 0.9 * median(seconds[runs[1]])
    return _FASTER[key]


def follow(
    logit_of: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor, levels: int, done: list | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nodes from the root on, and their logits, as `logit_of` tells them: `[T, trees, levels]` each."""
    node, nodes = torch.zeros(like.shape, dtype=torch.long, device=like.device), []
    logits = [] if done is None else done
    for _ in range(levels):
        nodes.append(node)
        logits.append(logit_of(node))
        node = 2 * node + 1 + (logits[-1] > 0)
    return torch.stack(nodes, -1), torch.stack(logits, -1)


def nodes_read(levels: int) -> int:
    """Return how many nodes of a tree are read for a token that meets one in each of so many levels."""
    return 2 ** min(levels, LEVELS_AT_ONCE) - 1 + max(levels - LEVELS_AT_ONCE, 0)


class WithLoss(torch.autograd.Function):
    """
    Pass a tensor on, and let a loss be minimised beside whatever is made of it. So a layer deep inside a stock model
    adds to the training of any Trainer; the loss that is reported does not show it.
    """

    @staticmethod
    def forward(ctx, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient.new_ones(())


def _reset(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=INITIAL_DEVIATION)
