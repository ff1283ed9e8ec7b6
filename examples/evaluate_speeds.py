"""
Tell what each speed of a saved model costs and gives on your data: a table to choose from, and the paper's figures.

    python examples/evaluate_speeds.py --model_name_or_path outputs/quick_start --data_file examples/data/test.tsv

    # compare policies by Matthews correlation, measure wall-clock, keep all speeds and draw figures
    python examples/evaluate_speeds.py --model_name_or_path outputs/quick_start --data_file examples/data/test.tsv \\
        --policies entropy margin --metric matthews_correlation --time_speeds 0.3 0.5 \\
        --output outputs/speeds.csv --figures_dir outputs/figures
"""

from fastbert_hf.commands.evaluate_speeds import main


if __name__ == "__main__":
    main()
