"""
Train a cascade: a small classifier answers the texts that it is sure of, and a large one the rest.

The stages are those of Li et al., Findings of EMNLP 2021:

1. The large member is fine-tuned.
2. So is the small one. The first layers of the large one learn its answers (section 5.4), a complete small model the
   gold labels.
3. Every training row is labelled as easy or hard for the small member (section 3.2). Rows with a column `difficulty`,
   as the command `label_difficulty` writes it, are labelled already.
4. The small member is trained on gold labels and to be less sure of hard rows than of easy ones.

Each has a folder below `stages` in the output folder, and a finished one is not repeated: to try other weights and
margins, call again. What stage 4 gains is fairly told by another call with `--difficulty_weight 0`, which trains as
long. The numbers are those of the validation rows: to report a result, choose on them and evaluate on others.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..escapes import printable
from .cascade_options import CascadeOptions, check_cascade_options, check_difficulty, check_members
from .cascade_report import print_answers, print_quality, print_speeds
from .options import default_backbone, one_line_errors, parse_options
from .splits import encode_splits, load_splits


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from ..data import Splits
    from ..modeling.modeling_cascade import CascadeForSequenceClassification
    from ..modeling.modeling_fastbert import FastBertForSequenceClassification
    from ..modeling.processing_cascade import CascadeProcessor


@dataclass(frozen=True)
class CascadeMember:
    """
    What a member is made of.

    Args:
        backbone (`str`): Its pretrained encoder.
        folder (`Path`): Of its stages.
        tokenizer (`PreTrainedTokenizerBase`): The encoder's tokenizer.
        splits ([`Splits`]): The rows in its tokens.
        num_hidden_layers (`int`, *optional*): How many of the first layers it has, if not all.
        learns_answers (`bool`): Whether the large member's answers take the place of the gold labels in stage 2.
    """

    backbone: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    splits: Splits
    num_hidden_layers: int | None = None
    learns_answers: bool = False


def load_members(
    options: CascadeOptions, splits: Splits, id2label: dict[int, str]
) -> tuple[CascadeMember, CascadeMember]:
    """Return the small and the large member, with the rows in the tokens of each."""
    from transformers import AutoTokenizer

    label2id = {name: index for index, name in id2label.items()}
    stages, small = Path(options.output_dir, "stages"), options.small_model_name_or_path

    def load(backbone: str, folder: Path) -> CascadeMember:
        with one_line_errors("the model cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(backbone)
        return CascadeMember(backbone, folder, tokenizer, encode_splits(splits, options, tokenizer, label2id))

    large = load(options.model_name_or_path, stages)
    if small is not None:
        return load(small, stages / "small"), large
    taught = options.knowledge_distillation
    return replace(large, num_hidden_layers=options.num_hidden_layers, learns_answers=taught), large


def config_of_exits(options: CascadeOptions) -> dict[str, Any]:
    """Return the fields of the members' configs. Only the last exit is ever asked, so the others are made small."""
    return {"exit_type": options.exit_type, "share_exit_pooler": True}


def training_settings(options: CascadeOptions) -> dict[str, Any]:
    """Return what all trainings have in common, beside the learning rate and the epochs."""
    return {
        "per_device_train_batch_size": options.per_device_train_batch_size,
        "use_cpu": options.use_cpu,
        "report_to": "none",
    }


def fine_tune(
    options: CascadeOptions, member: CascadeMember, id2label: dict[int, str]
) -> tuple[FastBertForSequenceClassification, Path]:
    """Return the model of a member after stage 1 or 2, and the folder of the stage."""
    from ..training.recipes import Recipe, stage_folders, train_recipe
    from ..training.stages import Distillation, FineTuning, StageSettings

    stages = (FineTuning(), Distillation()) if member.learns_answers else (FineTuning(),)
    recipe = Recipe(stages, config_of_exits(options), fixed_depth=member.num_hidden_layers is not None)
    settings = StageSettings(options.learning_rate, options.num_train_epochs)
    with one_line_errors():
        model = train_recipe(
            recipe,
            member.backbone,
            member.folder,
            member.splits.train,
            member.splits.validation,
            member.tokenizer,
            settings,
            settings,
            id2label,
            num_hidden_layers=member.num_hidden_layers,
            seed=options.seed,
            **training_settings(options),
        )
    return model, stage_folders(recipe, member.folder, member.num_hidden_layers)[-1]


