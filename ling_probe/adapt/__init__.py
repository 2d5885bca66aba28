"""Adapt a model to a task by its routers alone, and say what that brought.

`tuning` changes the weights, `judging` answers what became of the task and of others.
"""

from ling_probe.adapt.judging import Judge, Task, task_problems
from ling_probe.adapt.tuning import DELTA, Adaptation, adapt, add_delta, tuned_parameters

__all__ = ["DELTA", "Adaptation", "Judge", "Task", "adapt", "add_delta", "task_problems", "tuned_parameters"]
