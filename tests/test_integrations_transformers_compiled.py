"""Patched models under torch.compile, torch.export and generation."""

import pytest
import torch
from transformers_models import build, mlp, tokens

from bilinear_ops.integrations.transformers import apply
from bilinear_ops.testing import randn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize(("kind", "training"), (("llama", True), ("phi3", False)))
def test_compiles_whole_with_any_length(kind, training):
    """No graph break, and at most one compilation more over ten lengths."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = build(kind, num_hidden_layers=1), CompileCounter()
    apply(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(training):
        for length in range(4, 14):
            ids = tokens(length)
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert counter.frame_count <= 2


def test_export():
    module, x = mlp(build("llama")), randn(2, 5, 24)
    apply(module)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    assert "bilinear_ops.gated" in str(program.graph)
    y = randn(2, 7, 24)
    torch.testing.assert_close(program.module()(y), module(y))


def test_generation_with_a_static_cache():
    model, ids = build("llama"), tokens(5)
    options = dict(max_new_tokens=8, do_sample=False, cache_implementation="static", eos_token_id=None)
    expected = model.generate(ids, **options)
    apply(model)
    assert torch.equal(model.generate(ids, **options), expected) and expected.shape == (2, 13)
