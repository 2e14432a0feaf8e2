"""Tiny random models of the transformers library, built offline, and what a training step of one gives."""

import os
from importlib.metadata import version

import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")

import bilinear_ops as bo

needs_stacked_experts = pytest.mark.skipif(version("transformers") < "5", reason="experts are not stacked")

SIZES = dict(
    hidden_size=24,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=12,
    vocab_size=53,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
DENSE = {
    "llama": {},
    "llama with biases": {"mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "glm4": {},
    "olmo2": {},
    "granite": {},
}

FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
EXPERTS = {
    "mixtral": {"options": {"num_local_experts": 4}, "gate": "activation='silu'"},
    "qwen2_moe": {"options": {"num_experts": 4, **FEW}, "gate": "activation='silu'"},
    "qwen3_moe": {"options": {"num_experts": 4, **FEW}, "gate": "activation='silu'"},
    "gpt_oss": {  # a limit that its activations reach
        "options": {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0.02},
        "gate": "activation='swish', beta=1.702, limit=0.02, offset=1.0",
    },
}


def build(kind: str, **options) -> nn.Module:
    """A tiny random model of this library's model type."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import CONFIG_MAPPING

    torch.manual_seed(0)
    own = DENSE[kind] if kind in DENSE else EXPERTS[kind]["options"]
    config = CONFIG_MAPPING[kind.split()[0]](**{**SIZES, **own, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for p in model.parameters():
        if p.dim() == 1:  # biases and norms do something
            p.data += 0.2 * torch.randn_like(p)
    return model


def tokens(length: int = 9) -> Tensor:
    return torch.randint(3, 53, (2, length))


def results(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The logits and every gradient of a training step."""
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return {"logits": out.logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert (ours[name] - t).abs().max() <= 1e-5 * t.abs().max(), name


def calls(monkeypatch) -> list[int]:
    """Grows with every run of the op."""
    seen: list[int] = []
    op = bo.gated.gated_op
    monkeypatch.setattr(bo.gated, "gated_op", lambda *args: seen.append(1) or op(*args))
    return seen


def mlp(model: nn.Module) -> nn.Module:
    return model.model.layers[0].mlp


def add_hook(module: nn.Module) -> None:
    module.up_proj.register_forward_hook(lambda m, args, out: 2 * out)
