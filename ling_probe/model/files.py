"""What a checkpoint folder holds, read from headers alone: found, whole, and fitting its configuration."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ling_probe.errors import CheckpointError, ConfigError, UsageError
from ling_probe.model.config import LingConfig
from ling_probe.model.fp8 import Block, block_size, check_stored

SHIPPED = Path(__file__).parents[1] / "checkpoints"
"""Checkpoints that come with the package."""
_NEXTN = re.compile(r"^model\.layers\.(\d+)\.eh_proj\.")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_SNAPSHOT = re.compile(r"step-(\d+)")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
"""Bytes of an entry, by safetensors' name of a number type that is read."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a safetensors file."""

    file: Path
    dtype: str
    """safetensors' name of the number type."""
    shape: tuple[int, ...]
    start: int
    stop: int
    """Its bytes, counted from the beginning of the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files are whole."""

    name: str
    """What the user called it."""
    folder: Path
    config: LingConfig
    """With ``num_hidden_layers`` counting decoder layers only."""
    files: tuple[Path, ...]
    """The safetensors files, in name order."""
    stored: Mapping[str, Stored]
    """Every stored tensor, by original name."""
    block: Block | None
    """Rows and columns that share a scale, if the weights are fp8."""

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is: beside the weights; for a snapshot without one, in the folder that holds the snapshot.

        Raises:
            CheckpointError: In neither.
        """
        places = [self.folder]
        if _SNAPSHOT.fullmatch(self.folder.resolve().name):
            places.append(self.folder.resolve().parent)
        if not (found := [place for place in places if (place / "tokenizer.json").is_file()]):
            where = " and its parent have" if len(places) > 1 else " has"
            raise CheckpointError(
                f"{self.folder}{where} no tokenizer.json; copy the checkpoint's tokenizer files beside its weights"
            )
        return found[0]


def find_checkpoint(name_or_path: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Find, and check without loading, a checkpoint.

    Args:
        name_or_path: A folder, the name of a shipped checkpoint, or a repository on the Hugging Face hub. ``NAME@step-N`` is
            the snapshot in the sub-folder ``step-N`` of either of the first two, ``owner/name@revision`` a revision on the hub.
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: Not found, or a file is missing, truncated or lacks a tensor.
        ConfigError: Not a Ling 2.0 that we can run.
        UsageError: Two revisions.
    """
    folder = _folder(str(name_or_path), revision)
    values = _read_json(folder / "config.json")
    config = _config(values, folder)
    files = _weight_files(folder)
    stored = {name: tensor for file in files for name, tensor in _header(file).items()}
    _leave_out_next_token_layers(config, stored)
    _check_tensors(config, stored, folder)
    block = block_size(values, folder)
    check_stored(stored, expected_shapes(config), block, folder)
    return Checkpoint(str(name_or_path), folder, config, files, stored, block)


