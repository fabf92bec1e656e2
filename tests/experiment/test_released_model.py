"""load_model agrees with the authors' full model, written as plain functions of their state_dict."""

import argparse
import os
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import mark
from safetensors.torch import save_file

from authors import FULL, SMALL, authors_model, checkpoint
from grjca.errors import UserError
from grjca.released import load_model
from tolerances import check_close, largest

TOLERANCE = 1e-12


def features(sizes, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, sizes["length"], sizes[m][0], generator=generator, dtype=torch.float64)
        for m in ("visual", "audio")
    ]


def load(source, **options):
    """Call load_model and check that it warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_model(source, **options)


def same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


# ---- the numbers


@torch.no_grad()
@mark.parametrize("backend", ["auto", "reference", "eager"])
@mark.parametrize("name", ["GRJCA", "HGRJCA"])
@mark.parametrize(
    "sizes",
    [
        SMALL,
        SMALL | {"iterations": 1},
        SMALL | {"iterations": 3, "length": 1},
        SMALL | {"visual": (3, 9), "audio": (1, 2, 1, 2, 1), "kernel": 1, "hidden": 1},
    ],
)
def test_outputs_are_theirs(sizes, name, backend):
    w, x = checkpoint(name, **sizes), features(sizes)
    model = load(w, backend=backend)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float64}
    expected = authors_model(w, name, *x)
    assert largest(expected) > 0.1
    check_close("values", model(*x), expected, TOLERANCE)


@torch.no_grad()
@mark.parametrize("backend", ["auto", "reference", "eager"])
@mark.parametrize("name", ["GRJCA", "HGRJCA"])
def test_outputs_of_shorter_ones_are_theirs(name, backend):
    w, x = checkpoint(name, **SMALL), features(SMALL)
    lengths = (8, 5, 1)
    for x_m in x:
        x_m[torch.arange(8) >= torch.tensor(lengths)[:, None]] = float("nan")
    values = load(w, backend=backend)(*x, torch.tensor(lengths))
    for b, n in enumerate(lengths):
        check_close(
            "values", values[b : b + 1, :n], authors_model(w, name, *(x_m[b : b + 1] for x_m in x), n), TOLERANCE
        )
        assert (values[b, n:] == 0).all()


@torch.no_grad()
@mark.parametrize("name", ["GRJCA", "HGRJCA"])
def test_outputs_at_full_size_are_theirs(name):
    w, x = checkpoint(name, **FULL), features(FULL, batch=2)
    model = load(w)
    check_close("values", model(*x), authors_model(w, name, *x), TOLERANCE)
    check_close("of 7 frames", model(*x, torch.tensor([7, 0]))[:1, :7], authors_model(w, name, *x, 7)[:1], TOLERANCE)


def test_the_model_here_has_their_parts():
    """Each key affects the outputs; otherwise equality would prove little."""
    w, x = checkpoint("HGRJCA", **SMALL, aliases=False), features(SMALL)
    before = authors_model(w, "HGRJCA", *x)
    for key, tensor in w.items():
        if not key.endswith("num_batches_tracked"):
            other = tensor + torch.linspace(0.5, 1, tensor.numel(), dtype=tensor.dtype).reshape(tensor.shape)
            assert not torch.equal(authors_model({**w, key: other}, "HGRJCA", *x), before), key


# ---- what is read


def test_what_is_read_from_the_shapes():
    model = load(checkpoint("HGRJCA", **SMALL, iterations=3))
    assert model.widths == {"visual": 7, "audio": 4} and model.length == 8
    block = model.fusion
    assert (block.dims, block.length, block.iterations, block.gating) == ((5, 3), 8, 3, "hierarchical")
    assert block.normalize and block.output == "concat" and block.temperature == 0.1
    assert [b.reach for b in model.encoders.visual.blocks] == [2, 4, 8] and len(model.encoders.audio.blocks) == 2
    assert load(checkpoint("GRJCA", **SMALL, iterations=1)).fusion.gating == "flat"


@mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@mark.parametrize("backend", ["auto", "eager"])
def test_dtype_is_kept(dtype, backend):
    w = checkpoint("GRJCA", **SMALL, dtype=dtype)
    model = load(w, backend=backend)
    assert {p.dtype for p in model.parameters()} == {dtype}
    x = [x.to(dtype) for x in features(SMALL)]
    values = model(*x, torch.tensor([8, 3, 0]))
    assert values.dtype == dtype and values.isfinite().all()


def test_weights_are_copied():
    w = checkpoint("GRJCA", **SMALL)
    before = {key: tensor.clone() for key, tensor in w.items()}
    model = load(w)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in w.items())
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())


def renamed(w, *pairs):
    for before, after in pairs:
        w = {key.replace(before, after): tensor for key, tensor in w.items()}
    return w


def prefixed(prefix, w):
    return {f"{prefix}{key}": tensor for key, tensor in w.items()}


def without_primaries(w):
    return {key: tensor for key, tensor in w.items() if ".conv" not in key}


NEW = (("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1"))
SPELLINGS = {
    "new weight_norm": lambda w: renamed(w, *NEW),
    "no aliases": lambda w: {key: tensor for key, tensor in w.items() if ".net." not in key},
    "aliases only": without_primaries,
    "aliases only, new weight_norm": lambda w: renamed(without_primaries(w), *NEW),
    "aliases that differ": lambda w: {key: tensor + 1 if ".net." in key else tensor for key, tensor in w.items()},
    "aliases first": lambda w: dict(reversed(w.items())),
    "DataParallel": lambda w: {f"module.{key}": tensor for key, tensor in w.items()},
    "state_dict": lambda w: {"epoch": 3, "state_dict": w},
    "model_state_dict": lambda w: {"optimizer": {"state": {}}, "model_state_dict": w},
    "model": lambda w: {"model": {f"module.{key}": tensor for key, tensor in w.items()}},
    **{
        f"within {name}": lambda w, name=name: {"epoch": 3, name: w}
        for name in ("net", "weights", "ema", "module", "x")
    },
    "within two": lambda w: {"checkpoint": {"model_ema": prefixed("module.", w)}, "scheduler": {"step": 3}},
    "torch.compile": lambda w: prefixed("_orig_mod.", w),
    "Lightning": lambda w: {"state_dict": prefixed("model.", w) | {"loss.weight": torch.ones(2)}, "loops": {}},
    "AveragedModel": lambda w: {"n_averaged": torch.tensor(5)} | prefixed("module.", w),
    "all of them": lambda w: {"net": {"n_averaged": torch.tensor(5)} | prefixed("model.module._orig_mod.module.", w)},
    "compiled in parts": lambda w: renamed(w, ("HGRJCA.", "HGRJCA._orig_mod."), ("l.video.", "l.video.module.")),
    "optimiser by names": lambda w: {"optimizer": {"state": {key: {"step": 3} for key in w}}, "net": w},
    "shapes": lambda w: {"module": w, "param_shapes": {key: tensor.shape for key, tensor in w.items()}},
}


@mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling, tmp_path):
    w = checkpoint("HGRJCA", **SMALL)
    expected, spelled = load(w), SPELLINGS[spelling](w)
    assert same(load(spelled), expected)
    torch.save(spelled, tmp_path / "model.pth")
    assert same(load(str(tmp_path / "model.pth")), expected)


def test_files(tmp_path):
    w = checkpoint("GRJCA", **SMALL)
    save_file({key: tensor.clone() for key, tensor in w.items()}, tmp_path / "model.safetensors")
    save_file(SPELLINGS["aliases only"](w), tmp_path / "aliases.SAFETENSORS")
    torch.save(w, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in sorted(tmp_path.iterdir()):
        assert same(load(path), load(w)), path


BESIDE = {
    "scalars": [
        np.float64(0.6),
        np.float32(0.5),
        np.int64(3),
        np.bool_(True),
        np.str_("x"),
        np.datetime64("2026-01-01"),
    ],
    "arrays": [np.zeros(3), np.arange(4).reshape(2, 2).T, np.array(["a", {}], dtype=object)],
    "dtypes": [np.dtype("f8"), np.dtype([("a", ">i4"), ("b", "O")])],
    "arguments": [argparse.Namespace(lr=np.float64(0.1), out=Path("run"))],
}


@mark.parametrize("zipped", [True, False])
@mark.parametrize("kind", BESIDE)
def test_what_scripts_save_beside_the_weights(kind, zipped, tmp_path):
    w, mine = checkpoint("GRJCA", **SMALL), [np.dtype, np.ndarray, Trap]
    torch.save({"best": BESIDE[kind], "net": w}, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    before = torch.serialization.get_safe_globals()
    for declared in ([], mine):
        torch.serialization.add_safe_globals(declared)
        try:
            assert same(load(tmp_path / "model.pth"), load(w))
            after = torch.serialization.get_safe_globals()
            assert {*after} >= {*before, *declared} and not any(
                "grjca" in repr(f.__mro__) for f in after if type(f) is type
            )
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)
    with pytest.raises(pickle.UnpicklingError):  # as ever outside
        torch.load(tmp_path / "model.pth", weights_only=True)


@mark.parametrize("core", ["core", "_core"])
def test_numpy_of_either_age(core, tmp_path):
    w = checkpoint("GRJCA", **SMALL)
    name = np.float64(0).__reduce__()[0].__module__.encode()
    torch.save({"ccc": np.float64(0.6), "net": w}, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "model.pth").read_bytes()
    assert name in content
    (tmp_path / "model.pth").write_bytes(content.replace(name, f"numpy.{core}.multiarray".encode()))
    assert same(load(tmp_path / "model.pth"), load(w))


def test_averaged_weights_are_not_taken_for_the_others():
    w, averaged = checkpoint("GRJCA", **SMALL), checkpoint("GRJCA", **SMALL)
    averaged["regressor2.bias"] = averaged["regressor2.bias"] + 1
    for source, places in (
        ({"model_ema": averaged, "model": w}, ("'model.'", "'model_ema.'")),
        (
            {"state_dict": prefixed("ema.module.", averaged) | prefixed("net.", w)},
            ("'state_dict.net.'", "'state_dict.ema"),
        ),
        (prefixed("averaged.", averaged) | w, ("''", "'averaged.'")),
    ):
        with pytest.warns(
            UserWarning, match=rf"under {places[0]}, and not the averaged ones under {places[1]}"
        ) as caught:
            assert same(load_model(source), load(w))
        assert len(caught) == 1 and "ignored" not in str(caught[0].message)
    with pytest.raises(
        UserError, match=r"weights of one model, got those of 2, under 'best\.' and 'last\.'; pass a dict"
    ):
        load({"best": w, "last": averaged})


def test_what_is_ignored_is_named_once():
    w = checkpoint("GRJCA", **SMALL)
    extra = [
        "temporal.bert.network.0.conv1.bias", "bn.bert.weight", "bn.bert.bias",
        "spatial.visual.net.0.weight", "spatial.visual.conv1.weight", "spatial.audio.bias",
        "GRJCA.text_gating_fc_layer.weight", "GRJCA.vregressor.0.weight", "GRJCA.Joint.weight_ih_l0",
        "aregressor.0.bias",
    ]  # fmt: skip
    with pytest.warns(UserWarning) as caught:
        model = load_model({**w, **dict.fromkeys(extra, torch.zeros(2)), "extra.bias": torch.zeros(1), "epoch": 3})
    assert same(model, load(w)) and len(caught) == 1 and caught[0].filename == __file__
    assert str(caught[0].message) == (
        "source: ignored keys without effect on the output: GRJCA.Joint.* (1 key), "
        "GRJCA.text_gating_fc_layer.* (1 key), GRJCA.vregressor.* (1 key), aregressor.* (1 key), "
        "bn.bert.* (2 keys), spatial.* (3 keys), temporal.bert.* (1 key); unknown: epoch, extra.bias."
    )


# ---- what is refused


KEYS = [key for key in checkpoint("HGRJCA", **SMALL, iterations=1) if ".net." not in key]


@mark.parametrize("key", KEYS)
def test_every_missing_key_is_named(key):
    w = checkpoint("HGRJCA", **SMALL, iterations=1, aliases=False)
    del w[key]
    with pytest.raises(UserError, match=rf"^source: .*{re.escape(key)}.* got no"):
        load(w)


@mark.parametrize("key", KEYS)
def test_every_wrong_shape_is_named(key):
    w = checkpoint("HGRJCA", **SMALL, iterations=1, aliases=False)
    for shape in ((*w[key].shape, 2), (0,) * w[key].dim(), () if w[key].dim() else (1,)):
        with pytest.raises(UserError, match=rf"^source: .*{re.escape(key)}.*: expected .*, got .*\.$"):
            load({**w, key: torch.zeros(shape)})


def test_encoders_that_do_not_fit_the_block():
    w = checkpoint("GRJCA", **SMALL)
    other = checkpoint("GRJCA", **SMALL | {"audio": (4, 3, 2)})
    with pytest.raises(UserError, match=r"expected encoders .* 5 and 3, got 5 and 2"):
        load({key: other[key] if key.startswith("temporal") else tensor for key, tensor in w.items()})


@mark.parametrize(
    "change, match",
    [
        (lambda w: {}, "GRJCA. or HGRJCA., got neither among 0 keys"),
        (lambda w: {"a": 1, "b": 2}, r"got neither among 2 keys \(a, b, \.\.\.\)"),
        (lambda w: w | {"HGRJCA.video_gating_fc_layer.weight": torch.zeros(1)}, "got GRJCA. and HGRJCA."),
        (lambda w: {key: tensor.numpy() for key, tensor in w.items()}, "GRJCA.*: expected a tensor .* got ndarray"),
        (lambda w: {"epoch": 1, "net": {"a": 1, "b": 2, "c": 3}}, r"got neither among 3 keys \(a, b, c, \.\.\.\)"),
        (lambda w: w | {"regressor1.weight": 3}, "regressor1.weight: expected a tensor .* got int"),
        (lambda w: w | {"regressor1.bias": torch.zeros(6).int()}, "regressor1.bias: expected a floating dtype, got"),
        (lambda w: w | {"temporal.video.network.9.conv1.bias": torch.zeros(1)}, "video.network.3.conv1.weight_v"),
        (lambda w: {k: v.to(torch.int64) for k, v in w.items()}, "in the fusion block, dtype: expected one of"),
    ],
)
def test_state_dicts_that_do_not_fit(change, match):
    with pytest.raises(UserError, match=match):
        load(change(checkpoint("GRJCA", **SMALL)))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@mark.parametrize("save", ["zip", "legacy", "pickle"])
def test_nothing_is_executed(save, tmp_path):
    path, sprung = tmp_path / "model.pth", tmp_path / "sprung"
    content = {"state_dict": checkpoint("GRJCA", **SMALL), "arguments": Trap(str(sprung))}
    if save == "pickle":
        path.write_bytes(pickle.dumps(Trap(str(sprung)), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "zip")
    with pytest.raises(UserError, match="nothing was loaded") as caught:
        load(path)
    assert str(path) in str(caught.value) and "mkdir" in str(caught.value)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(str(sprung))))
    assert sprung.exists()  # the trap is one


@mark.parametrize("name", ["model.pth", "model.safetensors", "legacy.pth"])
@mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_files(name, share, tmp_path):
    path, w = tmp_path / name, SPELLINGS["no aliases"](checkpoint("GRJCA", **SMALL))
    if name.endswith("pth"):
        torch.save(w, path, _use_new_zipfile_serialization=name == "model.pth")
    else:
        save_file(w, path)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(UserError, match=re.escape(str(path)) + ": expected a whole checkpoint, got a broken file"):
        load(path)


def test_other_sources(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello world")
    torch.save({key: w.numpy() for key, w in checkpoint("GRJCA", **SMALL).items()}, tmp_path / "numpy.pth")
    itself = {}
    itself["a"] = itself
    for source, error, match in (
        (tmp_path / "none.pth", UserError, "none.pth: expected a checkpoint, got no such file"),
        (tmp_path, UserError, "got no such file"),
        (tmp_path / "list.pth", UserError, "list.pth: expected a state_dict, got list"),
        (tmp_path / "numpy.pth", UserError, "expected a tensor of the authors' model, got a NumPy value"),
        (itself, UserError, "got neither among 1 keys"),
        (tmp_path / "text.pth", UserError, "text.pth: expected a whole checkpoint"),
        (3, TypeError, "source: expected a path or a state_dict, got int"),
    ):
        with pytest.raises(error, match=match):
            load(source)
