"""Shards of a run: how records are cut, and what merging holds to and refuses."""

import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
from crashing import benchmark, contents, record
from hypothesis import given
from hypothesis import strategies as st
from test_cli import ling, refused

from ling_probe import recording
from ling_probe.analysis import kept_answers
from ling_probe.benchmarks import Record
from ling_probe.cluster import capture_with_ray
from ling_probe.errors import RunError, UsageError
from ling_probe.run import Run, Shard, cut, find_shards, merge


@pytest.fixture(autouse=True)
def _real_capture(monkeypatch):
    monkeypatch.setattr(recording, "capture", recording.capture)


def shards_of(folder, of=3, n_records=12, parts=1, **options):
    for index in range(1, of + 1):
        shard = Shard(index, of)
        record(folder / shard.folder, n_records, parts, shard=shard, **options)
    return find_shards(folder)


def edit(folder, **changes):
    said = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(said | changes))
    return said


@given(
    lengths=st.lists(st.integers(1, 400_000), min_size=1, max_size=30),
    least=st.integers(1, 12),
    new=st.sampled_from([0, 50, 9000]),
    batch_tokens=st.sampled_from([1, 8192, 100_000]),
)
def test_parts_are_consecutive_hold_every_record_once_and_are_as_many_as_asked(lengths, least, new, batch_tokens):
    records = [Record(id=f"{number}", prompt="p" * length) for number, length in enumerate(lengths)]
    options = {"max_new_tokens": new, "batch_tokens": batch_tokens, "least": least}
    if least > len(records):
        with pytest.raises(UsageError, match=f"{len(records)} records cannot be cut into {least} parts"):
            cut(records, **options)
        return
    parts = cut(records, **options)
    assert [each for part in parts for each in part] == records
    assert all(parts)
    assert len(parts) >= least


def test_parts_have_about_the_same_number_of_tokens_and_their_number_grows_with_them():
    records = [Record(id=f"{number}", prompt="p" * 300, solution="s" * 600) for number in range(2000)]
    parts = cut(records, max_new_tokens=0, batch_tokens=8192, least=1)
    assert len(parts) == 2000 * 300 // 50_000
    assert {len(part) for part in parts} <= {166, 167}
    assert len(cut(records, max_new_tokens=200, batch_tokens=8192, least=1)) == 2000 * 300 // 50_000
    assert len(cut(records, max_new_tokens=0, batch_tokens=50_000, least=1)) == 2000 * 300 // 200_000


@pytest.mark.parametrize(("of", "parts"), [(1, 1), (2, 5), (3, 3), (5, 12)])
def test_merged_shards_are_the_run_of_one_machine(tmp_path, of, parts):
    whole = record(tmp_path / "whole", 12, max(parts, of))
    merged = merge(tmp_path / "merged", shards_of(tmp_path, of, parts=max(parts, of)))
    assert contents(merged.folder) == contents(whole.folder)
    assert merged.sequences["sequence_id"].tolist() == [each.id for each in benchmark(12).records]
    assert merged.verify() == []
    assert merged.is_complete
    assert merged.manifest.shard is None


def test_shards_stay_and_copies_do_where_links_cannot(tmp_path, monkeypatch):
    shards = shards_of(tmp_path)
    before = [contents(shard) for shard in shards]

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    merged = merge(tmp_path / "merged", shards)
    merged.verify()
    assert [contents(shard) for shard in shards] == before
    for shard in shards:
        shutil.rmtree(shard)
    merged.verify()


def test_what_shards_keep_of_answers_stays_with_them(tmp_path):
    shards = shards_of(tmp_path, 2)
    for shard in shards:
        dict(kept_answers(Run.open(shard), ["load_balance"]))
        assert (shard / "analysis/load_balance.parquet").is_file()
    merged = merge(tmp_path / "merged", shards)
    assert merged.verify() == []
    assert not (merged.folder / "analysis").exists()


def test_where_machines_differ_the_merged_run_names_all(tmp_path):
    shards = shards_of(tmp_path, 2)
    said = edit(shards[1])
    edit(shards[1], model=said["model"] | {"device": "cuda"}, versions=said["versions"] | {"torch": "0.1"})
    manifest = merge(tmp_path / "merged", shards).manifest
    assert manifest.model["device"] == "cpu, cuda"
    assert manifest.versions["torch"].startswith("0.1, ")


