"""Verdicts where the truth is known: on the planted model they are as planted, on its twin nothing about steps holds."""

import numpy as np
import pytest
from planted_model import planted_model, problems, shuffled_labels, truth

from ling_probe.analysis import answers
from ling_probe.causal import Study, Target, intervene
from ling_probe.claims import ClaimVerdict, claims
from ling_probe.recording import record

HOLDS, FAILS = ClaimVerdict.HOLDS, ClaimVerdict.FAILS
LEANING = 7.0
"""How many times more a step uses the words of its operation, where experts speak of it."""
STEPS = ("label_specialisation", "step_similarity", "routing_information", "label_decoding")
CONTEXT = ("routing_prediction", "token_overlap")


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    return planted_model(tmp_path_factory.mktemp("model") / "speaking", speaking=True)


def verdicts(run, *names):
    return {claim.key: claim for claim in claims(run, dict(answers(run, [*names, "causal_effects"])))}


def studied(loaded, run, benchmark, *kinds):
    """Change the experts planted for two operations, on other problems, beside as many of any others."""
    planted = {label: tuple(cell[:2] for cell in sorted(truth()) if cell[2] == label) for label in ("add", "premise")}
    targets = [Target(label=label, kind=kind, experts=cells) for label, cells in planted.items() for kind in kinds]
    even = {layer: np.ones(run.spec.n_experts) for layer in run.spec.routed_layers}
    intervene(loaded, list(benchmark.records), Study(targets=tuple(targets), draws=39), even, run.folder / "causal")


def test_what_was_planted_and_speaks_holds(speaking, tmp_path):
    run = record(speaking, problems(60, leaning=LEANING), tmp_path / "run")
    studied(speaking, run, problems(16, leaning=LEANING, seed=1), "exclude")
    found = verdicts(run, *STEPS)
    assert [part.verdict for part in found["follows_steps"].deciding] == [HOLDS] * len(found["follows_steps"].deciding)
    assert len(found["follows_steps"].deciding) >= 3
    assert found["follows_steps"].verdict is HOLDS
    assert found["causal"].verdict is HOLDS
    assert found["causal"].weakest.ci_low > 1.0


def test_what_was_planted_and_writes_nothing_is_followed_and_causes_nothing(tmp_path):
    loaded = planted_model(tmp_path / "model")
    run = record(loaded, problems(60), tmp_path / "run")
    studied(loaded, run, problems(16, seed=1), "exclude", "silence")
    found = verdicts(run, *STEPS)
    assert found["follows_steps"].verdict is HOLDS
    assert found["causal"].verdict is FAILS


def test_nothing_about_steps_holds_where_their_labels_are_shuffled(speaking, tmp_path):
    run = record(speaking, shuffled_labels(problems(60, leaning=LEANING)), tmp_path / "run")
    studied(speaking, run, shuffled_labels(problems(16, leaning=LEANING, seed=1)), "exclude")
    found = verdicts(run, *STEPS, *CONTEXT)
    for key in ("meaning", "follows_steps", "causal", "errors"):
        assert found[key].verdict is not HOLDS, key
    assert not [part for part in found["follows_steps"].parts if part.verdict is HOLDS]
