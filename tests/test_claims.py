import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from synthetic import synthetic_run
from typer.testing import CliRunner

from ling_probe.analysis import answers
from ling_probe.claims import COST, JUDGED, REROUTING, RULE, SOURCES, Claim, ClaimVerdict, Part, claims, counted, write_claims
from ling_probe.claims.studies import newcombe_interval
from ling_probe.cli import app
from ling_probe.errors import UsageError
from ling_probe.run.folder import CAUSAL_EFFECTS, REROUTED
from ling_probe.stats import wilson_interval

HOLDS, FAILS, CANNOT_TELL, NOT_TESTED = (
    ClaimVerdict.HOLDS, ClaimVerdict.FAILS, ClaimVerdict.CANNOT_TELL, ClaimVerdict.NOT_TESTED,
)  # fmt: skip
FIELDS = {
    "number", "key", "statement", "measure", "null", "verdict", "reason", "turns_on", "effect", "unit", "ci_low", "ci_high",
    "q", "n", "n_of", "rung", "rule", "would_change", "command", "parts",
}  # fmt: skip


def part(verdict, *, decides=True, rung=1, statement="It is so.", **numbers) -> Part:
    numbers = {"effect": 0.5, "unit": "bits", "ci_low": 0.4, "ci_high": 0.6} | numbers
    return Part(
        source="load_balance", statement=statement, verdict=verdict, reason="Because.", decides=decides, rung=rung, **numbers
    )


def claim(*parts, **fields) -> Claim:
    texts = dict.fromkeys(("key", "statement", "measure", "null", "would_change", "command"), "Text.")
    return Claim(number=1, parts=parts, **(texts | fields))


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ((HOLDS, HOLDS), HOLDS),
        ((HOLDS, FAILS), FAILS),
        ((HOLDS, CANNOT_TELL), CANNOT_TELL),
        ((CANNOT_TELL, NOT_TESTED), NOT_TESTED),
        ((NOT_TESTED, FAILS), FAILS),
        ((HOLDS, NOT_TESTED), NOT_TESTED),
    ],
)
def test_a_claim_is_as_good_as_the_weakest_part_that_decides(verdicts, expected):
    assert claim(*map(part, verdicts)).verdict is expected
    assert claim(*map(part, reversed(verdicts))).verdict is expected
    assert claim(*map(part, verdicts), part(FAILS, decides=False)).verdict is expected


def test_numbers_are_those_of_the_part_it_turns_on():
    found = claim(part(HOLDS, rung=4, effect=1.0), part(HOLDS, rung=1, effect=2.0), part(HOLDS, rung=1, effect=3.0))
    assert found.to_dict()["effect"] == 2.0
    assert found.to_dict()["rung"] == 1
    refuted = claim(part(HOLDS, rung=0), part(FAILS, rung=5, effect=9.0, statement="Nothing is lost."))
    assert refuted.to_dict()["effect"] == 9.0
    assert refuted.reason == "This does not hold: nothing is lost. Because."


def test_a_claim_that_no_part_decides_cannot_be_told():
    assert claim(part(HOLDS, decides=False)).verdict is CANNOT_TELL


def test_json_has_named_fields_and_no_number_that_is_not_one():
    told = claim(part(CANNOT_TELL, effect=np.float64(np.nan), ci_high=np.inf, n=np.int64(7), q=np.float32(0.5))).to_dict()
    assert set(told) == FIELDS
    again = json.loads(json.dumps(told, allow_nan=False))
    assert (again["effect"], again["ci_high"], again["n"], again["q"], again["verdict"]) == (None, None, 7, 0.5, "cannot tell")
    assert again["parts"][0]["decides"] is True
    assert counted([claim(part(HOLDS)), claim(part(FAILS))]) == {
        "holds": 1, "cannot tell": 0, "not tested": 0, "does not hold": 1,
    }  # fmt: skip


# What each claim says of tables made by hand.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("claims") / "run", 9)


def verdict(run, key, answers):
    (found,) = (each for each in claims(run, answers) if each.key == key)
    return found


def rerouted(**rises) -> pd.DataFrame:
    """Losses of 1 nat under the model's own router, and rises with their bounds by condition."""
    rows = [{"condition": "true", "loss": 1.0, "loss_increase": 0.0, "increase_low": 0.0, "increase_high": 0.0}]
    for name, (rise, low, high) in rises.items():
        rows.append(
            {
                "condition": name, "loss": 1 + rise, "loss_increase": rise, "increase_low": low, "increase_high": high,
            }
        )  # fmt: skip
    return pd.DataFrame(rows).assign(family="all", problems=50)


