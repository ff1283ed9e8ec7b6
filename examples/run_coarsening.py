"""
Make the texts of a fine-tuned classifier shorter on their way through the layers, and teach its exits. Texts without
labels are enough.

    python examples/run_coarsening.py  # the model that comes with the package, to try it

    python examples/run_coarsening.py --model_name_or_path org/my-finetuned-bert --train_file texts.csv \\
        --validation_file dev.csv --max_length 512 --target 0.5 --search true --output_dir outputs/short
"""

from pathlib import Path

from fastbert_hf.commands.coarsening import main


if __name__ == "__main__":
    main(example_data=Path(__file__).parent / "data")