def weight_digest(files: tuple[Path, ...]) -> str:
    """SHA-256 over the bytes of the weight files in name order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def expected_shapes(config: LingConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the decoder of this configuration needs, by original name."""
    d = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (config.vocab_size, d), "model.norm.weight": (d,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for index in range(config.num_hidden_layers):
        shapes |= layer_shapes(config, index)
    return shapes


def layer_shapes(config: LingConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Every tensor that one decoder layer needs, by original name."""
    d, head, layer = config.hidden_size, config.head_dim, f"model.layers.{index}."
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}input_layernorm.weight": (d,),
        f"{layer}post_attention_layernorm.weight": (d,),
        f"{layer}attention.query_key_value.weight": (q + 2 * kv, d),
        f"{layer}attention.dense.weight": (d, q),
    }
    if config.use_qkv_bias:
        shapes[f"{layer}attention.query_key_value.bias"] = (q + 2 * kv,)
    if config.use_bias:
        shapes[f"{layer}attention.dense.bias"] = (d,)
    if config.use_qk_norm:
        shapes |= {f"{layer}attention.{which}_layernorm.weight": (head,) for which in ("query", "key")}
    return shapes | _feed_forward_shapes(config, f"{layer}mlp.", routed=index >= config.first_k_dense_replace)


def _feed_forward_shapes(config: LingConfig, prefix: str, *, routed: bool) -> dict[str, tuple[int, ...]]:
    d = config.hidden_size

    def swiglu(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{name}gate_proj.weight": (width, d),
            f"{name}up_proj.weight": (width, d),
            f"{name}down_proj.weight": (d, width),
        }

    if not routed:
        return swiglu(prefix, config.intermediate_size)
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}gate.weight": (config.num_experts, d),
        f"{prefix}gate.expert_bias": (config.num_experts,),
    }
    for expert in range(config.num_experts):
        shapes |= swiglu(f"{prefix}experts.{expert}.", config.moe_intermediate_size)
    if config.num_shared_experts:
        shapes |= swiglu(f"{prefix}shared_experts.", config.moe_intermediate_size * config.num_shared_experts)
    return shapes


def _folder(name: str, revision: str | None) -> Path:
    if found := _local(name):
        return found
    base, at, part = name.rpartition("@")
    if at and (holder := _local(base)):
        return _snapshot(base, holder, part)
    repository = base if at else name
    if _REPOSITORY.fullmatch(repository) and not Path(repository).exists():
        if at and revision is not None:
            raise UsageError(f"{name} names revision {part} and --revision says {revision}; give one of them")
        return _download(repository, part if at else revision)
    shipped = ", ".join(sorted(p.name for p in SHIPPED.iterdir())) if SHIPPED.is_dir() else "none"
    raise CheckpointError(
        f"no checkpoint at {name}; give a folder, a hub repository (owner/name), or a shipped one ({shipped})"
    )


def _local(name: str) -> Path | None:
    """The shipped checkpoint or the folder of that name."""
    if (SHIPPED / name / "config.json").is_file() and "/" not in name:
        return SHIPPED / name
    return Path(name) if name and Path(name).is_dir() else None


def _snapshot(name: str, folder: Path, snapshot: str) -> Path:
    found = {
        path.parent.name: path.parent for path in folder.glob("step-*/config.json") if _SNAPSHOT.fullmatch(path.parent.name)
    }
    if snapshot not in found:
        there = ", ".join(sorted(found, key=lambda each: int(each.removeprefix("step-")))) or "none"
        raise CheckpointError(f'{name} has no snapshot "{snapshot}"; these there are: {there}')
    return found[snapshot]


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise CheckpointError(f"{name} is no folder here and the hub did not give it ({reason})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; a checkpoint folder needs one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected a JSON object")
    return values


def _config(values: dict[str, Any], folder: Path) -> LingConfig:
    block_size(values, folder)
    if not values.get("architectures"):
        raise ConfigError(f'{folder / "config.json"} names no "architectures"; Ling 2.0 says ["BailingMoeV2ForCausalLM"]')
    try:
        # Weights are dequantised on the way in: the model in memory has nothing to say about blocks.
        config = LingConfig.from_dict({name: value for name, value in values.items() if name != "quantization_config"})
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{folder / 'config.json'}: {reason}") from None
    config._name_or_path = str(folder)
    return config


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} points outside its folder")
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:3]) or 'weights'}; only safetensors weights are read")
    return tuple(folder / name for name in names)


def _header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, once its length is what its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file} is truncated or no safetensors file: {size:,} bytes")
        try:
            entries: dict[str, Any] = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise CheckpointError(f"{file} has a damaged safetensors header") from None
    entries.pop("__metadata__", None)
    needed = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != needed:
        raise CheckpointError(f"{file} is truncated: {size:,} bytes found, its header promises {needed:,}")
    return {name: _stored(file, name, entry, 8 + length) for name, entry in entries.items()}


def _stored(file: Path, name: str, entry: Mapping[str, Any], base: int) -> Stored:
    start, stop = entry["data_offsets"]
    tensor = Stored(file, entry["dtype"], tuple(entry["shape"]), base + start, base + stop)
    size = ITEM_BYTES.get(tensor.dtype)
    if start < 0 or (size is not None and stop - start != size * math.prod(tensor.shape)):
        raise CheckpointError(f"{file}: {name} has {stop - start} bytes for {tensor.dtype} {list(tensor.shape)}; it is damaged")
    return tensor


def _leave_out_next_token_layers(config: LingConfig, stored: Mapping[str, Stored]) -> None:
    """Let ``num_hidden_layers`` count decoder layers only: Ring checkpoints count next-token-prediction layers inside it."""
    nextn = sorted(int(match[1]) for name in stored if (match := _NEXTN.match(name)))
    if nextn and nextn[0] < config.num_hidden_layers:
        config.num_hidden_layers = nextn[0]
    config.num_nextn_predict_layers = len(nextn)


def _check_tensors(config: LingConfig, stored: Mapping[str, Stored], folder: Path) -> None:
    expected = expected_shapes(config)
    if missing := [name for name in expected if name not in stored]:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}")
    if wrong := [name for name, shape in expected.items() if stored[name].shape != shape]:
        name = wrong[0]
        raise CheckpointError(f"{folder}: {name} is {list(stored[name].shape)}; config.json asks for {list(expected[name])}")
    layers = {int(match[1]) for name in stored if (match := _LAYER.match(name))}
    allowed = config.num_hidden_layers + config.num_nextn_predict_layers
    if layers and max(layers) >= allowed:
        raise CheckpointError(f"{folder} holds layer {max(layers)}; config.json counts {allowed} layers")
