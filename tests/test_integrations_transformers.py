"""Models of the transformers library before and after `apply`: the same numbers, copies, reports, errors."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers_models import DENSE, EXPERTS, assert_same, build, calls, mlp, needs_stacked_experts, results, tokens

import bilinear_ops as bo
from bilinear_ops.integrations.transformers import apply, revert

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("kind", DENSE)
def test_dense_models_compute_the_same(kind, recompute, monkeypatch):
    model, ids = build(kind), tokens()
    before, keys, original = results(model, ids), list(model.state_dict()), type(mlp(model))
    report = apply(model, recompute=recompute)
    assert [e.status for e in report] == ["patched"] * 2 and str(report).count("patched") == 2
    seen = calls(monkeypatch)
    assert_same(results(model, ids), before)
    assert len(seen) == 2
    assert list(model.state_dict()) == keys
    assert isinstance(mlp(model), original) and type(mlp(model)).__name__ == original.__name__
    assert [e.status for e in revert(model)] == ["reverted"] * 2
    assert type(mlp(model)) is original and not [k for k in vars(mlp(model)) if "bilinear" in k]
    after = results(model, ids)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert not revert(model)


@needs_stacked_experts
@pytest.mark.parametrize("products", ("grouped_mm", "batched_mm"))
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_compute_the_same(kind, products, monkeypatch):
    model, ids = build(kind), tokens()
    model.set_experts_implementation(products)
    before, keys = results(model, ids), list(model.state_dict())
    report = apply(model)
    kinds = [type(m).__name__ for m in model.modules() if "bilinear" in "".join(vars(m))]
    assert [e.kind for e in report.of("patched")] == kinds and len(kinds) == (4 if kind == "qwen2_moe" else 2)
    gates = [e.reason for e in report if e.kind.endswith("Experts")]
    assert gates == [EXPERTS[kind]["gate"]] * 2
    seen: list[int] = []
    op = bo.gated.gate_op
    monkeypatch.setattr(bo.gated, "gate_op", lambda *args: seen.append(1) or op(*args))
    assert_same(results(model, ids), before)
    assert len(seen) == 2 and list(model.state_dict()) == keys
    expected = model(ids).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, expected)
    assert len(seen) == 8
    if kind != "gpt_oss":
        model.model.layers[0].mlp.experts.act_fn.register_forward_hook(lambda m, args, out: 2 * out)
        model(ids)
        assert len(seen) == 9
        model.model.layers[0].mlp.experts.act_fn._forward_hooks.clear()
    revert(model)
    after = results(model, ids)
    assert all(torch.equal(after[n], t) for n, t in before.items())


@needs_stacked_experts
def test_experts_whose_gate_is_out_of_reach_are_left_alone():
    model = build("mixtral")
    model.set_experts_implementation("eager")
    assert {e.status for e in apply(model)} == {"left alone"}
    model.set_experts_implementation("grouped_mm")
    experts = model.model.layers[0].mlp.experts
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, -1)[0]
    assert [e.status for e in apply(model)] == ["left alone", "patched"]


@pytest.mark.parametrize("kind", (*DENSE, *(pytest.param(kind, marks=needs_stacked_experts) for kind in EXPERTS)))
def test_half_precision_is_no_worse(kind):
    model, ids = build(kind), tokens(48)
    if kind in EXPERTS:
        model.set_experts_implementation("grouped_mm")
    gold = copy.deepcopy(model).double()(ids).logits
    errors = []
    half = model.bfloat16()
    for _ in range(2):
        errors.append((half(ids).logits.double() - gold).square().mean().sqrt())
        apply(half) if len(errors) == 1 else None
    assert 0 < errors[1] <= 1.5 * errors[0]


def test_copies_stay_patched(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    model, ids = build("llama"), tokens()
    apply(model, recompute=True)
    expected, seen = model(ids).logits, calls(monkeypatch)
    for copied in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, expected)
        assert type(mlp(copied)) is type(mlp(model))
        assert vars(mlp(copied))["_bilinear_ops"] == vars(mlp(model))["_bilinear_ops"]
    assert len(seen) == 6
    other = copy.deepcopy(model)
    nn.init.zeros_(mlp(other).down_proj.weight)
    assert not torch.equal(other(ids).logits, expected) and torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(ids).logits, revert(model) and model(ids).logits)


@pytest.mark.filterwarnings("default::UserWarning")
def test_reports_and_errors():
    model = build("llama")
    with pytest.raises(ValueError, match="impl must be one of auto, triton, torch, got 'cuda'"):
        apply(model, impl="cuda")
    with pytest.raises(TypeError, match="unexpected keyword argument 'fast'"):
        apply(model, fast=True)
    with pytest.raises(ValueError, match="Linear has no gated MLP"):
        apply(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        apply({})
    apply(model)
    kind = type(mlp(model))
    with pytest.warns(UserWarning, match="nothing was patched:\nalready patched: model.layers.0.mlp"):
        again = apply(model)
    assert [e.status for e in again] == ["already patched"] * 2 and type(mlp(model)) is kind
    unknown = build("llama", hidden_act="leaky_relu")
    with pytest.warns(UserWarning, match="LeakyReLU, not one activation of the table"):
        assert not apply(unknown).of("patched")