@pytest.mark.parametrize(
    ("rise", "expected"),
    [
        ((0.3, 0.2, 0.4), HOLDS),
        ((0.0, -0.001, 0.001), HOLDS),
        ((-0.3, -0.4, -0.2), FAILS),
        ((0.0, -0.1, 0.1), CANNOT_TELL),
    ],
)
def test_groups_cost_something_only_where_the_loss_falls_without_them(run, rise, expected):
    assert verdict(run, "groups_cost_nothing", {REROUTING: rerouted(**{"no-groups": rise})}).verdict is expected


@pytest.mark.parametrize(
    ("rise", "rank", "expected"),
    [
        ((0.0, -0.001, 0.001), (-0.9, -1.0, -0.8), HOLDS),
        ((0.3, 0.2, 0.4), (-0.9, -1.0, -0.8), FAILS),
        ((-0.3, -0.4, -0.2), (-0.9, -1.0, -0.8), FAILS),
        ((0.0, -0.001, 0.001), (0.9, 0.8, 1.0), FAILS),
        ((0.0, -0.1, 0.1), (-0.9, -1.0, -0.8), CANNOT_TELL),
    ],
)
def test_the_bias_is_for_balance_where_the_loss_is_the_same_and_it_lifts_what_is_not_liked(run, rise, rank, expected):
    value, low, high = rank
    reasons = pd.DataFrame(
        {
            "layer": [1], "expert": 0, "by_bias": 0.5, "count": 9, "rank_correlation": value, "rank_low": low,
            "rank_high": high,
        }
    )  # fmt: skip
    given = {REROUTING: rerouted(**{"no-bias": rise}), "expert_reasons": reasons}
    assert verdict(run, "bias_for_balance", given).verdict is expected


@pytest.mark.parametrize(
    ("last", "expected"),
    [((0.1, 0.05, 0.2), HOLDS), ((0.0, -0.001, 0.001), FAILS), ((0.0, -0.1, 0.1), CANNOT_TELL)],
)
def test_every_activation_helps_only_if_the_least_does(run, last, expected):
    losses = rerouted(**{"without rank 1": (0.9, 0.8, 1.0), "without rank 2": last, "k=3": (0.0, -0.001, 0.001)})
    found = verdict(run, "every_activation", {REROUTING: losses})
    assert found.verdict is expected
    assert found.parts[1].verdict is HOLDS
    assert "1: +0.9, 2: " in found.parts[0].reason


def loads(spec, top: float) -> pd.DataFrame:
    """Loads with intervals of no width, one layer's busiest experts carrying so many times their even share."""
    share = np.full((spec.n_rows, spec.n_experts), 1 / spec.n_experts)
    share[0, : spec.top_k] *= top
    share[0, spec.top_k :] = (1 - share[0, : spec.top_k].sum()) / (spec.n_experts - spec.top_k)
    table = pd.DataFrame({"load": share.ravel(), "count": (share * 1000 * spec.top_k).ravel().round().astype(int)})
    return table.assign(
        layer=np.repeat(spec.routed_layers, spec.n_experts), ci_low=table["load"], ci_high=table["load"]
    )  # fmt: skip


def balance(spec, ginis, *, dead=0, tokens=1000) -> pd.DataFrame:
    return pd.DataFrame({"layer": spec.routed_layers, "gini": ginis}).assign(
        family="all", tokens=tokens, sequences=9, entropy=0.9, gini_floor=0.05, ci_low=np.array(ginis) - 0.01,
        ci_high=np.array(ginis) + 0.01, max_vio=1.0, max_vio_floor=0.1, cv=ginis, dead=dead, rare=dead,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("top", "dead", "tokens", "expected"),
    [(1.5, 0, 1000, HOLDS), (2.5, 0, 1000, FAILS), (1.5, 3, 1000, FAILS), (1.5, 3, 10, CANNOT_TELL)],
)
def test_few_experts_are_too_few_where_they_carry_twice_their_share_or_others_are_dead(run, top, dead, tokens, expected):
    ginis = np.linspace(0.1, 0.2, run.spec.n_rows)
    given = {"expert_load": loads(run.spec, top), "load_balance": balance(run.spec, ginis, dead=dead, tokens=tokens)}
    found = verdict(run, "no_few_experts", given)
    assert found.verdict is expected
    assert found.parts[0].effect == pytest.approx(top)


