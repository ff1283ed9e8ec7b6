"""FastBertConfig: the backbone's own config plus what the exits need."""

# No `from __future__ import annotations` here: it would switch off the type checks of a strict config.
import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .checkpoint_checks import check_labels, check_raw_config, explained, read_config, shortened
from .dial_checks import check_calibration, check_certification
from .exit_classifiers import exit_types_of
from .exit_gates import check_gates
from .exit_policies import check_policy, check_speed, exit_range
from .families import get_encoder_family
from .feed_forward_settings import check_feed_forward
from .task_settings import check_task_settings
from .tasks import task_class
from .teacher_digest import is_digest
from .token_coarsening import check_coarsening


# Written by `save_with_code`.
CODE_FIELDS = ("auto_map", "custom_pipelines")


class OfBackbone:
    """A field of the backbone's config that can be read on this one, too, and is set there alone."""

    def __init__(self, what: str):
        self.__doc__ = what

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, owner: type | None = None) -> int:
        return self if config is None else getattr(config.text_config, self.name)

    def __set__(self, config: Any, value: Any) -> None:
        raise ValueError(
            f"{self.name}={shortened(value)} is the backbone's, and no field of FastBertConfig: give it before the "
            f"model is built, as in FastBertConfig(text_config=BertConfig({self.name}={shortened(value)}))."
        )


