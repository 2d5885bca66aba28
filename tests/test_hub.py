import sys
from types import ModuleType

import pytest
from records import RECORDS

from ling_probe.benchmarks import read_benchmark
from ling_probe.errors import BenchmarkError, UsageError


def put(monkeypatch, name, **functions):
    module = ModuleType(name)
    for function, value in functions.items():
        setattr(module, function, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hugging Face package; it remembers how it was asked."""
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        if split == "dev":
            raise ValueError("Unknown split\nwith a long story")
        return iter([RECORDS["gsm8k"], RECORDS["gsm8k"] | {"when": asked.__class__}])

    put(monkeypatch, "datasets", load_dataset=load_dataset)
    return asked


def test_a_dataset_of_the_hub_is_read_like_a_file(hub):
    found = read_benchmark("hf:someone/sums:main:train")
    assert (found.name, found.split, found.format, len(found.records)) == ("someone/sums", "train", "gsm8k", 2)
    assert found.records[0].id == "sums-0001"
    assert found.records[1].meta == {"when": "<class 'list'>"}
    read_benchmark("hf:someone/sums")
    read_benchmark("hf:someone/sums:main", split="other")
    assert hub == [("someone/sums", "main", "train"), ("someone/sums", None, "test"), ("someone/sums", "main", "other")]
    assert read_benchmark("hf:someone/sums").digest == found.digest


def test_what_the_hub_refuses_is_one_line(hub):
    with pytest.raises(BenchmarkError, match=r"^hf:a/b \(split dev\) cannot be read from the hub: Unknown split$"):
        read_benchmark("hf:a/b", split="dev")
    for name in ("hf:", "hf::main", "hf:a/b:c:d:e"):
        with pytest.raises(UsageError, match="hf:OWNER/DATASET is expected"):
            read_benchmark(name)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BenchmarkError, match=r"Hugging Face datasets is not installed.*ling-probe\[hub\]"):
        read_benchmark("hf:a/b")
    put(monkeypatch, "datasets")
    with pytest.raises(BenchmarkError, match="Hugging Face datasets is not installed"):
        read_benchmark("hf:a/b")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(BenchmarkError, match=r"reasoning-gym is not installed.*ling-probe\[gym\]"):
        read_benchmark("gym:chain_sum")


@pytest.fixture
def gym(monkeypatch):
    def create_dataset(name, *, size, seed):
        if name != "chain_sum":
            raise ValueError(f"Dataset '{name}' not registered")
        problem = {"question": f"{seed}+1?", "answer": str(seed + 1), "metadata": {"source_dataset": name}}
        return [problem | {"question": f"{seed}+{place}?"} for place in range(size)]

    put(monkeypatch, "reasoning_gym", create_dataset=create_dataset)


def test_a_task_of_the_gym_is_made_with_size_and_seed(gym):
    found = read_benchmark("gym:chain_sum:size=3:seed=7")
    assert (found.name, found.format, len(found.records)) == ("chain_sum", "reasoning-gym", 3)
    assert [(each.id, each.prompt, each.answer, each.family) for each in found.records[:1]] == [
        ("chain_sum-7-0001", "7+0?\n", "8", "chain_sum")
    ]
    assert len(read_benchmark("gym:chain_sum").records) == 100
    assert read_benchmark("gym:chain_sum:seed=1").digest != read_benchmark("gym:chain_sum:seed=2").digest


def test_what_the_gym_refuses_is_one_line(gym):
    with pytest.raises(BenchmarkError, match="gym:magic cannot be made by reasoning-gym: Dataset 'magic' not registered"):
        read_benchmark("gym:magic")
    for name in ("gym:chain_sum:level=3", "gym:chain_sum:size=-1", "gym:chain_sum:7"):
        with pytest.raises(UsageError, match="size=N and seed=N can follow the task"):
            read_benchmark(name)
