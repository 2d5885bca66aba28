"""Train a small Ling 2.0 from scratch on stepbench, balanced the Ling way.

1. Draw problems of the three families in equal number, endless and never from a shipped split. A curriculum begins with few
   operations and bare problems: with many premises to choose from, looking one up is learned late.
2. Gather ``batch_tokens`` tokens of problems for a step, all families mixed, and compute them in parts of about equal length.
3. Minimise the next-token loss: solution tokens count 1, prompt tokens ``prompt_weight`` (a random prompt is mostly noise).
4. After every step move each router's bias, without any auxiliary loss: with c the tokens an expert got,
   ``bias += rate * (sign(mean(c) - c) - mean(sign(mean(c) - c)))`` (arXiv 2408.15664, as Ling 2.0 applies it).
5. Warm up, hold, and decay the learning rate linearly to zero; write a log line every ``log_every`` steps.

Routing and experts learn jointly from the first step. The result is saved in the original Ling layout with its tokenizer.
"""

from ling_probe.train.balance import BiasBalancer
from ling_probe.train.batches import Batch, collate, encode, training_batches, weighted_losses
from ling_probe.train.recipe import PRESETS, Recipe
from ling_probe.train.team import Team
from ling_probe.train.training import new_config, new_model, save, train

__all__ = [
    "PRESETS",
    "Batch",
    "BiasBalancer",
    "Recipe",
    "Team",
    "collate",
    "encode",
    "new_config",
    "new_model",
    "save",
    "train",
    "training_batches",
    "weighted_losses",
]
