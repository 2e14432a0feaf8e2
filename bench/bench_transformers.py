"""The training step of a Llama of the transformers library: as it is, patched by `apply`, patched with recompute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.workload import Contender, Run, Tensors, Workload, has
from bilinear_ops.integrations.transformers import apply

VOCABULARY, HEAD = 512, 64  # a vocabulary so small that logits do not hide the MLPs
SHAPES = {  # (tokens, d, h, layers)
    ("cpu", "tiny"): (12, 64, 96, 2),
    ("cpu", "quick"): (256, 128, 512, 2),
    ("cpu", "full"): (2048, 512, 2048, 4),
}


def workloads(device: torch.device, size: str, impl: str = "auto") -> Iterator[Workload]:
    """On the CPU only, and only where the transformers library is installed."""
    if device.type == "cpu" and has("transformers"):
        yield _step(impl, *SHAPES[device.type, size])


def _step(impl: str, m: int, d: int, h: int, layers: int) -> Workload:
    weights = layers * (4 * d * d + 3 * d * h) + VOCABULARY * d  # that multiply every token
    elements = weights + (2 * layers + 1) * d + VOCABULARY * d  # and norms, and the embedding
    attention = layers * m * m * d  # multiply-adds of the scores and of their product with v: half are masked
    return Workload(
        op="llama",
        case="step",
        shape={"m": m, "d": d, "h": h, "layers": layers},
        dtype=torch.float32,
        inputs=lambda seed: _inputs(seed, m, d, h, layers),
        reference=lambda *inputs: _training_step(_model(d, h, layers), *inputs),
        ours=_patched(d, h, layers, impl=impl),
        baselines={"eager": lambda *inputs: _training_step(_model(d, h, layers), *inputs)},
        flops=6 * (m * weights + attention),  # backward has two products for each of the forward's
        bytes=8 * m + 2 * 4 * elements + 4,
        variants={"recompute": _patched(d, h, layers, impl=impl, recompute=True)},
    )


def _model(d: int, h: int, layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = d // HEAD
    sizes: dict[str, Any] = dict(hidden_size=d, intermediate_size=h, num_hidden_layers=layers, vocab_size=VOCABULARY)
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads, use_cache=False)
    return LlamaForCausalLM(config)


def _inputs(seed: int, m: int, d: int, h: int, layers: int) -> Tensors:
    """Words `[1, m]` and a model's parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = torch.randint(VOCABULARY, (1, m))
        return words, *(p.detach() for p in _model(d, h, layers).parameters())


def _patched(*sizes: int, **options: Any) -> Contender:
    def build(*inputs: Tensor) -> Run:
        model = _model(*sizes)
        apply(model, **options)
        return _training_step(model, *inputs)

    return build


def _training_step(model: nn.Module, words: Tensor, *parameters: Tensor) -> Run:
    """The loss of predicting each next word, and its gradient in every parameter."""
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict(dict(zip(names, parameters, strict=True)), assign=True)
    leaves = list(model.requires_grad_().parameters())

    def run() -> Tensors:
        loss = model(words, labels=words).loss
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return run
