import json
import shutil
import subprocess
import sys

import pytest
import torch
from official import FIXTURES
from test_modeling import with_next_token_layer
from torch.utils.flop_counter import FlopCounterMode

from ling_probe import cli
from ling_probe.cli.options import CacheDtypeName
from ling_probe.cost import NUMBER_BYTES, PRESETS, cost, read_config
from ling_probe.errors import CheckpointError, ConfigError, UsageError
from ling_probe.model import LingConfig, LingForCausalLM
from ling_probe.model.files import SHIPPED
from ling_probe.model.modeling import LingGate, LingRMSNorm

SIZES = ["ling-mini-2.0", "ling-flash-2.0", "ling-1t"]
VARIANTS = {
    "tied head": {"tie_word_embeddings": True},
    "no shared experts": {"num_shared_experts": 0},
    "two shared experts": {"num_shared_experts": 2},
    "all dense": {"first_k_dense_replace": 5},
    "none dense": {"first_k_dense_replace": 0},
    "biases": {"use_bias": True, "use_qkv_bias": True},
    "no head norms": {"use_qk_norm": False},
    "heads wider than the model": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "ungrouped": {"n_group": 0, "topk_group": 0},
}


def variant(name):
    values = json.loads((SHIPPED / "ling-tiny" / "config.json").read_text())
    return LingConfig.from_dict(values | VARIANTS.get(name, {}))


def flops(found):
    return {part.name: part.flops for part in found.parts}


def data_bytes(file):
    """Bytes of a safetensors file's tensors."""
    return file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")


def counted(model):
    """Parameters of an instantiated model by part, a tied table once."""
    found = dict.fromkeys(
        [
            "embedding",
            "attention projections",
            "router",
            "routed experts",
            "shared experts",
            "dense feed-forward",
            "norms",
            "head",
        ],
        0,
    )
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LingRMSNorm)}
    words = {
        "embed_tokens": "embedding", "lm_head": "head", ".gate.": "router", ".experts.": "routed experts",
        ".shared_experts.": "shared experts", ".mlp.": "dense feed-forward", ".self_attn.": "attention projections",
    }  # fmt: skip
    for name, tensor in model.named_parameters():
        part = "norms" if name in norms else next(part for word, part in words.items() if word in name)
        found[part] += tensor.numel()
    found["router"] += sum(gate.expert_bias.numel() for gate in model.modules() if isinstance(gate, LingGate))
    return found


@pytest.mark.parametrize(
    ("name", "total", "active", "non_embedding", "next_token_layer"),
    [
        ("ling-mini-2.0", 16_255_643_392, 1_432_973_056, 789_147_392, 827_861_504),
        ("ling-flash-2.0", 102_889_705_216, 6_152_277_760, 4_864_626_432, 3_306_181_120),
        ("ling-1t", 999_705_328_640, 51_054_427_136, 48_479_124_480, 13_222_584_832),
    ],
)
def test_published_sizes(name, total, active, non_embedding, next_token_layer):
    found = cost(read_config(name))
    assert (found.total.parameters, found.total.active) == (total, active)
    assert found.non_embedding.active == non_embedding
    assert total - found.non_embedding.parameters == active - non_embedding
    assert (found.next_token_layers, found.next_token_layer_parameters) == (0, next_token_layer)


@pytest.mark.parametrize(
    ("name", "projections", "dense", "routed", "shared", "router", "head", "prefill", "decode", "cache", "gib", "choices"),
    [
        ("ling-mini-2.0", 0.419, 0.063, 0.956, 0.120, 0.020, 0.644, (0.34, 2.68), (0.67, 5.37), 40_960, 30.3, 152),
        ("ling-flash-2.0", 2.416, 0.226, 6.241, 0.780, 0.065, 1.288, (1.07, 8.59), (2.15, 17.2), 65_536, 191.6, 248),
        ("ling-1t", 24.16, 3.62, 61.20, 7.65, 0.32, 2.58, (5.37, 42.95), (10.7, 85.9), 327_680, 1862, 608),
    ],
)
def test_published_compute(
    name, projections, dense, routed, shared, router, head, prefill, decode, cache, gib, choices
):  # fmt: skip
    config = read_config(name)
    short, long = cost(config, context=4096), cost(config, context=32768)
    giga = {part: value / 1e9 for part, value in flops(short).items()}
    expected = {
        "embedding": 0, "attention projections": projections, "attention scores": decode[0], "router": router,
        "routed experts": routed, "shared experts": shared, "dense feed-forward": dense, "norms": 0, "head": head,
    }  # fmt: skip
    assert giga == pytest.approx(expected, rel=0.02)
    assert list(giga) == list(expected)
    assert (short.prefill_score_flops / 1e9, long.prefill_score_flops / 1e9) == pytest.approx(prefill, rel=0.02)
    assert flops(long)["attention scores"] / 1e9 == pytest.approx(decode[1], rel=0.01)
    assert long.total.flops - short.total.flops == flops(long)["attention scores"] - flops(short)["attention scores"]
    assert short.cache_bytes_per_token == cache
    assert long.cache_bytes == cache * 32768
    assert short.weight_bytes / 2**30 == pytest.approx(gib, rel=0.002)
    assert short.routing_choices == choices


