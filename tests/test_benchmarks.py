"""The figures that are published: what is counted, what is refused, and the memory that is promised."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import gate, report
from benchmarks.cases import IMPLEMENTATIONS, Problem
from grjca.eager import GatedRJCAEager
from grjca.measure import SHAPES, Shape, alternate, saved_bytes
from grjca_kernels import GatedRJCAFused, backends

SMALL = Shape(9, 6, 5, 2, 3, "flat", normalize=True)


def test_saved_bytes():
    x = torch.randn(10, 4, requires_grad=True)
    weight = torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: x + 1) == 0
    assert saved_bytes(lambda: x.exp()) == 160  # its result
    assert saved_bytes(lambda: x.sin() + x.cos()) == 160  # x, once
    assert saved_bytes(lambda: x[:2].sin()) == 160  # a view keeps all of it alive
    assert saved_bytes(lambda: x @ weight) == 160 + 64
    assert saved_bytes(lambda: x @ weight.t(), [weight]) == 160
    assert saved_bytes(lambda: x.exp().exp()) == 320
    with torch.no_grad():
        assert saved_bytes(lambda: x.exp()) == 0


def test_saved_bytes_leaves_backward_intact():
    x = torch.randn(5, requires_grad=True)
    results = []
    saved_bytes(lambda: results.append(x.exp()))
    results[0].sum().backward()
    assert torch.equal(x.grad, x.exp())


def test_alternate():
    order = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert all(len(of_call) == 2 and min(of_call) >= 0 for of_call in times.values())


@pytest.mark.skipif(backends()["cpu"] is not None, reason="the promise is that of the kernels")
@pytest.mark.parametrize(("name", "ratio"), [("abaw", 6), ("clip", 20)])
def test_memory_that_is_promised(name, ratio):
    """The share of the activations; every one of them grows with B, so a small B will do."""
    shape = replace(SHAPES[name], batch=2)
    inputs = shape.inputs(0, requires_grad=True)
    saved = {}
    for kind in (GatedRJCAEager, GatedRJCAFused):
        block = shape.block(kind)
        saved[kind] = saved_bytes(lambda block=block: block(*inputs), block.parameters())
    assert saved[GatedRJCAFused] * ratio <= saved[GatedRJCAEager]
    frames = shape.batch * shape.length * (shape.dim_visual + shape.dim_audio) * 4
    assert saved[GatedRJCAFused] <= (1 + shape.iterations) * frames + 8  # X^0 to X^T and the seed of the masks


@pytest.mark.parametrize("gating", ["none", "dynamic", "flat", "hierarchical"])
@pytest.mark.parametrize("normalize", [False, True])
def test_eager_is_the_reference(gating, normalize):
    """In float64, where a mistake cannot hide behind rounding."""
    problem = Problem(replace(SMALL, gating=gating, normalize=normalize, iterations=3))
    results = [
        gate.run(problem.block(kind, dropout=0.0, dtype=torch.float64, **options), problem, torch.float64)
        for kind, options in ((GatedRJCAEager, {}), (GatedRJCAFused, {"backend": "reference"}))
    ]
    torch.testing.assert_close(results[0].output, results[1].output, rtol=0, atol=1e-12)
    for kind, vector in results[1].gradients.items():
        torch.testing.assert_close(results[0].gradients[kind], vector, rtol=0, atol=1e-11 * float(vector.abs().max()))


def test_gate_lets_right_ones_pass():
    problem = Problem(SMALL)
    for name in ("eager", "fused"):
        gate.check_forward(IMPLEMENTATIONS[name](problem), problem)
        gate.check_training(IMPLEMENTATIONS[name](problem, dropout=0.0), problem)
    gate.check_training(IMPLEMENTATIONS["fused"](problem, dropout=0.6), problem, 0.6)


class Slightly(torch.autograd.Function):
    """Multiplies the value, or the gradient, by nearly 1."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.gradient = gradient
        return x * value

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.gradient, None, None


@pytest.mark.parametrize(("value", "gradient"), [(1.0001, 1.0), (1.0, 1.0001), (float("nan"), 1.0)])
def test_gate_fails_wrong_ones(value, gradient):
    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio):
            return Slightly.apply(super().forward(visual, audio), value, gradient)

    problem = Problem(SMALL)
    with pytest.raises(AssertionError, match="is allowed"):
        gate.check_training(problem.block(Wrong, dropout=0.0), problem)
    if value != 1:
        with pytest.raises(AssertionError, match="output"):
            gate.check_forward(problem.block(Wrong), problem)


def test_gate_fails_other_masks():
    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio):
            torch.rand(1)
            return super().forward(visual, audio)

    problem = Problem(SMALL)
    with pytest.raises(AssertionError, match="is allowed"):
        gate.check_training(problem.block(Wrong, dropout=0.6), problem, 0.6)


# ---- report


def case(implementation, times, **extra):
    described = {"device": "A CPU (R)", "threads": 2, "dtype": "float32", "torch": "2", "commit": "abc"}
    return {
        "stats": {"data": times},
        "extra_info": {
            "shape": "abaw",
            "batch": 12,
            "pass": "step",
            "implementation": implementation,
            **described,
            **extra,
        },
    }


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A repository in which the report can write, and a file of pytest-benchmark."""
    measured = tmp_path / "measured.json"
    cases = [case("eager", [0.3, 0.1, 0.2], saved_bytes=6_000_000), case("fused", [0.1, 0.1], saved_bytes=1_000_000)]
    measured.write_text(json.dumps({"benchmarks": cases}))
    for name, path in (("ROOT", tmp_path), ("RESULTS", tmp_path / "results"), ("README", tmp_path / "README.md")):
        monkeypatch.setattr(report, name, path)
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    return tmp_path, measured


def test_report(published):
    folder, measured = published
    assert report.main([str(measured)]) == 0
    rows = json.loads((folder / "results" / "a-cpu-r-2-threads.json").read_text())
    assert [(row["implementation"], row["ms"], row["rounds"]) for row in rows] == [("eager", 200, 3), ("fused", 100, 2)]
    assert rows[0]["ms_p20"] == 140 and rows[0]["ms_p80"] == 260 and rows[0]["commit"] == "abc"
    text = (folder / "README.md").read_text()
    assert "| abaw, B = 12 | step | 200 |  | 100 | 2.0x |  | 6 | 1 |" in text
    assert text.startswith("before\n<!-- results -->\n") and text.endswith("\n<!-- /results -->\nafter\n")
    assert "old" not in text


def test_report_check(published, capsys):
    folder, measured = published
    report.main([str(measured)])
    assert report.main(["--check"]) == 0
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("200", "20"))
    assert report.main(["--check"]) == 1
    assert "| 20 |" in readme.read_text()  # a check repairs nothing
    readme.write_text("no markers")
    assert report.main(["--check"]) == 1
    readme.unlink()
    assert report.main(["--check"]) == 1
    assert "README.md" in capsys.readouterr().err
