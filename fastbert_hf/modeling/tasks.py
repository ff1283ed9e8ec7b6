"""The table of tasks: what an exit answers and how sure it is of it."""

from __future__ import annotations

from transformers import PreTrainedConfig

from .categorical_tasks import MultiLabel, SingleLabel, Span, TokenLabels
from .regression_task import Regression
from .task_interface import Task


# What `task` of a config can be, as the Hub calls it, and of a classifier of texts its `problem_type`.
TEXT_TASKS: dict[str, type[Task]] = {task.name: task for task in (SingleLabel, MultiLabel, Regression)}
TASKS: dict[str, type[Task] | dict[str, type[Task]]] = {
    "text-classification": TEXT_TASKS,
    "token-classification": TokenLabels,
    "question-answering": Span,
}
EVERY_TASK: tuple[type[Task], ...] = (*TEXT_TASKS.values(), TokenLabels, Span)


def task_class(config: PreTrainedConfig) -> type[Task]:
    """
    Return the task of a config. As in Transformers, a classifier of texts whose `problem_type` says nothing has one
    label for each text, and with a single output it is a regression.

    Raises:
        ValueError: If there is no such task, or it has too few labels.
    """
    name = getattr(config, "task", "text-classification")
    if name not in TASKS:
        raise ValueError(f"task={name!r} is not known; choose one of {', '.join(TASKS)}.")
    task = TASKS[name]
    if isinstance(task, dict):
        problem_type = config.problem_type or ("regression" if config.num_labels == 1 else SingleLabel.name)
        if not isinstance(problem_type, str) or problem_type not in task:
            raise ValueError(f"problem_type={problem_type!r:.60} is not known; choose one of {', '.join(task)}.")
        task = task[problem_type]
    if config.num_labels < task.least_labels:
        raise ValueError(
            f"num_labels={config.num_labels} is too few for {task.name}, which needs {task.least_labels}. Example: "
            "num_labels=2"
        )
    return task


def task_of(config: PreTrainedConfig) -> Task:
    """Return the task of a config, bound to it; see [`task_class`]."""
    return task_class(config)(config)
