"""The options of the command `cascade`, and what is checked before any work is put into them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .options import DataOptions, check_choice, check_data_options, fail, one_line_errors


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class CascadeOptions(DataOptions):
    """Which cascade on which data."""

    # No stage learns from texts without labels.
    unlabeled_file: str | None = field(init=False, default=None)
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained encoder of the large member; a small English one from PyPI if none."},
    )
    small_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained encoder of the small member; the first layers of the large one if none."},
    )
    num_hidden_layers: int = field(
        default=2, metadata={"help": "How many of these, where --small_model_name_or_path names no other."}
    )
    output_dir: str = field(default="outputs/cascade", metadata={"help": "Folder of the cascade and its stages."})
    knowledge_distillation: bool = field(
        default=True,
        metadata={
            "help": "The first layers learn the answers of the large member, and stage 4 goes on from there, as they "
            "stand for a complete model (section 5.4). Without, and with --small_model_name_or_path, the stages 2 and "
            "4 both train the pretrained weights on gold labels (section 3.2)."
        },
    )
    difficulty: bool = field(default=True, metadata={"help": "Run the stages 3 and 4."})
    num_folds: int = field(default=8, metadata={"help": "K, the parts of the rows in stage 3."})
    seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 5], metadata={"help": "Of one round of stage 3 each."}
    )
    difficulty_weight: float = field(default=0.5, metadata={"help": "Of the regularisation in stage 4."})
    difficulty_margin: float = field(
        default=0.5, metadata={"help": "In [0, 1]: how much more confident easy rows are to be than hard ones."}
    )
    exit_type: str = field(
        default="linear_mean", metadata={"help": "Head of the members: attention, linear or linear_mean."}
    )
    exit_policy: str = field(default="confidence", metadata={"help": "confidence, entropy or margin."})
    speed: float = field(default=0.5, metadata={"help": "The speed of the saved cascade where a call names none."})
    eval_speeds: list[float] = field(
        default_factory=lambda: [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0],
        metadata={"help": "Speeds of the table at the end."},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Of each training."})
    num_train_epochs: float = field(default=3, metadata={"help": "Of each training."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows in a training batch."})
    seed: int = field(default=42, metadata={"help": "Of the new weights, dropout and the order of rows."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})


def check_cascade_options(options: CascadeOptions, example_data: Path | None) -> None:
    """
    End the program if an option is wrong, as far as that can be told without a look into models and data.

    Args:
        options ([`CascadeOptions`]): The paths of its files become those of the found ones.
        example_data (`Path`, *optional*): Folder of the `train.tsv` and `test.tsv` that are used if no data is named.
    """
    from ..modeling.answer_layouts import TextLayout
    from ..modeling.configuration_cascade import FREE_CASCADE_POLICIES
    from ..modeling.exit_classifiers import exit_types_of
    from ..modeling.exit_policies import check_speed
    from ..training.difficulty_aware_trainer import DifficultyAwareArguments

    check_data_options(options, example_data)
    check_choice("exit_type", options.exit_type, exit_types_of(TextLayout()))
    check_choice("exit_policy", options.exit_policy, FREE_CASCADE_POLICIES)
    if len(set(options.seeds)) < len(options.seeds):
        fail(f"--seeds must be different numbers, got {' '.join(map(str, options.seeds))}")
    with one_line_errors():
        for speed in (options.speed, *options.eval_speeds):
            check_speed(speed)
        DifficultyAwareArguments(
            options.output_dir,
            use_cpu=options.use_cpu,
            difficulty_weight=options.difficulty_weight,
            difficulty_margin=options.difficulty_margin,
        )


def check_members(options: CascadeOptions) -> None:
    """End the program if the models that the options name make no cascade. Only their configs are loaded."""
    import torch
    from transformers import AutoConfig

    from ..modeling.configuration_fastbert import FastBertConfig
    from ..modeling.modeling_cascade import check_order
    from ..modeling.modeling_fastbert import FastBertForSequenceClassification

    names = [name for name in (options.small_model_name_or_path, options.model_name_or_path) if name]
    with one_line_errors("the model cannot be loaded"):
        configs = [FastBertConfig(text_config=AutoConfig.from_pretrained(name)) for name in names]
    if options.small_model_name_or_path is None:
        layers = configs[0].num_hidden_layers
        if not 1 <= options.num_hidden_layers < layers:
            fail(
                f"--num_hidden_layers must be from 1 to {layers - 1}, fewer than the large member has, got "
                f"{options.num_hidden_layers}"
            )
        return
    with one_line_errors(), torch.device("meta"):
        check_order([FastBertForSequenceClassification(config) for config in configs])


def check_difficulty(options: CascadeOptions, train: Dataset) -> None:
    """End the program if the training rows have no right labels of difficulty and cannot be given them either."""
    if not options.difficulty:
        return
    if "difficulty" not in train.column_names:
        if not 2 <= options.num_folds <= len(train):
            fail(f"--num_folds must be from 2 to {len(train)}, the number of training rows, got {options.num_folds}")
        return
    unknown = [value for value in train["difficulty"] if value not in (0, 1)]
    if unknown:
        fail(
            f"the column 'difficulty' of the training data must be 0 (easy) or 1 (hard), got {unknown[0]!r}: label "
            "the rows with examples/label_difficulty.py, or leave them unlabelled with --no_difficulty"
        )