def train_with_difficulty(
    options: CascadeOptions,
    member: CascadeMember,
    before: FastBertForSequenceClassification,
    stage_folder: Path,
    difficulty: list[int] | None,
) -> FastBertForSequenceClassification:
    """
    Return the model of the small member after the stages 3 and 4.

    Args:
        options ([`CascadeOptions`]): The settings.
        member ([`CascadeMember`]): The small member.
        before ([`FastBertForSequenceClassification`]): After stage 2.
        stage_folder (`Path`): Of stage 2.
        difficulty (`list[int]`, *optional*): 0 or 1 for each training row; labelled unless given.
    """
    from transformers import AutoModel, TrainingArguments, set_seed

    from ..modeling.modeling_fastbert import FastBertForSequenceClassification
    from ..training.difficulty import hard_shares, label_difficulty
    from ..training.settings_files import digest_of
    from ..training.stages import DifficultyAwareFineTuning, run_stage

    encoder = AutoModel.from_pretrained(member.backbone, dtype="float32")
    id2label, label2id = before.config.id2label, before.config.label2id

    def model_init() -> FastBertForSequenceClassification:
        return FastBertForSequenceClassification.from_backbone(
            encoder,
            num_hidden_layers=member.num_hidden_layers,
            id2label=id2label,
            label2id=label2id,
            **config_of_exits(options),
        )

    if difficulty is not None:
        train = member.splits.train.add_column("difficulty", difficulty)
    else:
        print("\nStage 3: which rows are hard for the small member.", flush=True)
        arguments = TrainingArguments(
            str(member.folder / f"difficulty-{options.exit_type}_{before.config.num_hidden_layers}"),
            learning_rate=options.learning_rate,
            num_train_epochs=options.num_train_epochs,
            warmup_steps=0.1,
            **training_settings(options),
        )
        with one_line_errors():
            train = label_difficulty(
                model_init,
                arguments,
                member.splits.train,
                options.num_folds,
                options.seeds,
                processing_class=member.tokenizer,
            )
    shares = hard_shares(train, list(id2label.values()))
    print(f"Hard rows: {', '.join(f'{printable(name)} {share:.1%}' for name, share in shares.items())}.")

    print("\nStage 4: the small member learns to be less sure of hard rows.", flush=True)
    stage = DifficultyAwareFineTuning(
        options.learning_rate, options.num_train_epochs, options.difficulty_weight, options.difficulty_margin
    )
    # Other labels of difficulty are another training.
    labels = hashlib.sha256(bytes(train["difficulty"][:])).hexdigest()[:8]
    settings = {"per_device_train_batch_size": options.per_device_train_batch_size, "seed": options.seed}

    def make_trainer(output_dir: str) -> Trainer:
        set_seed(options.seed)
        model = copy.deepcopy(before) if member.learns_answers else model_init()
        rows = train, member.splits.validation
        arguments = {**training_settings(options), "seed": options.seed}
        return stage.make_trainer(output_dir, model, *rows, member.tokenizer, **arguments)

    folder = member.folder / f"{stage_folder.name}-{stage.name}_{labels}"
    with one_line_errors():
        model_dir = run_stage(folder, {"data": digest_of(train), **stage.settings(), **settings}, make_trainer)
    return FastBertForSequenceClassification.from_pretrained(model_dir).to(before.device)


def join_members(
    options: CascadeOptions,
    members: tuple[CascadeMember, CascadeMember],
    models: list[FastBertForSequenceClassification],
) -> tuple[CascadeForSequenceClassification, CascadeProcessor]:
    """Return the cascade of the trained models, and its tokenizers."""
    from ..modeling.modeling_cascade import CascadeForSequenceClassification
    from ..modeling.processing_cascade import CascadeProcessor

    for model in models:
        # The exits below have learned nothing.
        model.config.min_exit_layer = model.config.num_hidden_layers
    tokenizers = [member.tokenizer for member in members]
    cascade = CascadeForSequenceClassification.from_members(
        models, tokenizers=tokenizers, exit_policy=options.exit_policy, speed=options.speed
    )
    return cascade, CascadeProcessor.from_members(models, tokenizers)


def main(arguments: list[str] | None = None, example_data: Path | None = None) -> None:
    """
    Run the command.

    Args:
        arguments (`list[str]`, *optional*): The words of a command line; those of the program unless given.
        example_data (`Path`, *optional*): Folder of the `train.tsv` and `test.tsv` that are used if no data is named.
    """
    options = parse_options(CascadeOptions, __doc__, arguments)
    check_cascade_options(options, example_data)
    options.model_name_or_path = options.model_name_or_path or default_backbone()
    check_members(options)
    splits = load_splits(options, options.seed)
    check_difficulty(options, splits.train)

    from ..data import label_names
    from ..evaluation import record_exits, sweep_speeds
    from ..modeling.tasks import task_of
    from ..sharing import Measured, write_model_card

    with one_line_errors():
        id2label = dict(enumerate(label_names(splits.train, options.label_column)))
    small, large = load_members(options, splits, id2label)

    print("\nStage 1: fine-tuning the large member.", flush=True)
    large_model, _ = fine_tune(options, large, id2label)
    print("\nStage 2: fine-tuning the small member.", flush=True)
    small_model, stage_folder = fine_tune(options, small, id2label)
    records = {"after stage 2": record_exits(small_model, small.splits.validation)}
    if options.difficulty:
        columns = splits.train.column_names
        difficulty = list(map(int, splits.train["difficulty"])) if "difficulty" in columns else None
        small_model = train_with_difficulty(options, small, small_model, stage_folder, difficulty)
    cascade, processor = join_members(options, (small, large), [small_model, large_model])

    validation = [member.splits.validation for member in (small, large)]
    record = record_exits(cascade, validation if cascade.config.own_tokenizers else validation[1])
    if options.difficulty:
        records["after stage 4"] = record.of_member(1)
    table = sweep_speeds(cascade, record, sorted({*options.eval_speeds, options.speed}))
    print_quality(records, task_of(cascade.config))
    print_speeds(table)

    folder = Path(options.output_dir)
    cascade.save_pretrained(folder)
    processor.save_pretrained(folder)
    curve, rows = sweep_speeds(cascade, record), len(splits.validation)
    names = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "seed")
    names = ("difficulty_weight", "difficulty_margin", *names) if options.difficulty else names
    settings = {"knowledge_distillation": small.learns_answers, **{name: getattr(options, name) for name in names}}
    measured = Measured(table, rows=rows, dataset=options.dataset_name, curve=curve)
    write_model_card(folder, cascade, measured, training=settings)
    print(f"\nThe cascade, its tokenizer and its card are in {folder}. A few answers at speed {options.speed:g}:\n")
    print_answers(options, folder, splits.validation, large_model.device)


if __name__ == "__main__":
    main()
