"""
Label which of your training rows are hard: those that a small model answers wrongly without training on them.

    # The reviews of examples/data, judged by the first two layers of a small model
    python examples/label_difficulty.py

    python examples/label_difficulty.py --model_name_or_path bert-base-uncased --num_hidden_layers 2 \\
        --train_file train.tsv --output_file outputs/difficulty.jsonl
"""

from pathlib import Path

from fastbert_hf.commands.label_difficulty import main


if __name__ == "__main__":
    main(example_data=Path(__file__).parent / "data")
