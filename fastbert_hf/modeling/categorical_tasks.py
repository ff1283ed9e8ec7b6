"""Tasks whose answers are choices: a label, several, one for each token, or the two ends of a span."""

from __future__ import annotations

import math

import torch
from torch import nn

from .answer_layouts import NO_TOKEN, TokenLayout, with_tokens
from .task_interface import Task


MOST_LEAD = 20.0  # of a logit above the second best: beyond, softmax is 1 in float32
# Neighbouring tokens of which the policy "window_entropy" takes the mean, as tags depend on those around them.
WINDOW = 5


def probabilities_of(logits: torch.Tensor) -> torch.Tensor:
    """Return probabilities, at least in float32."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def entropy(logits: torch.Tensor, choices: torch.Tensor | int) -> torch.Tensor:
    """Return the entropy of each row over the log of the number of choices."""
    probabilities = probabilities_of(logits)
    most = math.log(choices) if isinstance(choices, int) else choices.log()
    share = (torch.special.entr(probabilities).sum(-1) / most).clamp(0, 1)
    # The sum rounds below 1 for many numbers of labels, and an undecided text would be below the speed 1.
    return share.masked_fill(probabilities.amax(-1) == probabilities.amin(-1), 1)


def confidence(logits: torch.Tensor, choices: torch.Tensor | int) -> torch.Tensor:
    """Return how far the greatest probability of each row is from 1, over how far it can be."""
    # Written so that equal probabilities round to exactly 1.
    return (1 - (probabilities_of(logits).amax(-1) * choices - 1) / (choices - 1)).clamp(0, 1)


def margin(logits: torch.Tensor, choices: torch.Tensor | int) -> torch.Tensor:
    """Return 1 less the difference of the two greatest probabilities of each row."""
    best, second = probabilities_of(logits).topk(2).values.unbind(-1)
    return 1 - (best - second)


def worst(measure):
    """Return the uncertainty of the least certain decision of a text."""
    return lambda task, logits: task.each(measure, logits).amax(-1)


def only(measure):
    """Return the uncertainty of the one decision of a text."""
    return lambda task, logits: measure(logits, logits.shape[-1])


def mean(measure):
    """Return the mean uncertainty of the decisions of a text."""

    def of_texts(task, logits):
        values, nothing = task.each(measure, logits), task.has_no_token(logits)
        return values.mean(-1) if nothing is None else values.sum(-1) / (~nothing).sum(-1).clamp(min=1)

    return of_texts


def worst_window(measure):
    """Return the greatest mean uncertainty of `WINDOW` neighbouring tokens of a text, fewer at its ends."""

    def of_texts(task, logits):
        values, is_there = task.each(measure, logits), ~task.has_no_token(logits)
        means = [
            nn.functional.avg_pool1d(part[:, None], WINDOW, 1, WINDOW // 2)[:, 0]
            for part in (values, is_there.to(values.dtype))
        ]
        return (means[0] / means[1].clamp(min=1 / WINDOW)).masked_fill(~is_there, 0).amax(-1)

    return of_texts


class Categorical(Task):
    """A task whose answers are choices, `[..., decisions, choices]`."""

    function_to_apply = "softmax"
    exit_policy = "entropy"
    uncertainties = {"entropy": worst(entropy), "confidence": worst(confidence), "margin": worst(margin)}
    # Its entropy; how far its logit is above the second best; the probability that the exits before gave it, on
    # average; the share of them that answered the same.
    gate_features = ("entropy", "lead", "earlier_probability", "agreement")
    gate_link = "logit"

    def choices(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits of each decision's choices, `[..., decisions, choices]`."""
        raise NotImplementedError

    def number_of_choices(self, logits: torch.Tensor) -> torch.Tensor | int:
        """Return of how many choices each decision is, of such logits."""
        return logits.shape[-1]

    def each(self, measure, logits: torch.Tensor) -> torch.Tensor:
        """Return a measure of each decision, `[..., decisions]`; 0 where there is nothing to decide."""
        choices, nothing = self.choices(logits), self.has_no_token(logits)
        values = measure(choices, self.number_of_choices(choices))
        return values if nothing is None else values.masked_fill(nothing, 0)

    def probabilities(self, logits):
        return probabilities_of(logits)

    def predictions(self, logits):
        return self.choices(logits).argmax(-1)

    def divergence(self, students, teacher, temperature=1.0, reverse=False):
        # Softened logits make small gradients; the square gives them their size back (Hinton et al., 2015, section 2).
        given, wanted = (
            (self.choices(logits).float() / temperature).log_softmax(-1) for logits in (students, teacher)
        )
        given, wanted = (wanted, given) if reverse else (given, wanted)  # KL(student || teacher) if reverse
        divergences = nn.functional.kl_div(*torch.broadcast_tensors(given, wanted), reduction="none", log_target=True)
        return self.total(divergences.sum(-1), teacher) * temperature**2

    def total(self, of_decisions: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return what a loss of each decision makes for a text, `[...]`."""
        return of_decisions.sum(-1)

    def check_gold(self, labels):
        given = labels[labels != -100] if self.layout.per_token else labels
        if not self.layout.per_token and labels.dim() > 1:
            raise ValueError(f"labels must be one id for each row, got {list(labels.shape[1:])} of them.")
        if given.numel() and (given.min() < 0 or given.max() >= self.num_labels):
            raise ValueError(
                f"labels must be from 0 to {self.num_labels - 1}, got {given.min()} to {given.max()}: for data "
                "without gold labels leave out the column 'labels'."
            )

    def start_patience(self, texts, device):
        return torch.full((texts, self.decisions, 2), -1, device=device)

    def start_gate(self, texts, device):
        # The probabilities and the answers of the exits so far, added up.
        return torch.zeros(texts, 2, self.decisions, self.choices_of_each, device=device)

    @property
    def choices_of_each(self) -> int:
        """Of how many labels each decision is."""
        return self.num_labels

    def gate(self, logits, state):
        choices = self.choices(logits.float())
        probabilities, answers = probabilities_of(choices), choices.argmax(-1, keepdim=True)  # [texts, decisions, 1]
        best, second = choices.topk(2).values.unbind(-1)
        # Of the answer, by the exits so far: [texts, 2, decisions].
        earlier = state.gather(3, answers[:, None].expand(-1, 2, -1, -1)).squeeze(3)
        earlier = earlier / state[:, 1].sum(-1).clamp_(min=1)[:, None]
        votes = torch.zeros_like(probabilities).scatter_(2, answers, 1.0)
        doubts = torch.special.entr(probabilities).sum(-1) / self.log_of_choices(choices)
        trusts = torch.stack([(best - second).clamp_(max=MOST_LEAD), *earlier.unbind(1)], -1)  # [texts, decisions, 3]
        nothing = self.has_no_token(logits)
        if nothing is not None:
            doubts, trusts = doubts.masked_fill(nothing, 0), trusts.masked_fill(nothing[..., None], MOST_LEAD)
        features = torch.cat([doubts.amax(-1, keepdim=True), trusts.amin(-2)], -1)
        return features, state + torch.stack([probabilities, votes], 1)

    def log_of_choices(self, choices: torch.Tensor) -> torch.Tensor | float:
        """Return the log of the number of choices."""
        number = self.number_of_choices(choices)
        return math.log(number) if isinstance(number, int) else number.log()

    def gate_uncertainty(self, weighed):
        return weighed.sigmoid()

    def gate_target(self, logits, full_logits):
        return self.differs(logits, full_logits)


class SingleLabel(Categorical):
    """One of several labels for each text."""

    name = "single_label_classification"
    uncertainties = {"entropy": only(entropy), "confidence": only(confidence), "margin": only(margin)}
    least_labels = 2
    decisions = 1

    def choices(self, logits):
        return logits.unsqueeze(-2)

    def predictions(self, logits):
        return logits.argmax(-1)

    def decided(self, logits):
        return logits.argmax(-1, keepdim=True)

    def loss(self, logits, labels):
        labels = labels if labels.is_floating_point() else labels.view(-1)
        losses = _cross_entropy(logits, labels)
        return losses.mean() if labels.is_floating_point() else losses.sum() / (labels != -100).sum()


class MultiLabel(Categorical):
    r"""
    Any number of labels for each text: a choice for each of them. A label is answered where its probability is above
    0.5, or above the `label_thresholds` of the config; uncertainties count from there: \\( \ln \frac{p}{1-p} - \ln
    \frac{t}{1-t} \\) is what yes has before no.
    """

    name = "multi_label_classification"
    function_to_apply = "sigmoid"
    uncertainties = {**Categorical.uncertainties, "mean_entropy": mean(entropy)}

    def __init__(self, config=None):
        super().__init__(config)
        self.decisions = self.num_labels
        thresholds = getattr(config, "label_thresholds", None)
        self.shift = None if thresholds is None else torch.tensor(thresholds, dtype=torch.float32).logit()

    @property
    def choices_of_each(self) -> int:
        return 2

    def choices(self, logits):
        own = logits if self.shift is None else logits - self.shift.to(logits)
        return torch.stack([torch.zeros_like(own), own], -1)

    def check_gold(self, labels):
        if labels.dim() != 2 or labels.shape[1] != self.num_labels or not ((labels == 0) | (labels == 1)).all():
            raise ValueError(
                f"labels must be 0 or 1 for each of the {self.num_labels} labels, got {labels.flatten()[:8].tolist()}"
                ": for data without gold labels leave out the column 'labels'."
            )

    def probabilities(self, logits):
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()

    def loss(self, logits, labels):
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}: give a 0 or a "
                "1 for each label of each row, as torch.tensor([[1.0, 0.0, 1.0]])."
            )
        labels = labels.to(logits.dtype)
        if not ((labels >= 0) & (labels <= 1)).all():
            row = int((~((labels >= 0) & (labels <= 1))).any(-1).nonzero()[0])
            raise ValueError(
                f"the labels of row {row}, {labels[row, :8].tolist()}, are not all from 0 to 1: 1 where the text has "
                "a label, 0 where not, as torch.tensor([[1.0, 0.0, 1.0]])."
            )
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)


class TokenLabels(Categorical):
    """
    One of several labels for each token. A text leaves where its most uncertain token is sure, or its most uncertain
    run of neighbours: the sentence-level exits of Li et al. (ACL 2021).
    """

    name = "token_classification"
    layout = TokenLayout()
    least_labels = 2
    uncertainties = {
        **Categorical.uncertainties,
        "mean_entropy": mean(entropy),
        "window_entropy": worst_window(entropy),
    }
    label_kind = "token_ids"
    decisions = 0  # as many as a text has tokens

    def choices(self, logits):
        return logits

    def has_no_token(self, logits):
        return (logits == NO_TOKEN).all(-1)

    def fit(self, state, logits, value):
        return with_tokens(state, logits.shape[-2], value)

    def labelled(self, logits, labels):
        if labels is None:
            return logits
        nothing = (labels == -100).view(len(labels), *[1] * (logits.dim() - 3), -1, 1)
        return logits.masked_fill(nothing, NO_TOKEN)

    def total(self, of_decisions, logits):
        return of_decisions.sum(-1) / (~self.has_no_token(logits)).sum(-1).clamp(min=1)

    def loss(self, logits, labels):
        if labels.shape != logits.shape[:-1] or labels.is_floating_point():
            raise ValueError(
                f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}: give an id "
                "for each token, -100 for those that have none."
            )
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


class Span(Categorical):
    """Where an answer begins in a text and where it ends: two choices among its tokens."""

    name = "question_answering"
    layout = TokenLayout()
    label_kind = "spans"
    least_labels = 2
    decisions = 2

    def check_gold(self, labels):
        if labels.dim() != 2 or labels.shape[1] != 2 or (labels < 0).any():
            raise ValueError(
                f"labels must be the first and the last token of each answer, got {labels.flatten()[:8].tolist()}."
            )

    def cat_labels(self, parts):
        return torch.cat(list(parts))

    def probabilities(self, logits):
        return probabilities_of(self.choices(logits)).transpose(-1, -2)

    def choices(self, logits):
        return logits.transpose(-1, -2)

    def number_of_choices(self, logits):
        return (logits != NO_TOKEN).sum(-1).clamp(min=2).float()

    def start_gate(self, texts, device):
        return torch.zeros(texts, 2, 0, 2, device=device)

    def fit(self, state, logits, value):
        remembers_tokens = state.dim() == 4  # as gates do
        return with_tokens(state, logits.shape[-2], value) if remembers_tokens else state

    def gate(self, logits, state):
        features, state = super().gate(logits, state.transpose(-1, -2))
        return features, state.transpose(-1, -2)

    def loss(self, logits, labels):
        if labels.shape != (len(logits), 2) or labels.is_floating_point():
            raise ValueError(
                f"labels of shape {list(labels.shape)} do not fit {len(logits)} texts: give the first and the last "
                "token of each answer, as torch.tensor([[3, 5]])."
            )
        # As in the stock models: ends beyond the text are ignored.
        labels = labels.clamp(0, logits.shape[1])
        ends = zip(logits.unbind(-1), labels.unbind(-1), strict=True)
        return sum(nn.functional.cross_entropy(own, end, ignore_index=logits.shape[1]) for own, end in ends) / 2


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each row, `[rows]`; that of a row with the label -100 is 0."""
    are_probabilities = labels.is_floating_point()
    if labels.shape != (logits.shape if are_probabilities else logits.shape[:1]):
        raise ValueError(
            f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}: give one id for "
            "each row, as torch.tensor([0, 2]), or the probabilities of all labels, as torch.tensor([[0.9, 0.1]])."
        )
    if are_probabilities:
        tolerance = max(1e-3, torch.finfo(labels.dtype).eps)  # those in bfloat16 are rounded
        labels = labels.to(logits.dtype)
        right = ((labels.sum(-1) - 1).abs() <= tolerance) & (labels >= 0).all(-1)
        if not right.all():
            row = right.logical_not().nonzero()[0].item()
            raise ValueError(
                f"the labels of row {row}, {[round(value, 4) for value in labels[row, :8].tolist()]}, are no "
                "probabilities, which add up to 1. Several labels for one text need a model with "
                'problem_type="multi_label_classification"; for a single one give its id, as torch.tensor([0, 2]).'
            )
    return nn.functional.cross_entropy(logits, labels, reduction="none")
