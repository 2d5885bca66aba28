"""A random Ling on text in the fields of public benchmarks, every record made up here: no claim about steps holds.

Its attention, random as it is, mixes the context into what routers read, so a little of the context is really there.
"""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from small_model import SIZES
from transformers import AutoTokenizer

from ling_probe.analysis import answers
from ling_probe.benchmarks import read_benchmark
from ling_probe.claims import SOURCES, ClaimVerdict, claims
from ling_probe.model import LingConfig, LingForCausalLM
from ling_probe.model.load import LoadedLing, verify_routing
from ling_probe.model.modeling import gates
from ling_probe.recording import record
from ling_probe.tokenizer import build_tokenizer

NAMES, THINGS = ("Ada", "Ben", "Cleo", "Dov"), ("pears", "beads", "cards", "shells")
KINDS = ("brimpus", "gorpus", "lorpus", "sterpus", "yimpus")
STEPS = {"+": "{name} then finds {b} more {thing}", "-": "{name} gives {b} {thing} away", "*": "every day {b} times as many"}


def gsm8k(rng):
    """One step a line, with its calculation."""
    name, thing, amount, lines = rng.choice(NAMES), rng.choice(THINGS), int(rng.integers(20, 60)), []
    for sign in rng.choice(list(STEPS), 4):
        b = int(rng.integers(2, 9))
        result = {"+": amount + b, "-": amount - b, "*": amount * b}[sign]
        lines.append(f"{STEPS[sign].format(name=name, b=b, thing=thing)}: <<{amount}{sign}{b}={result}>>{result}")
        amount = result
    return {"question": f"{name} has some {thing}. How many in the end?", "answer": "\n".join([*lines, f"#### {amount}"])}


def prontoqa(rng):
    """A chain of facts and rules."""
    name, kinds, chain = rng.choice(NAMES), rng.permutation(KINDS), []
    for one, other in pairwise(kinds):
        chain += [f"{name} is a {one}.", f"Each {one} is a {other}."]
    context = " ".join(rng.permutation([line for line in chain if line.startswith("Each")]))
    return {
        "id": f"made-{rng.integers(10**9)}", "context": f"{context} {name} is a {kinds[0]}.",
        "question": f"Is the following statement true or false? {name} is a {kinds[-1]}.",
        "options": ["A) True", "B) False"], "answer": "A", "explanation": [*chain, f"{name} is a {kinds[-1]}."],
    }  # fmt: skip


def processbench(rng):
    """Steps of a model, and the first wrong one."""
    steps = [f"We take {a} and {b}, which makes {a + b}." for a, b in rng.integers(2, 90, (4, 2))]
    label = int(rng.integers(-1, 4))
    return {
        "id": f"gsm8k-{rng.integers(10**9)}", "generator": "nobody", "problem": "How much is it in the end?",
        "steps": [*steps, "So it is \\boxed{7}."], "label": label, "final_answer_correct": label == -1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def random_ling(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    torch.manual_seed(1)
    end = tokenizer.eos_token_id
    native = LingForCausalLM(LingConfig(vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=end, **SIZES)).eval()
    for gate in gates(native).values():
        gate.expert_bias.normal_(0, 0.1)
    spec = native.config.spec("random")
    return LoadedLing(native, tokenizer, spec, "0" * 64, verify_routing(native, spec))


@pytest.mark.parametrize("make", [gsm8k, prontoqa, processbench], ids=lambda make: make.__name__)
def test_no_claim_about_steps_holds(random_ling, tmp_path, make):
    rng = np.random.default_rng(0)
    file = tmp_path / f"{make.__name__}.jsonl"
    file.write_text("".join(json.dumps(make(rng)) + "\n" for _ in range(60)), encoding="utf-8")
    problems = read_benchmark(str(file))
    assert problems.format == make.__name__
    run = record(random_ling, problems, tmp_path / "run", keep=("experts", "loss", "logits"))
    assert len(run.steps) >= 240
    found = {claim.key: claim for claim in claims(run, dict(answers(run, SOURCES)))}
    assert found["fixed_compute"].verdict is ClaimVerdict.HOLDS
    for key in ("meaning", "follows_steps", "errors", "causal", "bias_for_balance"):
        assert found[key].verdict is not ClaimVerdict.HOLDS, (key, found[key].reason)
    for part in found["follows_steps"].parts:
        assert part.verdict is not ClaimVerdict.HOLDS, part.reason
