"""A small Ling whose weights are set by hand, so that known experts fire on known operations.

Each step of its problems begins with a word that names the operation; the words after it are drawn from one pool whatever the
operation. The residual stream has places for

    CONSTANT   the same for every token
    MARK       whether the token is an operation's word
    NAMED      which operation it names
    CURRENT    which operation is going on: written by attention, read by routers
    VOICE      which operation's words to favour: read by the head alone, and empty unless experts speak
    the rest   what word it is

1. The attention of layer 0 attends to the last operation's word: among marked keys the score falls with distance (a slow
   rotary frequency, an eighth of a turn ahead); it writes what the word names to CURRENT of every token of the step.
2. In each routed layer one expert of one group reads each operation: its router row holds that place of CURRENT, and a
   constant that keeps it silent elsewhere; it writes nothing. Every token so has one such expert, and others beside it.
3. Rows of the others, and all attention and experts after layer 0, read and write the word's places alone, where an operation's
   word is nothing: nothing else about the model knows the operation.
4. Where experts speak, each planted one writes its operation to VOICE, and the head raises the words that steps of this
   operation use more, if the problems are leaning so. Whoever takes them out of a step takes this from its words.

The word that fires an expert is thus the same in every operation; what differs is the step that it stands in.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

import ling_probe
from ling_probe.benchmarks import Benchmark, Record, Step
from ling_probe.model import LingConfig, LingForCausalLM
from ling_probe.model.load import LoadedLing, load_native
from ling_probe.model.modeling import LingAttention, LingMLP, LingMoE

OPERATIONS = {
    "add": "finds", "subtract": "loses", "multiply": "multiplies", "divide": "divides", "compare": "compare",
    "premise": "given",
}  # fmt: skip
"""Label of a step -> the word it begins with."""
WORDS = tuple(
    f" {word}"
    for word in (
        *("figs", "pears", "nuts", "plums", "coins", "cards", "beads", "shells", "keys", "pens", "maps"),
        *("bells", "red", "blue", "cold", "hot", "sour", "sweet", "tall", "tiny", "loud", "quiet"),
    )
)
"""What steps are filled with, the same in every operation."""
N = len(OPERATIONS)
CONSTANT, MARK = 0, 1
NAMED, CURRENT, VOICE = slice(2, 2 + N), slice(2 + N, 2 + 2 * N), slice(2 + 2 * N, 2 + 3 * N)
WORD = slice(2 + 3 * N, None)
FAVOURED = [[(place + step) % len(WORDS) for step in range(len(WORDS) // 2)] for place in range(0, 4 * N, 4)]
"""Places of the words that each operation favours, in leaning problems; each is half of all, and they overlap."""
LAYERS = (1, 2, 3)
TOKENIZER = Path(ling_probe.__file__).parent / "checkpoints" / "ling-tiny"
"""Where the shipped tokenizer lies; each word here is one of its tokens."""
GROUP = 8


def truth() -> set[tuple[int, int, str]]:
    """Layer, expert and label of everything planted; each layer has its own group and its own order."""
    return {(layer, GROUP * layer + (place + layer) % N, label) for layer in LAYERS for place, label in enumerate(OPERATIONS)}


def problems(n: int, *, leaning: float = 0.0, seed: int = 0) -> Benchmark:
    """Problems of 4 to 7 steps of 5 to 8 tokens, operations drawn independently.

    A step's words are drawn evenly, or, `leaning`, those that its operation favours so many times more often as 1.
    """
    rng = np.random.default_rng(seed)
    return Benchmark("planted", "test", tuple(_problem(number, leaning, rng) for number in range(n)), "0" * 64)


def shuffled_labels(benchmark: Benchmark, *, seed: int = 0) -> Benchmark:
    """The same text with labels permuted over the steps of all problems."""
    labels = [step.label for record in benchmark.records for step in record.steps]
    deal = iter(np.random.default_rng(seed).permutation(labels).tolist())
    records = [replace(each, steps=tuple(replace(step, label=next(deal)) for step in each.steps)) for each in benchmark.records]
    return replace(benchmark, records=tuple(records))


def _problem(number: int, leaning: float, rng: np.random.Generator) -> Record:
    lines = []
    for label in rng.choice(list(OPERATIONS), rng.integers(4, 8)):
        weight = np.ones(len(WORDS))
        weight[FAVOURED[list(OPERATIONS).index(label)]] += leaning
        words = rng.choice(WORDS, rng.integers(4, 8), p=weight / weight.sum() if leaning else None)
        lines.append((str(label), OPERATIONS[label] + "".join(words) + "\n"))
    stops = np.cumsum([len(line) for _, line in lines])
    steps = [
        Step(label=label, text=line.rstrip("\n"), start=int(stop) - len(line), stop=int(stop))
        for (label, line), stop in zip(lines, stops, strict=True)
    ]
    prompt = "".join(rng.choice(WORDS, 5)).strip() + "\n"
    solution = "".join(line for _, line in lines)
    return Record(id=f"planted-{number:04d}", prompt=prompt, solution=solution, family="planted", steps=tuple(steps))


def planted_model(folder: Path, *, planted: bool = True, speaking: bool = False, seed: int = 0) -> LoadedLing:
    """Write the model as a checkpoint and load it; without plants those experts have rows like the others'.

    Args:
        folder: Of the checkpoint.
        planted: Whether known experts fire on operations.
        speaking: Whether they then write what favours the operation's words; if not they write nothing.
        seed: Of all weights.
    """
    shutil.copytree(TOKENIZER, folder, ignore=lambda _, names: [name for name in names if "tokenizer" not in name])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = LingForCausalLM(
        LingConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=32, num_hidden_layers=4, num_attention_heads=1,
            num_key_value_heads=1, head_dim=16, partial_rotary_factor=0.25, rope_theta=10_000.0, num_experts=32,
            num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=16, routed_scaling_factor=2.5,
            max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    _embed(model, [tokenizer.convert_tokens_to_ids(word) for word in OPERATIONS.values()])
    for number, layer in enumerate(model.model.layers):
        _confine(layer)
        if number in LAYERS:
            _set_router(layer.mlp, number, planted=planted)
            if planted and speaking:
                _let_speak(layer.mlp, number)
    if speaking:
        _listen(model, [tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS])
    _spread_the_operation(model.model.layers[0].self_attn)
    model.save_pretrained(folder)
    return load_native(str(folder))


@torch.no_grad()
def _embed(model: LingForCausalLM, marks: list[int]) -> None:
    """Every embedding has the same norm: the norms then tell nothing."""
    table = model.model.embed_tokens.weight.zero_()
    table[:, CONSTANT] = 1.0
    table[:, WORD] = nn.functional.normalize(torch.randn_like(table[:, WORD]), dim=-1)
    table[marks, WORD] = 0.0
    table[marks, MARK] = 0.5**0.5
    table[marks, NAMED] = 0.5**0.5 * torch.eye(N)


@torch.no_grad()
def _confine(layer: nn.Module) -> None:
    """Random weights that read and write what word a token is, and nothing else."""
    attention, mlp = layer.self_attn, layer.mlp
    dense = [mlp] if isinstance(mlp, LingMLP) else [mlp.shared_experts]
    readers = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    readers += [weight for each in dense for weight in (each.gate_proj.weight, each.up_proj.weight)]
    writers = [attention.o_proj.weight, *(each.down_proj.weight for each in dense)]
    if isinstance(mlp, LingMoE):
        readers.append(mlp.experts.gate_up_proj)
        writers.append(mlp.experts.down_proj)
    for weight in readers:
        weight.normal_(0, 0.1)[..., : WORD.start] = 0.0
    for weight in writers:
        weight.normal_(0, 0.1)[..., : WORD.start, :] = 0.0


@torch.no_grad()
def _spread_the_operation(attention: LingAttention) -> None:
    """Write to every token what the last operation's word names.

    Dimensions 1 and 3 of the head turn together, by 0.01 a token. The query lies along 1, the key of an operation's word an
    eighth of a turn ahead, so the score falls by 5.5 for each token between them; all other keys are 0.
    """
    q, k, v, o = (getattr(attention, f"{name}_proj").weight.zero_() for name in "qkvo")
    q[1, CONSTANT] = 1.0
    k[1, MARK], k[3, MARK] = 1.0, -1.0
    v[torch.arange(N), torch.arange(N) + NAMED.start] = 1.0
    o[torch.arange(N) + CURRENT.start, torch.arange(N)] = 0.25
    attention.q_norm.weight.fill_(14.0)
    attention.k_norm.weight.fill_(14.0)


@torch.no_grad()
def _set_router(mlp: LingMoE, layer: int, *, planted: bool) -> None:
    gate = mlp.gate
    gate.weight.normal_(0, 0.2)[:, : WORD.start] = 0.0
    gate.weight[:, CONSTANT] = -0.4
    gate.expert_bias.normal_(0, 0.02)
    for number, expert, label in truth() if planted else ():
        if number == layer:
            gate.weight[expert] = 0.0
            gate.weight[expert, CONSTANT] = -1.3
            gate.weight[expert, CURRENT.start + list(OPERATIONS).index(label)] = 2.6
            # What it wrote would tell every later layer the operation.
            mlp.experts.down_proj[expert] = 0.0


@torch.no_grad()
def _let_speak(mlp: LingMoE, layer: int) -> None:
    """What a planted expert writes is the same for every token that it is given."""
    up = mlp.experts.gate_up_proj.shape[1] // 2
    for number, expert, label in truth():
        if number == layer:
            mlp.experts.gate_up_proj[expert] = 0.0
            mlp.experts.gate_up_proj[expert, [0, up], CONSTANT] = 1.0
            mlp.experts.down_proj[expert, VOICE.start + list(OPERATIONS).index(label), 0] = 0.02


@torch.no_grad()
def _listen(model: LingForCausalLM, words: list[int]) -> None:
    head = model.lm_head.weight
    head[:, VOICE] = 0.0
    for place, favoured in enumerate(FAVOURED):
        head[[words[each] for each in favoured], VOICE.start + place] = 1.0
