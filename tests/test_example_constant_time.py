"""The constant-time example: its arithmetic on given times, and a small run that claims nothing."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("constant_time")
    sys.path.remove(str(ROOT / "examples"))


def rows(example, times, losses):
    return [example.Row(name, way, times[name], losses[name]) for name in example.ACTIVATIONS for way in example.MLPS]


def test_equal_time_buys_fewer_slow_steps(example):
    times = {"bilinear": 4.0, "ReGLU": 5.0, "SwiGLU": 8.0}
    extra = {"bilinear": 0.5, "ReGLU": 0.4, "SwiGLU": 0.0}
    falling = {name: [10.0 - 0.05 * i + extra[name] for i in range(100)] for name in times}
    table = {name: row for name, *row in example.compared(rows(example, times, falling), "our ops")}
    assert table["bilinear"][0] == 0.5 and table["SwiGLU"][0] == 1
    assert [table[name][2] for name in times] == [100, 80, 50]
    end = [sum(losses[-10:]) / 10 for losses in falling.values()]
    assert table["bilinear"][1] == pytest.approx(end[0] / end[2])
    assert table["bilinear"][3] == pytest.approx(end[0])
    assert table["SwiGLU"][3] == pytest.approx(sum(falling["SwiGLU"][45:50]) / 5)
    on_gpu = example.report(rows(example, times, falling), torch.device("cuda"))
    assert on_gpu.count("Least loss in equal time: bilinear.") == 2 and "Not an answer" not in on_gpu
    losing = falling | {"bilinear": [9.0] * 100}
    assert "in equal time: ReGLU." in example.report(rows(example, times, losing), torch.device("cuda"))


def test_a_quick_run_answers_nothing(example, capsys):
    text = example.main(["--quick"])
    assert capsys.readouterr().out == text + "\n"
    assert text.count("bilinear") == text.count("ReGLU") == 2 and text.count("SwiGLU") == 3
    assert "Least loss" not in text and "Not an answer" in text


def test_all_models_learn_and_both_ways_agree(example):
    found = {(row.activation, row.way): row.losses for row in example.measure(example.QUICK, torch.device("cpu"))}
    for activation in example.ACTIVATIONS:
        plain, ours = (torch.tensor(found[activation, way]) for way in example.MLPS)
        torch.testing.assert_close(plain, ours, rtol=1e-3, atol=1e-3)
        assert example.final_loss(ours.tolist(), len(ours)) < ours[0] - 0.1
    assert found["bilinear", "our ops"][-1] != found["SwiGLU", "our ops"][-1]


def test_a_cpu_is_refused(example, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        example.main([])
    assert "the question is about GPUs" in capsys.readouterr().err
