"""A model of the transformers library made bilinear: the schedule, the fold, and what the library loads afterwards."""

import copy

import pytest
import torch
from torch import nn
from transformers_models import DENSE, add_hook, build, calls, mlp, results, tokens

from bilinear_ops.integrations.transformers import Bilinearisation, apply, bilinearise, gated_weights
from bilinear_ops.nn.annealing import Swish

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SILU = [kind for kind in DENSE if "gemma" not in kind]


@pytest.mark.parametrize("kind", SILU)
def test_a_bilinear_model_that_the_library_loads(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = build(kind), tokens()
    before, keys = model(ids).logits, list(model.state_dict())
    annealing = bilinearise(model, steps=10)
    torch.testing.assert_close(model(ids).logits, before)
    shown = f"Bilinearisation({type(model).__name__}, {model.config.num_hidden_layers} MLPs, "
    assert repr(annealing) == f"{shown}beta=1, steps=10)"
    assert annealing.beta == 1.0 and annealing(1) == pytest.approx(annealing.beta) == pytest.approx(2 / 3)
    assert not torch.allclose(model(ids).logits, before)
    assert annealing(3) == 0.0
    annealed, down = model(ids).logits, mlp(model).down_proj.weight.clone()
    assert annealing.fold() is model and repr(annealing) == f"{shown}folded, steps=10)"
    torch.testing.assert_close(model(ids).logits, annealed)
    assert torch.equal(mlp(model).down_proj.weight, down / 2) and list(model.state_dict()) == keys
    assert gated_weights(model, 0, fold_norm=False).activation == "identity"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="must have a module for silu as its activation, got .*identity"):
        bilinearise(loaded)


@pytest.mark.parametrize("first", ("apply", "bilinearise"))
def test_patched_models_are_annealed_by_the_op(first, monkeypatch):
    model, ids = build("llama"), tokens()
    if first == "apply":
        apply(model)
    annealing = bilinearise(model, steps=10)
    if first == "bilinearise":
        assert {e.reason for e in apply(model)} == {"activation='swish', beta='annealed'"}
    twin = build("llama")
    other, seen = bilinearise(twin, steps=10), calls(monkeypatch)
    for step in (0, 2, 3):
        annealing(step), other(step)
        for name, t in results(twin, ids).items():
            torch.testing.assert_close(results(model, ids)[name], t, msg=name)
    assert gated_weights(model, 0).beta == 0.0 and gated_weights(model, 0).activation == "swish"
    annealing.fold(), other.fold()
    count = len(seen)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits)
    assert len(seen) == count + 2


def test_adapters_train_while_the_slope_falls():
    """What is attached later meets the same activation: the slope is no matter of a patch."""
    peft = pytest.importorskip("peft")
    model, ids = build("llama"), tokens()
    annealing = bilinearise(model, steps=10)
    apply(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], r=2, init_lora_weights=False))
    found = [adapted(ids).logits for step in (0, 1) if annealing(step)]
    assert not torch.allclose(*found)
    annealing(3)
    with pytest.raises(ValueError, match="is no longer a plain MLP: up_proj is a peft.*, not a torch.nn.Linear"):
        annealing.fold()
    expected = adapted(ids).logits
    merged = adapted.merge_and_unload()
    annealing.fold()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_compiled_models_are_annealed_without_a_recompilation():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, ids, counter = build("llama", num_hidden_layers=1), tokens(), CompileCounter()
    annealing = bilinearise(model, steps=10)
    apply(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(4):
        annealing(step)
        torch.testing.assert_close(
            compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5
        )
    assert counter.frame_count == 1


def test_the_library_trains_it(tmp_path):
    """The slopes that a Trainer's steps meet are those of the schedule, when it resumes, too."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    ids = tokens()
    data = [{"input_ids": row, "labels": row} for row in ids.repeat(20, 1)]
    seen: list[float] = []

    def trainer(model: nn.Module, fraction: float = 0.5, **options) -> tuple[Trainer, Bilinearisation]:
        annealing = bilinearise(model, fraction=fraction)
        mlp(model).act_fn.register_forward_pre_hook(lambda m, args: seen.append(round(m.beta.item(), 4)))
        arguments = TrainingArguments(
            str(tmp_path), **{"max_steps": 8, **options}, per_device_train_batch_size=2, report_to=[], use_cpu=True
        )
        return Trainer(model, arguments, train_dataset=data, callbacks=[annealing.trainer_callback()]), annealing

    model = build("llama")
    training, annealing = trainer(model, save_steps=3)
    training.train()
    assert seen == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0] and annealing.beta == 0
    expected = model(ids).logits
    seen.clear()
    again = build("llama")
    training, annealing = trainer(again)
    training.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert seen == [0.25, 0.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(again(ids).logits, expected)
    torch.testing.assert_close(annealing.fold()(ids).logits, expected)
    training, annealing = trainer(build("llama"), fraction=1.0, max_steps=2)
    training.train()
    assert annealing.beta == 0  # after the last step


def test_what_is_refused_stays_as_it_was():
    model = build("llama")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got NoneType"):
        bilinearise(None)
    with pytest.raises(ValueError, match="Linear has no gated MLP"):
        bilinearise(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 2"):
        bilinearise(model, fraction=2)
    with pytest.raises(ValueError, match="LlamaModel.*no configuration|LlamaMLP has no configuration"):
        bilinearise(mlp(model))
    for other, why in (
        (build("gemma2"), "must have a module for silu as its activation"),
        (build("llama", hidden_act="leaky_relu"), "is not a gated MLP of the ops"),
    ):
        kind = type(mlp(other).act_fn)
        with pytest.raises(ValueError, match=why):
            bilinearise(other)
        assert type(mlp(other).act_fn) is kind
    annealing = bilinearise(model)
    with pytest.raises(ValueError, match="steps was not given"):
        annealing(0)
    with pytest.raises(ValueError, match="only a slope of 0 can be folded, got 1"):
        annealing.fold()
    annealing = bilinearise(build("llama"), steps=1)
    annealing(1)
    last = [m for m in annealing.model.modules() if isinstance(m, Swish)][-1]
    last.beta.fill_(0.5)
    with pytest.raises(ValueError, match="only a slope of 0 can be folded, got 0.5 in model.layers.1.mlp"):
        annealing.fold()
    last.beta.zero_()
    add_hook(mlp(annealing.model))
    weight = mlp(annealing.model).down_proj.weight.clone()
    with pytest.raises(ValueError, match="is no longer a plain MLP: up_proj has hooks"):
        annealing.fold()
    assert torch.equal(mlp(annealing.model).down_proj.weight, weight)


def test_experts_are_refused():
    pytest.importorskip("transformers", minversion="5")
    for kind in ("mixtral", "qwen2_moe"):
        with pytest.raises(ValueError, match="holds experts"):
            bilinearise(build(kind))


def test_an_activation_that_others_use_is_refused():
    """The library's model could not be built with linear MLPs alone."""
    model = build("llama")
    original = type(model)

    class WithHead(original):
        def __init__(self, config):
            from transformers.activations import ACT2FN

            super().__init__(config)
            self.head_act = ACT2FN[config.hidden_act]

    other = WithHead(model.config)
    with pytest.raises(ValueError, match="names that of head_act, too"):
        bilinearise(other)


def test_a_copy_keeps_the_original():
    model, ids = build("llama"), tokens()
    before = model(ids).logits
    annealing = bilinearise(copy.deepcopy(model), steps=1)
    annealing(1)
    annealing.fold()
    assert torch.equal(model(ids).logits, before) and model.config.hidden_act == "silu"
