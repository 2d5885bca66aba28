import json

import numpy as np
import pytest
from synthetic import synthetic_spec

from ling_probe.errors import ConfigError, UsageError
from ling_probe.spec import ModelSpec


def test_rows_and_layers_convert_through_the_spec_only():
    spec = synthetic_spec(n_layers=6, routed_layers=(2, 3, 5))
    assert [spec.row(layer) for layer in spec.routed_layers] == [0, 1, 2]
    assert (spec.n_rows, spec.group_size) == (3, 4)
    with pytest.raises(UsageError, match=r"layer 4 of synthetic has no router; these do: 2, 3, 5"):
        spec.row(4)


def test_consecutive_layers_are_named_as_a_range():
    with pytest.raises(UsageError, match=r"these do: 1-3$"):
        synthetic_spec().row(0)


def test_a_spec_survives_json():
    spec = synthetic_spec(scale=2.5)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(("n_experts", "dtype"), [(256, np.uint8), (260, np.uint16)])
def test_ids_take_the_smallest_type_that_holds_them(n_experts, dtype):
    assert synthetic_spec(n_experts=n_experts).id_dtype is dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_groups": 3}, "n_group 3 does not divide 16 experts"),
        ({"n_groups": 0}, "n_group 0 does not divide 16 experts"),
        ({"topk_groups": 5}, "topk_group 5 is not between 1 and n_group 4"),
        ({"top_k": 9}, "top-k 9 does not fit the 8 experts of 2 groups"),
        ({"top_k": 0}, "top-k 0 does not fit"),
        ({"n_groups": 16, "topk_groups": 8}, "groups of 1 expert"),
        ({"routed_layers": (3, 4)}, "routed layers 3-4 lie outside 0-3"),
    ],
)
def test_impossible_geometry_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        synthetic_spec(**changes)
