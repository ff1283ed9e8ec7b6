"""
Train FastBERT and its baselines on your data, each by its name, and tell what each gives at equal speed-ups.

Stages that recipes share are trained once, and finished ones are not repeated. The numbers are those of the validation
rows: to report a result, choose speeds on them and evaluate on others, with the command `evaluate_speeds`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .options import (
    DataOptions,
    check_choice,
    check_data_options,
    default_backbone,
    fail,
    one_line_errors,
    parse_options,
)
from .splits import encode_splits, load_splits


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data import Splits
    from ..evaluation import ExitRecord
    from ..modeling.modeling_fastbert import FastBertForSequenceClassification
    from ..training.recipes import Recipe


SPEED_UPS = (1.5, 2, 3, 4)  # times fewer layers executed


@dataclass
class RecipeOptions(DataOptions):
    """Which recipes on which data."""

    list_recipes: bool = field(default=False, metadata={"help": "List the recipes and end."})
    recipes: list[str] = field(
        default_factory=lambda: ["fastbert"], metadata={"help": "Names; --list_recipes shows them."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained encoder; a small English one from PyPI if none."}
    )
    output_dir: str = field(default="outputs/recipes", metadata={"help": "Folder of the trained stages."})
    num_hidden_layers: int = field(default=3, metadata={"help": "k of bert_kl and distilled_kl."})
    exit_type: str | None = field(
        default=None, metadata={"help": "Exits in place of the recipe's own: attention, linear or linear_mean."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Of stages that train the backbone."})
    num_train_epochs: float = field(default=4, metadata={"help": "Of stages that train the backbone."})
    exits_learning_rate: float = field(default=1e-3, metadata={"help": "Of stages that train the students alone."})
    exits_num_train_epochs: float = field(default=5, metadata={"help": "Of stages that train the students alone."})
    temperature: float = field(default=1.0, metadata={"help": "Of self-distillation."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows in a training batch."})
    seed: int = field(default=42, metadata={"help": "Of the new weights, dropout and the order of rows."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})


def chosen_recipes(options: RecipeOptions) -> dict[str, Recipe]:
    """Return the recipes that the options name, with the exits that they ask for."""
    from ..modeling.answer_layouts import TextLayout
    from ..modeling.exit_classifiers import exit_types_of
    from ..training.recipes import get_recipe

    with one_line_errors():
        recipes = {name: get_recipe(name) for name in options.recipes}
    check_choice("exit_type", options.exit_type, exit_types_of(TextLayout()))
    if options.exit_type is None:
        return recipes
    return {
        name: replace(recipe, config={**recipe.config, "exit_type": options.exit_type})
        for name, recipe in recipes.items()
    }


def load_recipe_data(options: RecipeOptions) -> tuple[Splits, PreTrainedTokenizerBase, dict[int, str]]:
    """Return the encoded rows, the backbone's tokenizer, and the name of each label."""
    from transformers import AutoConfig, AutoTokenizer

    from ..data import label_names

    with one_line_errors("the model cannot be loaded"):
        layers = AutoConfig.from_pretrained(options.model_name_or_path).num_hidden_layers
        tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    if not 1 <= options.num_hidden_layers <= layers:
        fail(f"--num_hidden_layers must be from 1 to {layers}, got {options.num_hidden_layers}")
    splits = load_splits(options, options.seed)
    with one_line_errors():
        id2label = dict(enumerate(label_names(splits.train, options.label_column)))
    label2id = {name: index for index, name in id2label.items()}
    return encode_splits(splits, options, tokenizer, label2id), tokenizer, id2label


def run_recipe(
    options: RecipeOptions,
    recipe: Recipe,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    id2label: dict[int, str],
) -> FastBertForSequenceClassification:
    """Run the stages of a recipe, unless they are finished, and return its model."""
    from ..training.recipes import train_recipe
    from ..training.stages import StageSettings

    with one_line_errors():
        return train_recipe(
            recipe,
            options.model_name_or_path,
            options.output_dir,
            splits.train,
            splits.validation,
            tokenizer,
            StageSettings(options.learning_rate, options.num_train_epochs),
            StageSettings(options.exits_learning_rate, options.exits_num_train_epochs, options.temperature),
            id2label,
            num_hidden_layers=options.num_hidden_layers if recipe.fixed_depth else None,
            unlabeled_dataset=splits.unlabeled,
            per_device_train_batch_size=options.per_device_train_batch_size,
            seed=options.seed,
            use_cpu=options.use_cpu,
            report_to="none",
        )


def line_of(recipe: Recipe, model: FastBertForSequenceClassification, record: ExitRecord) -> str:
    """Return what the table says of a recipe: the accuracy of all layers, and that at each speed-up."""
    from ..evaluation import at_speed_up, sweep_depths, sweep_speeds

    layers = model.config.num_hidden_layers
    full = f"{sweep_depths(model, record)['accuracy'].iloc[-1]:>10.1%}"
    if recipe.fixed_depth:
        return f"{full}   (all {layers} of its layers, always)"
    # Patience has one step for each number of agreements up to it.
    model.config.patience = max(1, layers - 1)
    table = sweep_speeds(model, record)
    reached = [at_speed_up(table, table, speed_up) for speed_up in SPEED_UPS]
    return full + "".join(f"{point['accuracy']:>8.1%}" if point else f"{'-':>8}" for point in reached)


def main(arguments: list[str] | None = None, example_data: Path | None = None) -> None:
    """
    Run the command.

    Args:
        arguments (`list[str]`, *optional*): The words of a command line; those of the program unless given.
        example_data (`Path`, *optional*): Folder of the `train.tsv` and `test.tsv` that are used if no data is named.
    """
    options = parse_options(RecipeOptions, __doc__, arguments)
    if options.list_recipes:
        from ..training.recipes import RECIPES

        for name, recipe in RECIPES.items():
            print(f"{name:36}{stages_of(recipe)}  [{recipe.source}]")
        return
    recipes = chosen_recipes(options)
    if not options.temperature > 0:
        fail(f"--temperature must be above 0, got {options.temperature}")
    check_data_options(options, example_data)
    options.model_name_or_path = options.model_name_or_path or default_backbone()
    splits, tokenizer, id2label = load_recipe_data(options)

    from ..evaluation import record_exits

    lines = []
    for name, recipe in recipes.items():
        print(f"\n{name}: {stages_of(recipe)}", flush=True)
        model = run_recipe(options, recipe, splits, tokenizer, id2label)
        record = record_exits(model, splits.validation)
        lines.append(f"{name:36}{line_of(recipe, model, record)}")
    header = "".join(f"{f'{speed_up}x':>8}" for speed_up in SPEED_UPS)
    print(f"\n{'accuracy on the validation rows':36}{'all layers':>10}{header}")
    print("\n".join(lines))
    print(f"\nThe models are in {options.output_dir}.")


def stages_of(recipe: Recipe) -> str:
    """Return the stages of a recipe as words."""
    return ", then ".join(stage.name for stage in recipe.stages)


if __name__ == "__main__":
    main()