@strict
class FastBertConfig(PreTrainedConfig):
    r"""
    Configuration of a FastBERT model: a BERT-family encoder with an exit classifier after every layer
    (FastBERT, Liu et al., ACL 2020).

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a `BertConfig`):
            The backbone's own config.
        task (`str`, *optional*, defaults to `"text-classification"`):
            What the model answers: `"text-classification"`, whose `problem_type` is one label for each text unless it
            says `"multi_label_classification"` or `"regression"`; `"token-classification"`; or
            `"question-answering"`. The classes of models set it.
        exit_type (`str`, *optional*, defaults to `"attention"`, or `"token_dense"` where tokens are labelled):
            Structure of the exits. `"attention"` is the paper's (section 3.1.3: project to `exit_hidden_size`, one
            self-attention, first token, one dense layer); `"linear"` is dense, activation, dropout, Linear on the
            first token, `"linear_mean"` the same on the mean of all tokens. Of every token `"token_dense"` is dense to
            `exit_hidden_size`, GELU, dropout, Linear, and `"token_linear"` dropout and Linear alone.
        teacher_exit_type (`str`, *optional*, defaults to `exit_type`):
            Structure of the last exit. `from_classifier` sets it to that of the stock head, to keep it.
        share_exit_pooler (`bool`, *optional*, defaults to `False`):
            Whether the exits share everything but their last Linear (as in PABEE). A teacher of another type than
            the students keeps a pooler of its own.
        exit_hidden_size (`int`, *optional*, defaults to 128):
            Width of an attention exit.
        exit_num_attention_heads (`int`, *optional*, defaults to 2):
            Number of heads of an attention exit.
        exit_dropout (`float`, *optional*, defaults to 0.1):
            Dropout of the exits: on the attention probabilities, or before the last Linear of a linear exit.
        exit_policy (`str`, *optional*, defaults to `"entropy"`, or `"patience"` for a regression):
            How an exit's logits become an uncertainty in [0, 1]: `"entropy"` (the paper's, normalised by the log of
            the number of labels), `"confidence"`, `"margin"`, `"patience"` or `"learned"`, for which the model needs
            `gates`. Where a text has several labels, or one for each token, the least certain of them counts;
            `"mean_entropy"`, and for tokens `"window_entropy"`, take means ([`ExitPolicy`]).
        speed (`float`, *optional*, defaults to 0.5):
            The speed that the pipeline uses when the call names none. The model itself runs every layer then.
        patience (`int`, *optional*, defaults to 2):
            Agreements in a row after which the uncertainty of the patience policy is 0.
        min_exit_layer (`int`, *optional*):
            The first layer after which the pipeline lets a text leave. `None` means 1.
        max_layers (`int`, *optional*):
            The number of layers after which the pipeline answers at the latest. `None` means all.
        tolerance (`float`, *optional*):
            For a regression: how far two numbers may be apart and count as the same answer. 0 unless given, with which
            no exit agrees with another, and every layer is run.
        label_thresholds (`list` of `float`, *optional*):
            For several labels for each text: the probability above which each of them is answered. 0.5 unless given.
        feed_forward (`dict`, *optional*):
            Fast feed-forward layers in place of the backbone's own, of which each token meets a part: their `form`,
            its fields, and `layers`, the numbers of those that have them, all unless given.
            `{"form": "leaves", "depth": 3, "leaf_size": 96}` is a tree with a dense block at each leaf ([`LeafTree`]),
            `{"form": "neurons", "trees": 1, "depth": 11}` are trees of single neurons ([`NeuronTrees`]).
        coarsening (`dict`, *optional*):
            Where and how texts become shorter on their way: `layers`, numbers from 1; `retention`, for each of them
            the share of a text's tokens that it has from there on; and `merge`, `clusters`, `size_aware` as in
            [`Coarsening`]. `{"layers": [2, 4], "retention": [0.6, 0.4]}`
        distilled_for (`str`, *optional*):
            Digest of the backbone and teacher that the students were distilled from, `"float32:0123456789abcdef"`,
            as the trainer writes it. `None` says nothing of them.
        gates (`list` of `list` of `float`, *optional*):
            For the policy `"learned"`: of each exit a weight for each of four features ([`ExitGates`]), and a bias, as
            [`calibrate`] writes them.
        calibration (`dict`, *optional*):
            What speeds cost on a user's own texts, as [`calibrate`] writes it, so that a call may ask for a `speedup`.
        certification (`dict`, *optional*):
            How many answers differ there from the full model's, as [`calibrate`] or [`certify`] writes it, so that a
            call may ask for `max_disagreement`.

    Example:

    ```python
    >>> from transformers import BertConfig
    >>> from fastbert_hf import FastBertConfig, FastBertForSequenceClassification

    >>> config = FastBertConfig(text_config=BertConfig(num_hidden_layers=6), num_labels=4, exit_policy="margin")
    >>> model = FastBertForSequenceClassification(config)
    ```
    """

    model_type = "fastbert"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert")}
    # What Trainer must not collect as predictions beside the logits.
    keys_to_ignore_at_inference = ["exit_layer", "uncertainty", "exit_logits", "hidden_states", "attentions"]
    # What the pipeline passes on to `predict` where the call does not name it.
    call_defaults = ("speed", "min_exit_layer", "max_layers")

    text_config: dict | PreTrainedConfig | None = None
    task: str = "text-classification"
    exit_type: str | None = None
    teacher_exit_type: str | None = None
    share_exit_pooler: bool = False
    exit_hidden_size: int = 128
    exit_num_attention_heads: int = 2
    exit_dropout: float | int = 0.1
    exit_policy: str | None = None
    speed: float | int = 0.5
    patience: int = 2
    min_exit_layer: int | None = None
    max_layers: int | None = None
    tolerance: float | int | None = None
    label_thresholds: list | None = None
    feed_forward: dict | None = None
    coarsening: dict | None = None
    distilled_for: str | None = None
    gates: list | None = None
    calibration: dict | None = None
    certification: dict | None = None

    def __post_init__(self, **kwargs):
        # The model writes its attention into the backbone's config, so it must not be the caller's.
        self.text_config = copy.deepcopy(self.text_config)
        super().__post_init__(**kwargs)
        get_encoder_family(self.text_config)
        check_labels(self.id2label)
        task = task_class(self)
        exit_types = exit_types_of(task.layout)
        self.exit_type = exit_types[0] if self.exit_type is None else self.exit_type
        self.teacher_exit_type = self.exit_type if self.teacher_exit_type is None else self.teacher_exit_type
        for name in ("exit_type", "teacher_exit_type"):
            if getattr(self, name) not in exit_types:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not known for {task.name}; choose one of "
                    f"{', '.join(exit_types)}."
                )
        self.exit_policy = task.exit_policy if self.exit_policy is None else self.exit_policy
        check_policy(self.exit_policy, task)
        check_task_settings(self, task)
        for name in ("exit_hidden_size", "exit_num_attention_heads", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.exit_hidden_size % self.exit_num_attention_heads:
            raise ValueError(
                f"exit_hidden_size={self.exit_hidden_size} is not a multiple of "
                f"exit_num_attention_heads={self.exit_num_attention_heads}."
            )
        if not 0 <= self.exit_dropout < 1:
            raise ValueError(f"exit_dropout must be in [0, 1), got {self.exit_dropout}.")
        if self.distilled_for is not None and not is_digest(self.distilled_for):
            raise ValueError(
                f"distilled_for must be None or a dtype and 16 digits, as in 'float32:0123456789abcdef', got "
                f"{shortened(self.distilled_for)}: leave it to the trainer, or set it to None."
            )
        self.feed_forward = copy.deepcopy(self.feed_forward)
        check_feed_forward(self.feed_forward, self.num_hidden_layers)
        self.coarsening = copy.deepcopy(self.coarsening)
        check_coarsening(self.coarsening, self.num_hidden_layers)
        check_speed(self.speed)
        for name in ("gates", "calibration", "certification"):
            setattr(self, name, copy.deepcopy(getattr(self, name)))
        check_gates(self.gates, self.num_hidden_layers, self.exit_policy)
        check_certification(self.certification, 1, self.num_hidden_layers)
        check_calibration(self.calibration)
        exit_range(self.num_hidden_layers, self.min_exit_layer, self.max_layers)

    @property
    def label_kind(self) -> str:
        """What gold labels are, to a collator."""
        return task_class(self).label_kind

    @property
    def exit_policies(self) -> tuple[str, ...]:
        """Names of the exit policies that a model of this task can have."""
        return task_class(self).policies()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if not __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
            # The installed classes need no code beside the weights, so neither trust is asked for nor a save points
            # to it. Loaded as such code itself, this class keeps what says where it is.
            config_dict = {name: value for name, value in config_dict.items() if name not in CODE_FIELDS}
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type == "fastbert_cascade":
            raise ValueError(
                "This is the config of a 'fastbert_cascade' checkpoint, not of a FastBERT model: load it with "
                "CascadeForSequenceClassification.from_pretrained(name)."
            )
        if str(model_type).startswith("fastbert_") and model_type != cls.model_type:
            raise ValueError(
                f"This is the config of a {shortened(model_type)} checkpoint, which export wrote for another engine: "
                "load it with AutoModelForSequenceClassification.from_pretrained(name)."
            )
        if model_type != cls.model_type:
            raise ValueError(
                f"This is the config of a {shortened(model_type)} checkpoint, not of a FastBERT model, and loading "
                "it as one would leave every weight random. Wrap it: FastBertForSequenceClassification"
                ".from_backbone(name, num_labels=...) for a pretrained encoder, or .from_classifier(name) for a "
                "fine-tuned classifier."
            )
        check_raw_config(config_dict, cls)
        with explained("the config cannot be read"):
            return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        return read_config(json_file, super()._dict_from_json_file)

    num_hidden_layers = OfBackbone("Layers, L. The model has as many exits; the last one is the teacher.")
    hidden_size = OfBackbone("Width of the hidden states.")
    intermediate_size = OfBackbone("Width inside of the feed-forward layers.")
    num_attention_heads = OfBackbone("Heads of every layer's attention.")
    max_position_embeddings = OfBackbone("Positions that the backbone knows.")
    vocab_size = OfBackbone("Tokens that the backbone knows.")
    pad_token_id = OfBackbone("The token that padding consists of.")


__all__ = ["FastBertConfig"]