@pytest.mark.parametrize(("name", "sums"), [*zip(SIZES, [(2.222, 1.578), (11.02, 9.73), (99.5, 97.0)], strict=True)])
def test_sums_leave_out_what_they_say(name, sums):
    found = cost(read_config(name))
    scores = flops(found)["attention scores"]
    assert ((found.total.flops - scores) / 1e9, (found.non_embedding.flops - scores) / 1e9) == pytest.approx(sums, rel=1e-3)


@pytest.mark.parametrize(("name", "giga"), [*zip(SIZES, [31.9, 204.5, 1996.8], strict=True)])
def test_every_expert_on(name, giga):
    config = read_config(name)
    config.num_experts_per_tok = config.num_experts
    found = cost(config)
    assert found.total.active == found.total.parameters
    assert (found.total.flops - flops(found)["attention scores"]) / 1e9 == pytest.approx(giga, rel=2e-3)


@pytest.mark.parametrize("name", [*SIZES, "ling-tiny", *VARIANTS])
def test_every_part_is_what_the_instantiated_model_holds(name):
    config = read_config(name) if name in {*SIZES, "ling-tiny"} else variant(name)
    with torch.device("meta"):
        model = LingForCausalLM(config)
    parts = {part.name: part.parameters for part in cost(config).parts}
    assert parts.pop("attention scores") == 0
    assert parts == counted(model)


@pytest.mark.parametrize("name", ["ling-tiny", *VARIANTS])
def test_flops_are_what_a_forward_pass_multiplies(name):
    config, tokens = variant(name), 24
    torch.manual_seed(0)
    model = LingForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(config.vocab_size, (1, tokens)), use_cache=False)
    # Eager attention multiplies masked pairs too: every token pays for all of the context.
    assert counter.get_total_flops() == tokens * cost(config, context=tokens).total.flops


def test_prefill_is_the_mean_over_positions():
    config = variant("ling-tiny")
    scores = [flops(cost(config, context=position))["attention scores"] for position in range(1, 101)]
    assert cost(config, context=100).prefill_score_flops * 100 == sum(scores)


def test_active_leaves_out_only_unchosen_experts():
    found = cost(variant("ling-tiny"))
    idle = {part.name: part.parameters - part.active for part in found.parts if part.parameters != part.active}
    assert idle == {"routed experts": 4 * (32 - 4) * 3 * 128 * 48}


def test_weight_bytes_are_those_of_the_shipped_file():
    file = SHIPPED / "ling-tiny" / "model.safetensors"
    assert cost(read_config("ling-tiny")).weight_bytes == data_bytes(file)


def test_a_tied_table_is_stored_once_and_multiplied_all_the_same():
    tied, untied = cost(variant("tied head")), cost(variant("ling-tiny"))
    assert untied.total.parameters - tied.total.parameters == variant("tied head").vocab_size * 128
    assert tied.non_embedding == untied.non_embedding
    assert tied.total.flops == untied.total.flops


@pytest.mark.parametrize("inside", [False, True])
def test_next_token_layers_stand_apart(tmp_path, inside):
    with_next_token_layer(tmp_path / "with", inside=inside)
    found, without = cost(read_config(str(tmp_path / "with"))), cost(read_config(str(FIXTURES / "tiny-base")))
    assert (found.next_token_layers, without.next_token_layers) == (1, 0)
    assert found.total == without.total
    more, fewer = (data_bytes(folder / "model.safetensors") for folder in (tmp_path / "with", FIXTURES / "tiny-base"))
    float32_bias = 2 * read_config(str(FIXTURES / "tiny-base")).num_experts
    assert more - fewer == 2 * found.next_token_layer_parameters + float32_bias


def test_a_name_a_file_and_a_folder_give_the_same(tmp_path):
    file = PRESETS / "ling-mini-2.0.json"
    shutil.copy(file, tmp_path / "config.json")
    expected = cost(read_config("ling-mini-2.0"))
    assert expected == cost(read_config(str(file))) == cost(read_config(str(tmp_path)))
    shutil.copytree(SHIPPED / "ling-tiny", tmp_path / "tiny")
    assert cost(read_config(str(tmp_path / "tiny"))) == cost(read_config("ling-tiny"))


