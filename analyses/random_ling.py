"""A Ling that never learned anything, in the shape of ling-tiny and with its tokenizer: what findings are to be compared with.

    python analyses/random_ling.py OUT [--std 0.02] [--bias 0.05] [--seed 0]
    python analyses/random_ling.py OUT --spread [--seed 0]

Weights are drawn as a model is initialised, and the bias of the routers beside them, for a bias of 0 would test nothing. With
--spread every matrix of ling-tiny is drawn anew with its own standard deviation; norms and bias stay as they were trained.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ling_probe.errors import LingProbeError, UsageError
from ling_probe.model import LingForCausalLM
from ling_probe.model.files import SHIPPED, find_checkpoint
from ling_probe.model.modeling import gates
from ling_probe.train import save

TRAINED = SHIPPED / "ling-tiny"


def initialised(out: Path, std: float, bias: float, seed: int) -> None:
    config = find_checkpoint("ling-tiny").config
    config.initializer_range = std
    torch.manual_seed(seed)
    model = LingForCausalLM(config).eval()
    for gate in gates(model).values():
        gate.expert_bias.normal_(0, bias)
    save(model, AutoTokenizer.from_pretrained(TRAINED), out)


def redrawn(out: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    out.mkdir(parents=True)
    for path in sorted(path for path in TRAINED.iterdir() if path.is_file()):
        if path.suffix != ".safetensors":
            shutil.copy(path, out)
            continue
        drawn = {
            name: (torch.randn(old.shape, generator=generator) * old.float().std()).to(old.dtype) if old.ndim > 1 else old
            for name, old in load_file(path).items()
        }
        save_file(drawn, out / path.name, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--std", type=float, default=0.02, help="of the weights")
    parser.add_argument("--bias", type=float, default=0.05, help="standard deviation of the routers' bias")
    parser.add_argument("--spread", action="store_true", help="ling-tiny's matrices drawn anew, each as spread as it was")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    try:
        if asked.out.exists():
            raise UsageError(f"{asked.out} exists already; name a new folder")
        if asked.spread:
            redrawn(asked.out, asked.seed)
        else:
            initialised(asked.out, asked.std, asked.bias, asked.seed)
    except LingProbeError as error:
        sys.stderr.write(f"random_ling: {error}\n")
        raise SystemExit(2) from None
    sys.stdout.write(f"saved to {asked.out}\n")


if __name__ == "__main__":
    main()