def _another(field, name):
    def change(shards):
        said = edit(shards[1])
        edit(shards[1], **{field: said[field] | {name: "x" if name != "top_k" else 3}})

    return change


def _missing(shards):
    shards.pop(1)


def _twice(shards):
    shutil.copytree(shards[0], shards[0].parent / "again")
    shards.append(shards[0].parent / "again")


def _open(shards):
    edit(shards[1], state="open", finished=None)


def _no_part(shards):
    edit(shards[1], parts=edit(shards[1])["parts"][1:])


def _byte(shards):
    path = shards[2] / "parts" / "00002" / "steps.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def _doubled(shards):
    """A shard holds what another one holds, under the number and digests of its own part."""
    shutil.rmtree(shards[1] / "parts" / "00001")
    shutil.copytree(shards[0] / "parts" / "00000", shards[1] / "parts" / "00001")
    first, second = edit(shards[0])["parts"], edit(shards[1])["parts"]
    edit(shards[1], parts=[first[0] | {"name": "00001"}, *second[1:]])


def _too_many(shards):
    for shard in shards:
        edit(shard, benchmark=edit(shard)["benchmark"] | {"records": 13})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_another("model", "digest"), "shard-2-of-3 and .*shard-1-of-3 were captured with another model digest; only"),
        (_another("model", "tokenizer_digest"), "another model tokenizer_digest"),
        (_another("spec", "top_k"), "another spec top_k"),
        (_another("benchmark", "digest"), "another benchmark digest"),
        (_another("options", "batch_tokens"), "another option batch_tokens"),
        (lambda shards: edit(shards[1], seed=7), "another seed"),
        (
            lambda shards: edit(shards[1], interventions=[{"kind": "exclude", "layer": 2, "experts": [1]}]),
            "another interventions",
        ),
        (_missing, "shard 2/3 is missing beside .*shard-1-of-3; capture or copy it"),
        (_twice, "shard-1-of-3 and .*again are both shard 1 of 3; name one of them"),
        (_open, "shard-2-of-3 is not complete; repeat its capture with --resume"),
        (_no_part, "shard-2-of-3 lacks part 00001 of 6"),
        (_byte, "steps.parquet of part 00002 is not what was written"),
        (lambda shards: shutil.rmtree(shards[2] / "parts" / "00005"), "part 00005 lacks"),
        (_doubled, "both hold sequence arithmetic-0000"),
        (_too_many, "the shards hold 12 sequences and list 12, the benchmark has 13"),
        (lambda shards: edit(shards[1], shard=None), "is no shard but a whole run"),
        (lambda shards: edit(shards[2], shard={"index": 2, "of": 4}), "is one of 4 shards, .* one of 3"),
        (lambda shards: edit(shards[0], options={}), "does not say how many parts"),
        (lambda shards: shards.clear(), "name the shards to merge"),
    ],
)
def test_merging_refuses_and_leaves_everything_as_it_was(tmp_path, change, message):
    shards = shards_of(tmp_path / "shards", parts=6)
    change(shards)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((RunError, UsageError), match=message):
        merge(tmp_path / "merged", shards)
    assert sorted(tmp_path.rglob("*")) == before


def test_merging_overwrites_nothing(tmp_path):
    shards = shards_of(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunError, match="mine exists already"):
        merge(tmp_path / "mine", shards)
    assert not list((tmp_path / "mine").iterdir())
    with pytest.raises(UsageError, match="holds no shards"):
        find_shards(tmp_path / "mine")


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0"])
def test_shards_are_counted_from_one(text):
    with pytest.raises(UsageError, match="there is no shard"):
        Shard.parse(text)


@pytest.mark.parametrize("text", ["", "1", "1/2/3", "a/b", "-1/2", "1 / 2"])
def test_what_names_no_shard_is_refused(text):
    with pytest.raises(UsageError, match="names no shard; write i/n"):
        Shard.parse(text)


def test_a_shard_is_resumed_as_itself_only(tmp_path):
    record(tmp_path / "shard", 12, 3, shard=Shard(1, 3))
    with pytest.raises(RunError, match="captured with another shard"):
        record(tmp_path / "shard", 12, 3, shard=Shard(2, 3), resume=True)


