"""What a device computes by itself, and what PyTorch only emulates there."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

HALVES = {"bf16": torch.bfloat16, "16": torch.float16}  # as precisions are called


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has convolutions and products of matrices in a type, or PyTorch emulates it, many times slower.

    For bfloat16 a CPU needs AVX-512 or alike, as oneDNN tells, and an NVIDIA GPU compute capability 8.0. GPUs have
    float16, few CPUs do.

    Args:
        device: where.
        dtype: float32, bfloat16 or float16.
    """
    if dtype == torch.bfloat16 and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or dtype == torch.float32:
        return True
    half = "bf16" if dtype == torch.bfloat16 else "fp16"
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported")())


@cache
def has_avx512() -> bool:
    """Whether the CPU has AVX-512, and PyTorch oneDNN, whose kernels use it on every processor; MKL's do on Intel's."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def may_be_quick(x: Tensor) -> bool:
    """Whether what reads a tensor may run kernels of its own choice: in float32 on a CPU, and nobody looks inside.

    Autocast would change its precision, a compiler has choices of its own, and transforms of `torch.func` need to know
    each operation.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch._C._are_functorch_transforms_active()


def emulation(device: torch.device, dtype: torch.dtype, flag: str) -> str | None:
    """One sentence on a type that a device emulates, with what is faster; None where it does not.

    Args:
        device: where.
        dtype: of the network.
        flag: of the command that chooses it: `--trainer.precision`, or `--precision`.
    """
    if has_kernels(device, dtype):
        return None
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else "this processor"
    better = ("16" if is_gpu else "32") + ("-mixed" if is_gpu else "-true") * (flag == "--trainer.precision")
    half = str(dtype).removeprefix("torch.")
    return f"{name} has no {half}, which PyTorch emulates many times slower: {flag} {better} is faster"


def smaller_precision() -> str:
    """The `--trainer.precision` that takes least memory on this machine without being emulated, as advice; or nothing.

    Starts with a comma, to follow other advice.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for half, dtype in HALVES.items():
        if has_kernels(device, dtype):
            return f", or try --trainer.precision {half}-mixed"
    return ""
