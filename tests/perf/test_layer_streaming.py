"""What streaming a checkpoint layer by layer costs, beside what its bytes and its products cost this machine anyway.

A random checkpoint of Ling-mini-2.0's width (hidden 2048, 16/4 heads of 128, 256 experts of width 512, top-8 in 4 of 8 groups)
is written, measured and deleted. It is cut: 1 dense and 3 routed layers instead of 19, and a vocabulary of 8,192 instead of
157,184. A routed layer is 1.64 GB in bf16. One thread computes and one reads ahead, so it needs two free cores::

    OMP_NUM_THREADS=1 python -m pytest tests/perf/test_layer_streaming.py -m perf -s

It takes 5.2 GB of disk under pytest's temporary folder (``--basetemp=FOLDER`` names another; memory-backed ones measure
nothing) and under 4 GB of memory. Every stream starts cold: the files, synced to disk when written, are dropped from the page
cache before it.

The table: seconds from one routed layer to the next; the time to read a layer cold from beginning to end at the rate measured
here, once before all streams; its FLOPs at the rate of a large bf16 product, the mean of before and after each stream; the
ratio of the first to the larger of the other two; the same two in processor seconds of the computing thread, which other work
on the machine disturbs less; and the most anonymous memory (RssAnon) while the stream ran. The aim of a ratio of 1.5 is printed
against, not asserted: only a quiet machine can say. Memory is asserted.
"""

import json
import os
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from ling_probe.model.config import ARCHITECTURE, LingConfig
from ling_probe.model.files import expected_shapes, find_checkpoint, layer_shapes
from ling_probe.model.load import Verification
from ling_probe.model.streaming import StreamedLing, _Layers

ROUTED = (1, 2, 3)
LENGTH = 512
STREAMS = {"2,048 tokens": (4, 1), "8,192 tokens": (16, 1), "32,768 tokens": (16, 4), "65,536 tokens": (16, 8)}
"""Sequences in a batch, and batches."""
GEOMETRY = {
    "vocab_size": 8192, "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
    "n_group": 8, "topk_group": 4, "partial_rotary_factor": 0.5, "routed_scaling_factor": 2.5, "pad_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip


class Pool:
    """Random numbers to write from: a piece of one large draw, at another place each time."""

    def __init__(self):
        self.numbers = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
        self.place = 0

    def piece(self, name, shape):
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.bfloat16)
        if name.endswith("expert_bias"):
            return self.numbers[: prod(shape)].float()
        self.place = (self.place + 104_729) % (len(self.numbers) - prod(shape) + 1)
        return self.numbers[self.place : self.place + prod(shape)]


