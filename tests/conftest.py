import os
from itertools import count

import pytest
from jaxtyping import install_import_hook

# Before torch starts: the official outputs were recorded without matrix tiles (AMX), which round bfloat16 products otherwise.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# Before anything imports it: shapes of the yardstick are checked wherever a test uses it.
install_import_hook("ling_probe.routing", "beartype.beartype")

from synthetic import synthetic_run  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The tokenizer of ling-tiny."""
    from transformers import AutoTokenizer

    from ling_probe.tokenizer import build_tokenizer

    return AutoTokenizer.from_pretrained(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def small_ling(tokenizer):
    """A random model for tests that leave it as it is."""
    from small_model import random_ling

    return random_ling(tokenizer)


@pytest.fixture
def make_run(tmp_path):
    """Make a synthetic run in a fresh folder; arguments as for `synthetic_run`."""
    numbers = count()

    def make(n_sequences=9, **options):
        return synthetic_run(tmp_path / f"run-{next(numbers)}", n_sequences, **options)

    return make
