"""`Trainer.hyperparameter_search` with a model of FastBERT: Transformers' own loop, around a small search."""

from __future__ import annotations

from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HyperParamSearchBackendBase
from transformers.trainer_utils import BestRun, HPSearchBackend

from fastbert_hf import SelfDistillationArguments, SelfDistillationTrainer

from ..common import student_names, tiny_model, tiny_rows, training_settings
from .common import assert_moved


class Search(HyperParamSearchBackendBase):
    """Tries learning rates in turn, and treats the trainer as Transformers' search with optuna does."""

    @staticmethod
    def is_available():
        return True

    def run(self, trainer, n_trials, direction, rates):
        results = []
        for rate in rates:
            trainer.objective = None
            trainer.args.learning_rate = rate
            trainer.train(resume_from_checkpoint=None, trial=None)
            trainer.objective = trainer.compute_objective(trainer.evaluate())
            results.append(trainer.objective)
            assert_moved(trainer.model, tiny_model().state_dict(), student_names(tiny_model()))
            trainer.model_wrapped = trainer.model = None
        best = results.index(min(results))
        return BestRun(str(best), results, {"learning_rate": rates[best]})


def search(tmp_path, monkeypatch, compute_objective=None) -> BestRun:
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Search)
    trainer = SelfDistillationTrainer(
        args=SelfDistillationArguments(**training_settings(tmp_path, warmup_steps=0, max_steps=6)),
        model_init=lambda trial: tiny_model(),
        train_dataset=tiny_rows(),
        eval_dataset=tiny_rows(),
    )
    return trainer.hyperparameter_search(compute_objective=compute_objective, backend="optuna", rates=[1e-5, 1e-3])


def test_search_minimises_the_loss_of_the_evaluation(tmp_path, monkeypatch):
    best = search(tmp_path, monkeypatch)
    assert best.hyperparameters == {"learning_rate": 1e-3}
    trainer = SelfDistillationTrainer(tiny_model(), SelfDistillationArguments(**training_settings(tmp_path)))
    untrained = trainer.evaluate(tiny_rows())["eval_loss"]
    assert best.objective[1] < best.objective[0] < untrained


def test_search_takes_another_quantity(tmp_path, monkeypatch):
    best = search(tmp_path, monkeypatch, compute_objective=lambda metrics: -metrics["eval_agreement_speed_0.8"])
    assert all(-1 <= value <= 0 for value in best.objective)