def test_the_cache_follows_the_number_type():
    config = variant("ling-tiny")
    sizes = {name: cost(config, number_bytes=size).cache_bytes_per_token for name, size in NUMBER_BYTES.items()}
    assert sizes == {"float32": 2560, "bfloat16": 1280, "float16": 1280, "float8": 640}
    assert set(sizes) == {name.value for name in CacheDtypeName}


def test_no_context_is_refused():
    with pytest.raises(UsageError, match="context of 0 tokens"):
        cost(variant("ling-tiny"), context=0)


def test_counting_needs_no_torch():
    script = "import sys, ling_probe.cost; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BailingMoeForCausalLM"]}, "this is a BailingMoeForCausalLM configuration, not Ling 2.0"),
        ({"architectures": ["LlamaForCausalLM"]}, "this is a LlamaForCausalLM configuration, not Ling 2.0"),
        ({"architectures": None}, 'names no "architectures"'),
        ({"n_group": 3}, "n_group 3 does not divide 32 experts"),
        ({"architectures": {"name": "x"}}, "has a value that no Ling 2.0 can have"),
        ({"hidden_size": "wide"}, "has a value that no Ling 2.0 can have: Validation error for field 'hidden_size'"),
        ({"rope_scaling": "yarn"}, "has a value that no Ling 2.0 can have"),
        ({"num_hidden_layers": 10**30}, "has a value that no Ling 2.0 can have"),
        ({"hidden_size": 0}, "hidden_size is 0; expected at least 1"),
        ({"first_k_dense_replace": 6}, "first_k_dense_replace 6 is not between 0 and 5 layers"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1; expected at least 0"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1; expected at least 0"),
    ],
)
def test_a_configuration_that_is_no_ling_2_names_its_file(tmp_path, change, message):
    file = tmp_path / "other.json"
    file.write_text(json.dumps(json.loads((SHIPPED / "ling-tiny" / "config.json").read_text()) | change))
    with pytest.raises(ConfigError) as caught:
        read_config(str(file))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "holds a list"), ("", "is not JSON")])
def test_a_file_that_is_no_configuration(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    for place in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ConfigError, match=message):
            read_config(str(place))


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(str(tmp_path))


def test_a_folder_whose_weights_do_not_fit(tmp_path):
    shutil.copytree(SHIPPED / "ling-tiny", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 6}))
    with pytest.raises(CheckpointError, match=r"lacks \d+ of \d+ tensors"):
        read_config(str(tmp_path / "model"))


@pytest.fixture
def ling(monkeypatch, capsys):
    """Run the command line in this process: exit status, standard output, standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["ling-probe", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return (left.value.code, *capsys.readouterr())

    return run


def test_the_command_gives_rows(ling):
    code, text, _ = ling("cost", "ling-mini-2.0", "--context", 32768, "--dtype", "float8", "--json")
    rows = [json.loads(line) for line in text.splitlines()]
    assert code == 0
    found = cost(read_config("ling-mini-2.0"), context=32768, number_bytes=1)
    assert [row["name"] for row in rows if row["table"] == "parts"] == [part.name for part in found.parts]
    sums = {row["name"]: row for row in rows if row["table"] == "sums"}
    assert sums["total"]["parameters"] == 16_255_643_392
    assert sums["total"]["flops"] == found.total.flops
    assert sums["without embedding and head"]["active"] == 789_147_392
    (facts,) = (row for row in rows if row["table"] == "facts")
    assert facts["model"] == "ling-mini-2.0"
    assert (facts["context"], facts["cache_bytes_per_token"], facts["cache_bytes"]) == (32768, 20_480, 20_480 * 32768)
    assert facts["next_token_layers"] == 0


def test_the_command_prints_exact_numbers(ling):
    code, text, _ = ling("cost", "ling-mini-2.0")
    assert code == 0
    for number in ("16,255,643,392", "1,432,973,056", "789,147,392", "671,088,640", "40,960 bytes a token", "827,861,504"):
        assert number in text


def test_the_command_refuses_in_one_line(ling):
    code, text, error = ling("cost", "configs/nowhere.json")
    assert (code, text, error.count("\n")) == (2, "", 1)
    assert error == (
        "ling-probe: no configuration at configs/nowhere.json; give a preset (ling-1t, ling-flash-2.0, ling-mini-2.0), "
        "a config.json, a checkpoint folder, or a shipped checkpoint (ling-tiny)\n"
    )
