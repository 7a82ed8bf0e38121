"""Zeros around a map: PyTorch's padding and timm's, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import pad_same as pad_same_of_timm
from torch.nn import functional as F

from detection.models.fast import padding
from detection.models.fast.padding import framed, pad_same

ORDERS = st.sampled_from([torch.channels_last, torch.contiguous_format])
SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(sides=SIDES, frame=st.tuples(*[st.integers(0, 3)] * 4), channels=st.integers(1, 4), order=ORDERS)
def test_frames_are_those_of_pytorch(sides: Any, frame: Any, channels: int, order: torch.memory_format) -> None:
    x = torch.randn(2, channels, *sides).to(memory_format=order)
    found, wanted = framed(x, frame), F.pad(x, frame)
    assert torch.equal(found, wanted)
    if channels > 1 and min(sides) > 1:
        assert found.stride() == wanted.stride()
    part = torch.randn(2, channels, sides[0] + 2, sides[1] + 3).to(memory_format=order)[:, :, 1:-1, 2:-1]
    assert torch.equal(framed(part, frame), F.pad(part, frame))  # whose memory is no whole


@given(
    sides=SIDES, kernel=st.tuples(*[st.integers(1, 6)] * 2), stride=st.tuples(*[st.integers(1, 3)] * 2), order=ORDERS
)
def test_padding_and_gradients_are_timms(sides: Any, kernel: Any, stride: Any, order: torch.memory_format) -> None:
    x = torch.randn(2, 3, *sides).to(memory_format=order).requires_grad_()
    found, wanted = (pad(x, kernel, stride, (1, 1)) for pad in (pad_same, pad_same_of_timm))
    assert torch.equal(found, wanted)
    share = torch.randn_like(wanted)
    assert torch.equal(*(torch.autograd.grad(y, x, share)[0] for y in (found, wanted)))


def test_where_a_graph_is_made_it_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "framed", None)

    def padded(x: torch.Tensor) -> torch.Tensor:
        return pad_same(x, (3, 3), (2, 2), (1, 1))

    x = torch.randn(1, 2, 6, 6)
    traced = torch.jit.trace(padded, x, check_trace=False)
    assert torch.equal(traced(x), F.pad(x, (0, 1, 0, 1)))
    assert torch.equal(torch.compile(padded, backend="eager", fullgraph=True)(x), F.pad(x, (0, 1, 0, 1)))
