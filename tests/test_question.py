import doctest

import numpy as np
import pandas as pd
import pytest

from ling_probe.analysis import ANALYSES, Verdict, answers, finding, findings_index, question
from ling_probe.analysis.question import judge, judge_cells
from ling_probe.charts import FIGURES
from ling_probe.errors import UsageError


def cells(low, high, q) -> pd.DataFrame:
    return pd.DataFrame({"ci_low": low, "ci_high": high, "q": q})


def test_doctests_hold():
    assert doctest.testmod(question).failed == 0


@pytest.mark.parametrize(
    ("low", "high", "q", "expected"),
    [
        (0.2, 0.9, 0.01, Verdict.SUPPORTED),
        (-0.9, -0.2, 0.01, Verdict.SUPPORTED),
        (0.2, 0.9, 0.06, Verdict.CANNOT_TELL),
        (0.1, 0.4, 0.06, Verdict.NOT_SUPPORTED),
        (-0.6, 0.4, 0.5, Verdict.CANNOT_TELL),
        (-0.1, 0.3, 0.01, Verdict.NOT_SUPPORTED),
        (np.nan, np.nan, 0.01, Verdict.CANNOT_TELL),
    ],
)
def test_a_verdict_needs_an_effect_or_the_absence_of_one(low, high, q, expected):
    assert judge(low, high, q=q, least=0.5) is expected


def test_many_cells_are_refused_only_where_nearly_all_intervals_are_small():
    small, wide = ([-0.1] * 95, [0.1] * 95), ([-0.9] * 5, [0.1] * 5)
    low, high = (one + other for one, other in zip(small, wide, strict=True))
    assert judge_cells(cells(low, high, 0.5), least=0.5) is Verdict.NOT_SUPPORTED
    assert judge_cells(cells([*low, -0.9], [*high, 0.1], 0.5), least=0.5) is Verdict.CANNOT_TELL
    assert judge_cells(cells(low, high, [0.01] + [0.5] * 99), least=0.5) is Verdict.SUPPORTED
    assert judge_cells(cells([-0.1], [0.1], np.nan), least=0.5) is Verdict.CANNOT_TELL


def test_every_analysis_makes_a_statement_and_has_a_figure():
    assert set(FIGURES) == set(ANALYSES)
    for name, analysis in ANALYSES.items():
        assert analysis.name == name
        assert analysis.question.endswith("?")
        assert analysis.claim.endswith(".")
        assert analysis.method.endswith(".")


def test_a_run_that_cannot_answer_says_why_in_the_index(make_run):
    run = make_run(9, labels={"": ("add",)})
    found = {name: finding(name, answer) for name, answer in answers(run, ["family_specialisation", "load_balance"])}
    index = findings_index(found).set_index("analysis")
    assert index["verdict"].tolist() == [Verdict.NOT_APPLICABLE.value, index.loc["load_balance", "verdict"]]
    assert index.loc["family_specialisation", "finding"].startswith("Not applicable: one family only")
    assert pd.isna(index.loc["family_specialisation", "rung"])
    assert index.loc["load_balance", "effect"] > 0


def test_an_analysis_that_is_not_there_is_refused(make_run):
    with pytest.raises(UsageError, match='no analysis "vibes"'):
        next(answers(make_run(), ["vibes"]))
