"""Does a step need the experts it prefers? Change routing on given solutions and see what becomes of each kind of step.

1. Pick the experts that a run's steps of a label prefer, and matched ones of the same layers and load. `picking`, `targets`
2. Cut given solutions, best of other problems, into units: every reasoning step and the answer.               `measure`
3. Read them under the model's own router, under the change, and under the same change to matched experts.      `study`
4. Or give a step's tokens the experts that the same tokens chose in steps of its kind, and of another.      `transplant`
5. Compare the rise of the loss in steps of the label, in other steps and in the answer, problem by problem.   `effects`

The text is given, so an effect is on how well the next token is known, not on what the model would have written.
"""

from ling_probe.causal.measure import Scores, Solutions
from ling_probe.causal.picking import plan_study
from ling_probe.causal.rerouted import check_model, keep_rerouting
from ling_probe.causal.study import CONDITIONS, EFFECTS, TRANSPLANT, Study, intervene
from ling_probe.causal.targets import Target, doses, matched_experts, preferred_experts

__all__ = [
    "CONDITIONS", "EFFECTS", "TRANSPLANT", "Scores", "Solutions", "Study", "Target", "check_model", "doses", "intervene",
    "keep_rerouting", "matched_experts", "plan_study", "preferred_experts",
]  # fmt: skip