@pytest.mark.slow
def test_shards_by_the_command_line(tmp_path):
    command = ["capture", "ling-tiny", "stepbench", "--limit", 20]
    for index in (1, 2):
        assert ling(*command, "--shard", f"{index}/2", "--out", tmp_path / "shards").returncode == 0
        if index == 1:
            assert "shard 2/2 is missing" in refused("merge", tmp_path / "run", "--from", tmp_path / "shards")
    done = ling("merge", tmp_path / "run", "--from", tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    assert ling(*command, "--parts", 2, "--out", tmp_path / "whole").returncode == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert ling("analyze", tmp_path / "run", "load_balance").returncode == 0
    assert "exists already" in refused("merge", tmp_path / "run", "--from", tmp_path / "shards")
    assert "name the shards" in refused("merge", tmp_path / "other")
    assert "20 records cannot be cut into 21 parts" in refused(*command, "--shard", "1/21", "--out", tmp_path / "more")


@pytest.fixture
def fake_ray(monkeypatch):
    """As much of Ray as is used, in this process: two actors take turns, and the first to write is killed once."""
    calls = []

    class Rows:
        def __init__(self, rows):
            self.rows = rows

        def map(self, actor, *, fn_constructor_args, compute, num_gpus):
            actors = [actor(*fn_constructor_args) for _ in range(compute)]
            calls.append((len(actors), num_gpus))
            return Rows([actors[place % compute](row) for place, row in enumerate(self.rows)])

        def take_all(self):
            return self.rows

    ray, data = ModuleType("ray"), ModuleType("ray.data")
    ray.is_initialized, ray.cluster_resources, ray.data = lambda: True, lambda: {"GPU": 4.0}, data
    data.from_items = lambda rows, override_num_blocks: Rows(rows[:override_num_blocks])
    data.ActorPoolStrategy = lambda size: size
    data.DataContext = SimpleNamespace(get_current=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    return calls


WITH_RAY = {
    "actors": 2,
    "model": {"name_or_path": "ling-tiny", "device": "cpu"},
    "benchmark": {"name_or_path": "stepbench", "limit": 12},
}


def test_ray_actors_write_shards_that_are_merged(tmp_path, fake_ray):
    run = capture_with_ray(tmp_path / "run", options={"parts": 4}, **WITH_RAY)
    assert (len(run.done), len(run.manifest.parts), run.verify()) == (12, 4, [])
    assert fake_ray == [(2, 0)]
    with pytest.raises(RunError, match="run exists already"):
        capture_with_ray(tmp_path / "run", options={"parts": 4}, **WITH_RAY)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RunError, match=r"run\.shards exists already"):
        capture_with_ray(tmp_path / "run", options={"parts": 4}, **WITH_RAY)
    again = capture_with_ray(tmp_path / "run", options={"parts": 4}, resume=True, **WITH_RAY)
    assert again.manifest.parts == run.manifest.parts


def test_a_shard_that_an_actor_cannot_write_is_named(tmp_path, fake_ray):
    with pytest.raises(RunError, match="shard 1/2: no checkpoint at nowhere"):
        capture_with_ray(tmp_path / "run", options={}, **WITH_RAY | {"model": {"name_or_path": "nowhere"}})
    assert fake_ray == [(2, 1)]
    with pytest.raises(RunError, match=r"shard 1/2: .*cannot keep"):
        capture_with_ray(tmp_path / "run", options={"keep": ("magic",)}, **WITH_RAY)
    assert not (tmp_path / "run").exists()


def test_without_ray_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"Ray is not installed .*; install it with: pip install 'ling-probe\[ray\]'"):
        capture_with_ray(tmp_path / "run", options={}, **WITH_RAY)


def test_reading_goes_on_over_the_parts_of_one_shard(tmp_path):
    record(tmp_path / "shard", 12, 6, shard=Shard(2, 3))
    run = Run.open(tmp_path / "shard")
    assert [part.name for part in run.manifest.parts] == ["00001", "00004"]
    assert sum(len(batch.position) for batch in run.batches()) == sum(part.tokens for part in run.manifest.parts)
    assert len(run.steps) == sum(part.steps for part in run.manifest.parts)
