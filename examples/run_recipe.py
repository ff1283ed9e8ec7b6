"""
Train FastBERT and its baselines on your data, each by its name, and tell what each gives at equal speed-ups.

    python examples/run_recipe.py --list_recipes

    # FastBERT, DeeBERT and the first three layers alone, on the reviews of examples/data
    python examples/run_recipe.py --recipes fastbert deebert bert_kl --num_hidden_layers 3

    python examples/run_recipe.py --recipes fastbert pabee --model_name_or_path bert-base-uncased \\
        --train_file train.tsv --validation_file dev.tsv --output_dir outputs/baselines
"""

from pathlib import Path

from fastbert_hf.commands.recipe import main


if __name__ == "__main__":
    main(example_data=Path(__file__).parent / "data")
