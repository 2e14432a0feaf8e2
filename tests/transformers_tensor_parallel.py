"""What every rank of test_integrations_tensor_parallel.py runs: a model that the library itself shards, and `apply`."""

import sys
import warnings

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from bilinear_ops.integrations.transformers import apply


def main(folder: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    sharded = model.model.layers[0].mlp.up_proj.weight
    assert getattr(sharded, "to_local", lambda: sharded)().shape[0] == whole.config.intermediate_size // 2
    ids = torch.arange(3, 12).view(1, 9)
    before = model(ids).logits
    torch.testing.assert_close(before, whole(ids).logits, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = apply(model)
    assert {e.status for e in report} == {"left alone"}, report
    assert any("nothing was patched" in str(w.message) for w in caught)
    assert torch.equal(model(ids).logits, before)
    if dist.get_rank() == 0:
        print(report)


if __name__ == "__main__":
    main(sys.argv[1])
