"""Completions by the model: what is drawn, when it ends, and that decoding routes as the recorded pass does."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ling_probe.benchmarks import Record, read_benchmark
from ling_probe.capture import Decoding, capture
from ling_probe.capture.generation import sample
from ling_probe.cli import app
from ling_probe.errors import InterventionError, RunError, UsageError
from ling_probe.interventions import exclude
from ling_probe.model.load import load_native
from ling_probe.recording import record
from ling_probe.run import Run

DRAWN = {"max_new_tokens": 20, "temperature": 2.5, "top_p": 0.99, "seed": 5}


@pytest.fixture(scope="module")
def loaded():
    return load_native("ling-tiny")


@pytest.fixture(scope="module")
def records():
    """Prompts of unequal length."""
    chosen = read_benchmark("stepbench", limit=8).records
    assert len({len(each.prompt) for each in chosen}) > 5
    return chosen


def completions(loaded, records, **options):
    return [trace.completion for trace in capture(loaded, records, **options)]


class Watch:
    """Ids that every gate gives in every decoding call, by sequence and position."""

    def __init__(self, loaded) -> None:
        self.loaded, self.calls, self.seen = loaded, [], {layer: [] for layer in loaded.gates()}

    def __enter__(self):
        def note(_module, _args, kwargs):
            self.calls.append({name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids")})

        self.hooks = [self.loaded.native.register_forward_pre_hook(note, with_kwargs=True)]
        for layer, gate in self.loaded.gates().items():
            self.hooks.append(gate.register_forward_hook(lambda _g, _a, out, layer=layer: self.seen[layer].append(out[2])))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize(
    "options", [DRAWN | {"max_new_tokens": 36, "temperature": 1.2}, {"max_new_tokens": 30}], ids=["drawn", "greedy"]
)
def test_decoding_with_the_cache_chooses_what_the_recorded_pass_chooses(loaded, records, options):
    """Float32, one batch of unequal prompts: every layer, every position of prompt and completion but the last, never fed."""
    with Watch(loaded) as watch:
        traces = list(capture(loaded, records, batch_tokens=10_000, **options))
    order = sorted(range(len(records)), key=lambda i: len(loaded.tokenizer(records[i].prompt)["input_ids"]))
    traces = [traces[i] for i in order]
    prompts = [len(loaded.tokenizer(records[i].prompt)["input_ids"]) for i in order]
    width, compared = max(prompts), 0
    for step, call in enumerate(watch.calls):
        alive = [row for row, trace in enumerate(traces) if trace.n_tokens - prompts[row] > step]
        assert len(call["input_ids"]) == len(alive)
        columns = call["input_ids"].shape[1]
        assert columns == (1 if step else width)
        for place, row in enumerate(alive):
            first = 0 if step == 0 else prompts[row] + step - 1
            fed = call["input_ids"][place, -(prompts[row] if step == 0 else 1) :]
            assert fed.tolist() == traces[row].token_ids[first : first + len(fed)].tolist()
            assert call["position_ids"][place, -1] == first + len(fed) - 1
            assert call["attention_mask"][place].sum() == first + len(fed)
            for layer in loaded.spec.routed_layers:
                ids = watch.seen[layer][step].view(len(alive), columns, -1)[place, -len(fed) :].numpy()
                expected = traces[row].expert_ids[first : first + len(fed), loaded.spec.row(layer)]
                np.testing.assert_array_equal(ids, expected)
                compared += len(ids)
    assert compared == sum(trace.n_tokens - 1 for trace in traces) * loaded.spec.n_rows
    assert len(watch.calls[-1]["input_ids"]) < len(records)


def test_greedy_completions_are_those_of_the_librarys_own_generation(loaded, records):
    end = loaded.tokenizer.eos_token_id
    for each, trace in zip(records[:4], capture(loaded, records[:4], max_new_tokens=25), strict=True):
        prompt = loaded.tokenizer(each.prompt)["input_ids"]
        made = loaded.native.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=25,
            do_sample=False, eos_token_id=end, pad_token_id=0,
        )  # fmt: skip
        assert trace.token_ids.tolist() == made[0].tolist()


def test_a_draw_does_not_depend_on_the_batch_or_on_other_records(loaded, records):
    together = completions(loaded, records, **DRAWN)
    assert completions(loaded, records, batch_tokens=1, **DRAWN) == together
    assert completions(loaded, records[::-1], **DRAWN) == together[::-1]
    assert completions(loaded, records[3:4], **DRAWN) == together[3:4]


def test_the_seed_and_the_temperature_change_the_draw(loaded, records):
    drawn = completions(loaded, records, **DRAWN)
    greedy = completions(loaded, records, max_new_tokens=20)
    assert completions(loaded, records, **(DRAWN | {"seed": 6})) != drawn
    assert completions(loaded, records, **(DRAWN | {"temperature": 4.0})) != drawn
    assert drawn != greedy
    assert completions(loaded, records, **(DRAWN | {"top_p": 1e-9})) == greedy


def test_the_same_prompt_twice_is_drawn_twice(loaded, records):
    twins = [Record(id=f"twin-{i}", prompt=records[0].prompt) for i in range(6)]
    assert len(set(completions(loaded, twins, **(DRAWN | {"temperature": 2.0, "top_p": 1.0})))) > 1


def test_what_is_drawn_has_the_models_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])
    numbers = torch.from_numpy(np.random.default_rng(0).random(20_000))
    for temperature, top_p in [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)]:
        chosen = sample(logits.expand(len(numbers), -1), numbers, temperature=temperature, top_p=top_p)
        wanted = (logits[0].double() / temperature).softmax(-1).numpy()
        order = np.argsort(-wanted)
        kept = order[: int(np.searchsorted(wanted[order].cumsum(), top_p - 1e-12)) + 1]
        wanted = np.where(np.isin(np.arange(5), kept), wanted, 0) / wanted[kept].sum()
        found = np.bincount(chosen.numpy(), minlength=5) / len(numbers)
        np.testing.assert_allclose(found, wanted, atol=4 * np.sqrt(0.25 / len(numbers)))
        assert (found[wanted == 0] == 0).all()


def test_the_edges_of_a_draw_are_tokens_that_may_be_drawn():
    logits = torch.tensor([[0.0, float("-inf"), 3.0]])
    for number, token in [(0.0, 2), (1 - 1e-16, 0)]:
        drawn = sample(logits, torch.tensor([number], dtype=torch.float64), temperature=1.0, top_p=1.0)
        assert drawn.tolist() == [token]


def test_a_stop_text_ends_a_completion_with_the_token_that_completes_it(loaded, records):
    whole = completions(loaded, records, max_new_tokens=30)
    for stop in ("\n", "answer:"):
        stopped = list(capture(loaded, records, max_new_tokens=30, stop=("zzz", stop)))
        assert any(stop in text for text in whole)
        for text, trace in zip(whole, stopped, strict=True):
            assert text.startswith(trace.completion)
            if stop in text:
                assert stop in trace.completion
                assert stop not in trace.completion[: -len(trace.tokens[-1])]
            else:
                assert trace.completion == text


def test_interventions_hold_while_drawing(loaded, records):
    excluded = set(range(0, 32, 4))
    for trace in capture(loaded, records[:3], interventions=[exclude(1, excluded)], **DRAWN):
        assert not excluded & set(trace.expert_ids[:, 0].ravel().tolist())
    with pytest.raises(InterventionError, match="while generating it must act on all"):
        list(capture(loaded, records[:1], interventions=[exclude(1, [0], segments=("prompt",))], **DRAWN))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 5, "temperature": -1}, "temperature -1 makes no sense"),
        ({"max_new_tokens": 5, "temperature": float("nan")}, "temperature nan makes no sense"),
        ({"max_new_tokens": 5, "top_p": 0}, "top-p 0 is no share of probability"),
        ({"max_new_tokens": 5, "top_p": 1.5}, r"top-p 1\.5 is no share"),
        ({"max_new_tokens": 5, "stop": ("a", "")}, "an empty stop text"),
        ({"max_new_tokens": -1}, "at most -1 new tokens"),
        ({"temperature": 1.0}, "are for generating; give a number of new tokens too"),
        ({"stop": ("a",)}, "are for generating"),
    ],
)
def test_settings_that_make_no_sense_are_refused_and_nothing_is_created(loaded, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        Decoding(**settings)
    with pytest.raises(UsageError, match=message):
        record(loaded, read_benchmark("stepbench", limit=2), tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_the_manifest_has_the_settings_and_others_do_not_go_on_with_the_run(loaded, tmp_path):
    problems = read_benchmark("stepbench", limit=3)
    options = DRAWN | {"max_new_tokens": 8, "stop": ("\n",)}
    run = record(loaded, problems, tmp_path / "run", **options)
    assert run.manifest.seed == 5
    found = run.manifest.options
    assert {name: found[name] for name in options} == options | {"stop": ["\n"]}
    for change in ({"seed": 6}, {"temperature": 0.7}, {"top_p": 0.9}, {"stop": ("\n", "x")}, {"max_new_tokens": 9}):
        with pytest.raises(RunError, match="was captured with another options"):
            record(loaded, problems, tmp_path / "run", resume=True, **(options | change))
    assert record(loaded, problems, tmp_path / "run", resume=True, **options).is_complete


def test_greedy_runs_name_no_settings_they_do_not_use(loaded, tmp_path):
    run = record(loaded, read_benchmark("stepbench", limit=2), tmp_path / "run", max_new_tokens=4)
    assert set(run.manifest.options) == {"mode", "max_new_tokens", "keep", "batch_tokens", "parts", "steps", "step_rules"}


def test_the_command_line_draws_stops_and_keeps(tmp_path):
    command = ["capture", "ling-tiny", "stepbench", "--out", str(tmp_path / "run"), "--limit", "3", "--generate", "12"]
    command += ["--temperature", "0.8", "--top-p", "0.9", "--seed", "3", "--stop", "\n", "--keep", "residual"]
    assert CliRunner().invoke(app, command).exit_code == 0
    run = Run.open(tmp_path / "run")
    assert run.manifest.options["stop"] == ["\n"]
    assert run.manifest.options["temperature"] == 0.8
    assert all(text.count("\n") <= 1 for text in run.sequences["completion"])
    assert next(run.batches(columns=("residual",))).extra["residual"].shape[1] == run.spec.n_layers
    refused = CliRunner().invoke(app, ["capture", "nowhere", "stepbench", "--out", str(tmp_path / "x"), "--keep", "all"])
    assert isinstance(refused.exception, UsageError)
