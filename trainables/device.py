"""What a trial computes on: its device, the precision there, and the layout in which convolutions are fast."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from explain.maps import multiplies_bf16
from trainables.errors import UserError
from trainables.settings import Precision, TrialSettings

Network = TypeVar("Network", bound=nn.Module)


class DeviceError(UserError):
    """A device was asked for that this machine does not have."""


class OutOfMemoryError(UserError):
    """The memory of the device does not suffice for a trial."""


def resolve_device(device: str = "auto") -> torch.device:
    """Return the device of a name; ``auto`` is CUDA, else Apple's MPS, else the CPU.

    Raises:
        DeviceError: if the machine does not have the device that was asked for.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device {device!r}: not a device; allowed are auto, cpu, cuda, cuda:N, mps") from error
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (resolved.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(resolved.type, False):
        raise DeviceError(f"device {device!r}: this machine has none; use device=auto or device=cpu")
    return resolved


def resolve_precision(device: torch.device, precision: Precision = "auto") -> Precision:
    """Return what ``auto`` stands for on a device.

    That is bf16 where the hardware multiplies it (see :func:`explain.maps.multiplies_bf16`), fp16 on older CUDA devices
    with tensor cores (from Volta on), else fp32.
    """
    if precision != "auto":
        return precision
    if multiplies_bf16(device):
        return "bf16"
    has_tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 7
    return "fp16" if has_tensor_cores else "fp32"


def autocast(device: torch.device, precision: Precision = "auto") -> contextlib.AbstractContextManager[object]:
    """Return the context that runs convolutions and matrix products in a precision; see :func:`resolve_precision`."""
    precision = resolve_precision(device, precision)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout in which convolutions are fast: channels_last, but not on MPS."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def place(model: Network, device: torch.device) -> Network:
    """Move a network to a device, in the layout in which convolutions are fast there."""
    return model.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]


@contextlib.contextmanager
def memory_for(settings: TrialSettings, device: torch.device) -> Iterator[None]:
    """Have a lack of memory for a trial told in a sentence.

    Raises:
        OutOfMemoryError: if the device's memory does not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fewer = "pack fewer trials onto a GPU (gpus_per_trial)" if device.type == "cuda" else "run fewer trials at once"
        raise OutOfMemoryError(
            f"{device} ran out of memory at batch_size {settings.batch_size}, width {settings.width}: "
            f"lower batch_size, or {fewer}"
        ) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether memory did not suffice. Not all of torch's errors of that are of one class, or the last raised."""
    texts = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_machine() -> dict[str, Any]:
    """Return what figures measured here should stand with: ``system``, ``processor``, ``cores`` and ``gpus``.

    Of the system its kind, architecture and C library: a kernel's release changes no figure, and tells of a workplace.
    """
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    # Where the driver is too old for torch, GPUs are counted that cannot be asked.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(count)]
    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", ")
    return {"system": system, "processor": processor, "cores": os.cpu_count(), "gpus": gpus}
