"""CascadeConfig: the configs of the members, smallest first, and when a text goes on to the next."""

# No `from __future__ import annotations` here: it would switch off the type checks of a strict config.
import copy

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .checkpoint_checks import check_raw_cascade, explained, read_config, shortened
from .configuration_fastbert import CODE_FIELDS, FastBertConfig
from .dial_checks import check_calibration, check_certification
from .exit_gates import check_gates
from .exit_policies import check_speed
from .tasks import task_class


# Patience counts agreements of neighbouring exits, and most members have one exit that may answer.
FREE_CASCADE_POLICIES = ("confidence", "entropy", "margin")
CASCADE_POLICIES = (*FREE_CASCADE_POLICIES, "learned")
# What reaches every member where it is set.
OF_ALL_MEMBERS = ("exit_policy", "id2label", "label2id", "dtype")


@strict
class CascadeConfig(PreTrainedConfig):
    r"""
    Configuration of a cascade of complete classifiers (CascadeBERT, Li et al., Findings of EMNLP 2021).

    Args:
        members (`list` of [`FastBertConfig`] or `dict`):
            At least two, cheapest first, with the same labels. A member whose `min_exit_layer` is its last layer
            answers there alone; in another a text may also leave early.
        own_tokenizers (`bool`, *optional*, defaults to `False`):
            Whether every member reads what its own tokenizer makes of a text. One tokenizer serves all unless given.
        exit_policy (`str`, *optional*, defaults to `"confidence"`):
            How logits become an uncertainty in [0, 1], at every exit of every member: `"confidence"`, `"entropy"`,
            `"margin"` or `"learned"`, as in [`FastBertConfig`]. With `"confidence"` a text goes on while \\( (1 -
            \max_i p_i) \cdot N / (N - 1) \\) is not below `speed`, so the threshold of the paper's Algorithm 1 is \\(
            \tau = 1 - \text{speed} \cdot (N - 1) / N \\) for N labels.
        speed (`float`, *optional*, defaults to 0.5):
            The speed that the pipeline uses when the call names none. The model itself asks the last member then.
        gates (`list` of `list` of `float`, *optional*):
            As in [`FastBertConfig`], of all exits of all members, one behind the other.
        calibration, certification (`dict`, *optional*):
            As in [`FastBertConfig`].

    Example:

    ```python
    >>> config = CascadeConfig(members=[small.config, large.config], exit_policy="margin")
    ```
    """

    model_type = "fastbert_cascade"
    keys_to_ignore_at_inference = ["exit_layer", "uncertainty", "exit_member"]
    # What the pipeline passes on to `predict` where the call does not name it.
    call_defaults = ("speed",)
    exit_policies = CASCADE_POLICIES

    members: list | None = None
    own_tokenizers: bool = False
    exit_policy: str = "confidence"
    speed: float | int = 0.5
    gates: list | None = None
    calibration: dict | None = None
    certification: dict | None = None

    def __post_init__(self, **kwargs):
        # The members write their attention into their configs, so they must not be the caller's.
        members = [member if isinstance(member, dict) else member.to_dict() for member in self.members or ()]
        self.members = [FastBertConfig.from_dict(copy.deepcopy(member)) for member in members]
        if self.members and self.id2label is None and "num_labels" not in kwargs:
            self.id2label = dict(self.members[0].id2label)
            self.label2id = {name: index for index, name in self.id2label.items()}
        if self.members and self.problem_type is None:
            self.problem_type = self.members[0].problem_type
        super().__post_init__(**kwargs)
        # Transformers builds a config without arguments to compare others with.
        if self.members:
            self.check_members()
        check_speed(self.speed)
        for name in ("gates", "calibration", "certification"):
            setattr(self, name, copy.deepcopy(getattr(self, name)))
        check_gates(self.gates, self.num_hidden_layers if self.members else 0, self.exit_policy)
        check_certification(self.certification, len(self.members), max(self.num_hidden_layers, 1))
        check_calibration(self.calibration, len(self.members))
        self.exit_policy, self.dtype = self.exit_policy, self.dtype  # they reach the members

    def __setattr__(self, key, value):
        if key == "exit_policy" and value not in CASCADE_POLICIES:
            raise ValueError(
                f"exit_policy={value!r} is not for a cascade; choose one of {', '.join(CASCADE_POLICIES)}."
            )
        super().__setattr__(key, value)
        # The gates are the cascade's, and a member has none of its own.
        reaches_members = key in OF_ALL_MEMBERS and (key, value) != ("exit_policy", "learned")
        if reaches_members and getattr(self, "_post_init_done", False):
            for member in self.members or ():
                setattr(member, key, copy.copy(value))
                if key == "dtype":  # Transformers builds a backbone in that of its own config
                    member.text_config.dtype = value

    def check_members(self) -> None:
        """Raise a `ValueError` unless the members can be those of a cascade."""
        if len(self.members) < 2:
            raise ValueError("a cascade has at least two members, got 1: give a smaller or a larger one beside it.")
        for number, member in enumerate(self.members, start=1):
            if member.id2label != self.id2label:
                raise ValueError(
                    f"member {number} has the labels {member.id2label}, but the cascade {self.id2label}: all members "
                    "must know the same labels in the same order. Fine-tune them with one id2label."
                )
            if member.problem_type != self.problem_type:
                raise ValueError(
                    f"member {number} has problem_type={member.problem_type!r}, and the cascade {self.problem_type!r}"
                    ": all of them must do the same."
                )
            if member.task != "text-classification" or self.exit_policy not in member.exit_policies:
                raise ValueError(
                    f"member {number} is for {task_class(member).name}, and a cascade needs one label or several for "
                    "each text: nothing else tells it which texts to pass on. Use a FastBERT model alone."
                )

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if not __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
            # As in FastBertConfig: the installed classes need no code beside the weights.
            config_dict = {name: value for name, value in config_dict.items() if name not in CODE_FIELDS}
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is the config of a {shortened(model_type)} checkpoint, not of a cascade. Make one of it and "
                "another: CascadeForSequenceClassification.from_members([small, large])"
            )
        check_raw_cascade(config_dict, cls, FastBertConfig)
        with explained("the config cannot be read"):
            return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        return read_config(json_file, super()._dict_from_json_file)

    def to_dict(self):
        output = super().to_dict()
        output["members"] = [member.to_diff_dict() for member in self.members or ()]
        for member in output["members"]:
            del member["transformers_version"]
        return output

    @property
    def label_thresholds(self) -> list | None:
        """Those of the last member, which count for the answers of all."""
        return self.members[-1].label_thresholds if self.members else None

    @property
    def num_hidden_layers(self) -> int:
        """Layers of all members together: what a text runs through that no member but the last is sure of."""
        return sum(member.num_hidden_layers for member in self.members)


__all__ = ["CascadeConfig"]