def write_shard(file, shapes, pool):
    """A safetensors file, tensor by tensor."""
    header, stop = {}, 0
    for name, shape in shapes.items():
        kind, size = ("F32", 4) if name.endswith("expert_bias") else ("BF16", 2)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": (stop, stop + size * prod(shape))}
        stop += size * prod(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            stream.write(pool.piece(name, shape).contiguous().view(torch.uint8).numpy())
        stream.flush()
        os.fsync(stream.fileno())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The random checkpoint, one file a layer."""
    torch.set_num_threads(1)
    folder, pool, config = tmp_path_factory.mktemp("mini-width"), Pool(), LingConfig(**GEOMETRY)
    shards = {f"layer-{index}.safetensors": layer_shapes(config, index) for index in range(config.num_hidden_layers)}
    inside = {name for shapes in shards.values() for name in shapes}
    shards["rest.safetensors"] = {name: shape for name, shape in expected_shapes(config).items() if name not in inside}
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"architectures": [ARCHITECTURE], "model_type": "bailing_moe"} | GEOMETRY))
    try:
        for name, shapes in shards.items():
            write_shard(folder / name, shapes, pool)
        yield find_checkpoint(folder)
    finally:
        shutil.rmtree(folder)


class TimedBatch:
    """Random tokens; notes when each layer begins."""

    mask = None

    def __init__(self, rows):
        self.input_ids = torch.randint(GEOMETRY["vocab_size"], (rows, LENGTH))
        self.begins = []

    @contextmanager
    def attached(self):
        self.begins.append(clocks())
        yield


@contextmanager
def peak_anonymous(found):
    """Put the most RssAnon in bytes, and what it was before, into a dictionary while the block runs."""

    def now():
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def watch():
        while not done.wait(0.02):
            found["peak"] = max(found["peak"], now())

    done, found["before"] = threading.Event(), now()
    found["peak"] = found["before"]
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def drop_from_cache(files):
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(files):
    """Bytes a second of a cold read from beginning to end."""
    drop_from_cache(files)
    block, total, start = memoryview(bytearray(4 << 20)), 0, time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while read := stream.readinto(block):
                total += read
    return total / (time.perf_counter() - start)


def product_rates(rounds=8):
    """FLOPs of a large bf16 product, by second and by processor second."""
    x, w = torch.randn(4096, 2048).to(torch.bfloat16), torch.randn(2048, 2048).to(torch.bfloat16)
    times = []
    for _ in range(rounds):
        start = clocks()
        torch.nn.functional.linear(x, w)
        times.append(clocks() - start)
    return 2 * 4096 * 2048 * 2048 / np.median(times[1:], axis=0)


def clocks():
    """Seconds, and processor seconds of this thread."""
    return np.array([time.perf_counter(), time.thread_time()])


def routed_flops(tokens):
    """Of one routed layer: its products on the active parameters, and causal attention."""
    d, heads = 2048, 16 * 128
    active = d * (heads + 2 * 4 * 128) + heads * d + 9 * 3 * d * 512 + 256 * d
    return tokens * (2 * active + 2 * heads * LENGTH)


def stream(checkpoint, rows, count):
    """Both clocks of a routed layer that reads another one ahead, and memory, of one cold stream."""
    layers = _Layers.of(checkpoint, torch.bfloat16)
    # Counted as proved, so that the batch that proves it is not measured.
    proved = Verification(choices=1, differ=0, near_ties=0, max_weight_error=0.0)
    loaded = StreamedLing(layers.native, None, checkpoint.config.spec("random"), "", proved, layers)
    batches, memory = [TimedBatch(rows) for _ in range(count)], {}
    drop_from_cache(checkpoint.files)
    with peak_anonymous(memory):
        for _batch, hidden in loaded.forward(batches):
            assert hidden.isfinite().all()
    begins = batches[0].begins
    assert len(begins) == GEOMETRY["num_hidden_layers"]
    return np.mean([begins[layer + 1] - begins[layer] for layer in ROUTED[:-1]], axis=0), memory


@pytest.fixture(scope="module")
def baseline(checkpoint):
    """Seconds to read one routed layer, and its bytes; prints the head of the table."""
    size = next(file.stat().st_size for file in checkpoint.files if file.name == f"layer-{ROUTED[0]}.safetensors")
    rate = read_rate(checkpoint.files)
    sys.stdout.write(f"\na routed layer {size / 1e9:.2f} GB, read cold at {rate / 1e9:.2f} GB/s; 1 thread, bf16\n")
    sys.stdout.write(
        "stream         s/layer  read s  products s (GFLOPS)  ratio   cpu s  products cpu s   RssAnon peak (before)\n"
    )
    return size / rate, size


@pytest.mark.perf
@pytest.mark.parametrize("name", STREAMS)
def test_what_a_streamed_layer_takes_beside_its_bytes_and_its_products(checkpoint, baseline, name, record_property):
    (read_seconds, layer_bytes), (rows, count) = baseline, STREAMS[name]
    before = product_rates()
    (seconds, processor), memory = stream(checkpoint, rows, count)
    rates = (before + product_rates()) / 2
    products, products_processor = routed_flops(rows * LENGTH * count) / rates
    ratio = seconds / max(read_seconds, products)
    record_property(name, ratio)
    sys.stdout.write(
        f"{name:<14}{seconds:>8.2f}{read_seconds:>8.2f}{products:>11.2f} ({rates[0] / 1e9:>6.0f}){ratio:>9.2f}{processor:>8.2f}"
        f"{products_processor:>16.2f}{memory['peak'] / 1e9:>12.2f} GB ({memory['before'] / 1e9:.2f})\n"
    )
    sys.stdout.flush()
    assert memory["peak"] < 6e9
    assert memory["peak"] - memory["before"] < layer_bytes, "no layer is ever held in anonymous memory as a whole"