def test_shallow_layers_are_less_even_by_the_difference_of_halves(run):
    up = np.linspace(0.1, 0.4, run.spec.n_rows)
    for ginis, expected in ((up[::-1], HOLDS), (up, FAILS), (np.full(run.spec.n_rows, 0.2), CANNOT_TELL)):
        found = verdict(run, "shallow_less_even", {"load_balance": balance(run.spec, ginis)})
        assert found.verdict is expected
    half = run.spec.n_rows // 2
    assert verdict(run, "shallow_less_even", {"load_balance": balance(run.spec, up)}).parts[0].effect == pytest.approx(
        up[:half].mean() - up[-half:].mean()
    )


def test_a_token_that_ran_another_number_of_experts_refutes_fixed_compute(run):
    table = answers_of(run, "expert_load")["expert_load"]
    assert verdict(run, "fixed_compute", {"expert_load": table}).verdict is HOLDS
    table.loc[0, "count"] += 1
    assert verdict(run, "fixed_compute", {"expert_load": table}).verdict is FAILS


def answers_of(run, *names):
    return dict(answers(run, names))


def test_doubling_the_experts_costs_the_routers_rows(run):
    spec = run.spec
    rows = 2 * spec.d_model * spec.n_experts * spec.n_rows
    for extra, expected in ((rows, HOLDS), (rows + 1, FAILS)):
        cost = pd.DataFrame(
            {"experts": [spec.n_experts, 2 * spec.n_experts], "parameters": [100, 190], "flops": [10**6, 10**6 + extra]}
        )
        assert verdict(run, "fixed_compute", {COST: cost}).parts[1].verdict is expected


def decoding(entropy: float, text: float, gain: float) -> pd.DataFrame:
    names = ["position", "tokens", "routing", "tokens and position", "tokens, position and routing"]
    return pd.DataFrame({"features": names, "bits": [0.1, text, 0.2, text, text + gain]}).assign(
        about="label", entropy=entropy, accuracy=0.5, chance=0.2, gain=gain, gain_low=gain - 0.01, gain_high=gain + 0.01,
        steps=300, sequences=90,
    )  # fmt: skip


def test_a_decoder_decides_only_where_words_leave_something_to_tell(run):
    def last(**options):
        return verdict(run, "follows_steps", {"label_decoding": decoding(**options)}).parts[-1]

    assert (last(entropy=2.0, text=1.0, gain=0.3).verdict, last(entropy=2.0, text=1.0, gain=0.3).decides) == (HOLDS, True)
    assert (last(entropy=2.0, text=1.0, gain=0.0).verdict, last(entropy=2.0, text=1.0, gain=0.0).decides) == (FAILS, True)
    silent = last(entropy=2.0, text=1.99, gain=0.0)
    assert (silent.verdict, silent.decides) == (CANNOT_TELL, False)
    assert silent.reason.startswith("Words and place leave 0.01 bits")


def information(bits, low, high, p=0.005) -> pd.DataFrame:
    given = ["nothing", "token", "token and position", "token and the one before"]
    rows = [{"about": "label", "given": name, "bits": bits, "ci_low": low, "ci_high": high, "p": p} for name in given]
    rows += [{"about": name, "bits": 0.5} for name in ("token", "previous token", "position", "sequence")]
    return pd.DataFrame(rows).assign(layer=pd.NA, q=p, compared=0.8, tokens=1000, sequences=90)


@pytest.mark.parametrize(
    ("row", "expected"),
    [((0.1, 0.05, 0.2), HOLDS), ((0.1, 0.005, 0.2), HOLDS), ((0.002, 0.001, 0.003), FAILS), ((0.1, -0.1, 0.3), CANNOT_TELL)],
)
def test_what_is_sure_and_next_to_nothing_does_not_hold(run, row, expected):
    found = {each.key: each for each in claims(run, {"routing_information": information(*row)})}
    assert found["follows_steps"].parts[2].verdict is expected
    assert found["meaning"].parts[2].verdict is expected
    families = information(*row).replace({"about": {"label": "family"}})
    found = {each.key: each for each in claims(run, {"routing_information": families})}
    assert found["follows_steps"].parts[2].reason == "Not tested: the run has no labels of steps."
    assert found["meaning"].parts[2].verdict is expected


def preferences(low, high, *, replicated=True) -> pd.DataFrame:
    """One cell, surely found on the whole run."""
    both = {"log2_ratio": (low + high) / 2, "ci_low": 0.1, "ci_high": 3.0, "q": 0.01}
    halves = {f"{half}_{name}": value for half in ("picked", "held_out") for name, value in
              {"log2_ratio": (low + high) / 2, "low": low, "high": high, "q": 0.01}.items()}  # fmt: skip
    return pd.DataFrame([{"layer": 1, "expert": 0, "label": "add", "p": 0.001, "raw_log2_ratio": 1.0} | both | halves]).assign(
        replicated=replicated
    )


