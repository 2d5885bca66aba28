"""The official code's recorded outputs, and what a test needs to compare with them."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ling_probe.model  # noqa: F401  (registers the native classes)
from ling_probe.model.modeling import gates

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("tiny-base", "tiny-tied")
CASES = ("unpadded", "lpad", "rpad")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def reference(name):
    return load_file(FIXTURES / name / "reference.safetensors")


def load(name, dtype="fp32", *, experts="grouped_mm", attention="eager", folder=None):
    return AutoModelForCausalLM.from_pretrained(
        folder or FIXTURES / name, dtype=DTYPES[dtype], attn_implementation=attention, experts_implementation=experts
    ).eval()


@torch.no_grad()
def run(model, inputs, mask=None):
    """Next-token logits, and what every gate returned by layer."""
    seen = {}
    handles = [
        gate.register_forward_hook(lambda _g, _a, out, layer=layer: seen.__setitem__(layer, out))
        for layer, gate in gates(model).items()
    ]
    logits = model(input_ids=inputs, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    return logits, seen
