"""Run in a process of its own (see `tests/test_hub.py`), where the package cannot be imported."""

from __future__ import annotations

import sys


def answers_by_id(text: str, *repo_ids: str) -> dict[str, dict]:
    """Return what checkpoints with their code say of a text, each downloaded by its id."""
    sys.modules["fastbert_hf"] = None
    from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

    said = {}
    for repo_id in repo_ids:
        classifier = pipeline("fast-text-classification", model=repo_id, trust_remote_code=True, speed=0.9)
        model = AutoModelForSequenceClassification.from_pretrained(repo_id, trust_remote_code=True)
        try:
            AutoModel.from_pretrained(repo_id, trust_remote_code=False)
            refused = ""
        except ValueError as error:
            refused = str(error)
        said[repo_id] = {
            "answers": {str(speed): classifier(text, speed=speed) for speed in (0, 0.75)} | {"0.9": classifier(text)},
            "modules": [type(thing).__module__ for thing in (classifier, model)],
            "refused": refused,
        }
    return said