@pytest.mark.parametrize(
    ("low", "high", "replicated", "expected"),
    [
        (0.7, 1.5, True, HOLDS),
        (-1.5, -0.7, True, HOLDS),
        (0.1, 0.4, True, FAILS),
        (0.1, 1.5, True, CANNOT_TELL),
        (0.7, 1.5, False, CANNOT_TELL),
    ],
)
def test_a_preference_must_be_worth_having_where_it_was_not_picked(run, low, high, replicated, expected):
    table = preferences(low, high, replicated=replicated)
    assert verdict(run, "follows_steps", {"label_specialisation": table}).parts[0].verdict is expected
    untested = verdict(run, "follows_steps", {"label_specialisation": table.assign(p=np.nan)}).parts[0]
    assert untested.verdict is NOT_TESTED


def effects(excess, low, high, q) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": ["add"], "kind": "exclude", "dose": 4.0, "measure": "selectivity", "excess": excess, "excess_low": low,
            "excess_high": high, "q": q, "problems": 40,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((0.3, 0.2, 0.4, 0.01), HOLDS),
        ((0.3, 0.2, 0.4, 0.2), CANNOT_TELL),
        ((0.002, 0.001, 0.003, 0.01), FAILS),
        ((0.1, -0.2, 0.4, 0.01), CANNOT_TELL),
    ],
)
def test_a_cause_that_is_sure_and_next_to_nothing_is_none(run, row, expected):
    assert verdict(run, "causal", {"causal_effects": effects(*row)}).verdict is expected


def test_newcombe_is_as_published():
    """Newcombe 1998, table II, method 10, example (a): 56/70 and 48/80."""
    one, other = (np.array([hits / n, *wilson_interval(hits, n)]) for hits, n in ((48, 80), (56, 70)))
    assert newcombe_interval(one, other) == pytest.approx((0.0524, 0.3339), abs=1e-4)


# Studies that are kept in files.


def adapted(folder, run, *, tuned="router", digest=None, right=(40, 80), other=(90, 90)):
    folder.mkdir()
    told = {"tuned": tuned, "digest": digest or run.manifest.model["digest"]}
    (folder / "adaptation.json").write_text(json.dumps(told), encoding="utf-8")
    rows = []
    for when, *hits in zip(("before", "after"), right, other, strict=True):
        for task, n in zip(("longer", "test"), hits, strict=True):
            low, high = wilson_interval(n, 100)
            rows.append(
                {
                    "when": when, "task": task, "problems": 100, "correct": n, "share": n / 100, "ci_low": low, "ci_high": high,
                }
            )  # fmt: skip
    (folder / JUDGED).write_text(json.dumps(rows), encoding="utf-8")
    return folder


def test_an_adaptation_is_judged_by_its_own_task_and_shown_beside_others(run, tmp_path):
    for number, (options, expected, others) in enumerate(
        [
            ({}, HOLDS, CANNOT_TELL),
            ({"right": (40, 40)}, CANNOT_TELL, CANNOT_TELL),
            ({"right": (80, 40)}, FAILS, CANNOT_TELL),
            ({"other": (90, 50)}, HOLDS, FAILS),
            ({"tuned": "all"}, NOT_TESTED, CANNOT_TELL),
            ({"digest": "another"}, NOT_TESTED, NOT_TESTED),
        ]
    ):
        folder = adapted(tmp_path / str(number), run, **options)
        found = claims(run, {}, adapted=folder)[-1]
        assert (found.verdict, found.parts[1].verdict) == (expected, others), options


def test_every_refusal_says_what_to_do(run, tmp_path):
    told = {each.key: each for each in claims(run, {name: UsageError("no such thing; make one") for name in SOURCES})}
    assert {each.verdict for each in told.values()} == {NOT_TESTED}
    assert told["errors"].reason == "Not tested: no such thing; make one."
    assert "ling-probe claims RUN --causal" in told["every_activation"].reason
    assert "ling-probe adapt MODEL --out FOLDER" in told["router_alone"].reason
    assert all(each.reason.startswith("Not tested: load_balance was not asked for") for each in claims(run, {})[2:3])
    broken = adapted(tmp_path / "broken", run)
    for text, message in (("{", "is not JSON"), ("[]", "does not hold rows"), ('[{"a": 1}]', "does not hold rows")):
        (broken / JUDGED).write_text(text, encoding="utf-8")
        assert message in claims(run, {}, adapted=broken)[-1].reason
    (broken / JUDGED).unlink()
    assert f"holds no {JUDGED}" in claims(run, {}, adapted=broken)[-1].reason


