"""What a call costs beside its kernel: that it is measured, and that nothing is left out of it."""

import pytest
import torch

from benchmarks import host
from grjca_kernels import native

pytestmark = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))


def test_it_shows_every_row_and_keeps_none_of_so_few_turns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host, "FOLDER", tmp_path)
    assert host.main(["--turns", "2"]) == 0
    shown = capsys.readouterr().out
    for name in (host.UNIT, host.FLOOR, *host.GATINGS, host.LARGE, *host.gpu_rows()):
        assert f"\n| {name} | " in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("row", host.gpu_rows())
def test_a_row_of_a_gpu_launches_once(row):
    call = host.gpu_rows()[row]
    with host.pretended_gpu() as launched:
        for calls in range(1, 4):
            call()
            assert len(launched) == calls
    assert torch.empty(3).shape == (3,)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_from_the_second_call_on_triton_is_given_addresses(direction):
    pytest.importorskip("triton", minversion="3.6")
    call = host.gpu_rows()[f"Triton, {direction}"]
    with host.pretended_gpu() as launched:
        for _ in range(3):
            call()
    (first, options), *later = launched
    assert options and not any(options for _, options in later)
    assert len(tensors_in(first)) >= 36 and not any(tensors_in(arguments) for arguments, _ in later)
    assert all(kept(arguments) == [address(x) for x in kept(first)] for arguments, _ in later)


def kept(arguments):
    """All but the counter of the barrier, which every call makes anew."""
    return flat((*arguments[:5], *arguments[6:]))


def flat(arguments):
    """The leaves of nested tuples, without the constants, which are one object."""
    if isinstance(arguments, tuple):
        return [leaf for part in arguments for leaf in flat(part)]
    return [arguments]


def tensors_in(arguments):
    return [x for x in flat(arguments) if isinstance(x, torch.Tensor)]


def address(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x