def test_losses_of_another_model_count_for_nothing(tmp_path):
    run = synthetic_run(tmp_path / "run", 6)
    path = run.folder / REROUTED
    path.parent.mkdir()
    losses = rerouted(**{"no-groups": (0.0, -0.001, 0.001)})
    for digest, expected in ((run.manifest.model["digest"], HOLDS), ("another", NOT_TESTED)):
        losses.assign(digest=digest).to_parquet(path)
        assert verdict(run, "groups_cost_nothing", {}).verdict is expected
    effects(0.3, 0.2, 0.4, 0.01).to_parquet(run.folder / CAUSAL_EFFECTS)
    assert verdict(run, "causal", answers_of(run, "causal_effects")).verdict is HOLDS


# The pages.


def test_pages_show_a_strangers_text_as_text(tmp_path):
    text = "<script>alert(1)</script>|`x`$y$[a](b)"
    found = [claim(part(HOLDS, statement=text, unit=text), key="a-b", statement=text, would_change=text, command="ling-probe")]
    page = write_claims(found, tmp_path / "out", model=text, text=text).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    notes = (tmp_path / "out" / "claims.md").read_text(encoding="utf-8")
    assert "<script>" not in notes
    assert "\\|\\`x\\`\\$y\\$\\[a\\](b)" in notes
    told = json.loads((tmp_path / "out" / "claims.json").read_text(encoding="utf-8"))
    assert told["model"] == text
    assert told["claims"][0]["statement"] == text
    assert RULE in page


def test_a_page_is_not_written_over_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        write_claims([claim(part(HOLDS))], tmp_path / "out", model="m", text="t")


def test_a_hostile_run_has_harmless_claims(tmp_path):
    from hostile import hostile_run

    run = hostile_run(tmp_path / "run")
    found = claims(run, answers_of(run, "load_balance", "expert_load", "label_specialisation", "token_overlap"))
    page = write_claims(found, tmp_path / "out", model=run.spec.name, text="<img src=x>").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "<b>" not in page
    assert "document.title='owned'</script>" not in page


# The command.


def invoked(*words):
    return CliRunner().invoke(app, ["claims", *map(str, words)])


@pytest.fixture(scope="module")
def told(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("told") / "out"
    done = invoked(run.folder, "--workers", 1, "--json", "--out", folder)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()], folder


def test_the_command_prints_a_row_a_claim_and_writes_the_same(told):
    rows, folder = told
    assert [row["number"] for row in rows] == list(range(1, 12))
    assert all(set(row) == FIELDS for row in rows)
    assert json.loads((folder / "claims.json").read_text(encoding="utf-8"))["claims"] == rows
    assert {path.name for path in folder.iterdir()} == {"claims.html", "claims.md", "claims.json"}
    assert {row["key"]: row["verdict"] for row in rows}["fixed_compute"] == "holds"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--split", "test"), "add --causal"),
        (("--adapted", "nowhere"), "nowhere is no folder"),
        (("--causal",), "captured from synthetic; name its file"),
    ],
)
def test_what_makes_no_sense_is_refused(run, words, message):
    done = invoked(run.folder, *words)
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)


def test_reading_claims_needs_no_torch(run):
    script = (
        "import sys\nfrom ling_probe.run import Run\nfrom ling_probe.claims import claims\n"
        "assert len(claims(Run.open(sys.argv[1]), {})) == 11\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, run.folder], capture_output=True, text=True, check=True, env=environment
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_what_strangers_wrote_is_told_without_acting(tmp_path):
    part = Part(source="s", statement="a\x1b[2J\u202e<script>|", verdict=ClaimVerdict.HOLDS, reason="x" * 9_000)
    claim = Claim(number=1, key="k", statement="s", measure="m", null="n", would_change="w", command="c", parts=(part,))
    write_claims([claim], tmp_path / "out", model="\x1b]0;m\x07", text="<b>")
    for name in ("claims.html", "claims.md", "claims.json"):
        told = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "\x1b" not in told
        assert "\u202e" not in told
        assert "‹202E›" in told
        assert "x" * 5_000 not in told
    assert "<script>" not in (tmp_path / "out" / "claims.html").read_text(encoding="utf-8")
