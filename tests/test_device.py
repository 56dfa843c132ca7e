"""Devices by name, and the precision on each."""

import re

import numpy as np
import pytest
import torch

from trainables import (
    DeviceError,
    ImageData,
    TrialSettings,
    autocast,
    resolve_device,
    resolve_precision,
    train,
)
from trainables.device import describe_machine, memory_format

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


def some_data() -> ImageData:
    return ImageData(np.zeros((4, 32, 32, 3), np.uint8), np.arange(4) % 2, ("dark", "light"))


# ---- Devices


@pytest.fixture
def bare_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", "mps", "meta"])
def test_absent_device_is_refused(device, bare_machine):
    with pytest.raises(DeviceError) as error:
        next(train(TrialSettings(width=4), some_data(), some_data(), device=device))
    assert re.fullmatch(rf"device '{device}': this machine has none; use device=auto or device=cpu", str(error.value))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(DeviceError, match="'cuda': this machine has none"):
        next(train(TrialSettings(width=4), some_data(), some_data(), device="cuda"))


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "CPU!", "cuda:-1"])
def test_nonsense_device_is_refused(device, bare_machine):
    with pytest.raises(DeviceError) as error:
        resolve_device(device)
    assert f"device {device!r}: not a device; allowed are auto, cpu, cuda, cuda:N, mps" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("system", "machine", "libc", "told"),
    [
        ("Linux", "x86_64", ("glibc", "2.36"), "Linux x86_64, glibc 2.36"),
        ("Darwin", "arm64", ("", ""), "Darwin arm64"),
    ],
)
def test_a_machine_is_told_by_its_kind(system, machine, libc, told, bare_machine, monkeypatch):
    for name, value in (("system", system), ("machine", machine), ("libc_ver", libc)):
        monkeypatch.setattr(f"platform.{name}", lambda value=value: value)
    assert describe_machine()["system"] == told


def test_a_gpu_whose_driver_is_too_old_is_not_asked_for_its_name(bare_machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as its driver's library has it
    assert describe_machine()["gpus"] == []


def test_automatic_device_is_the_fastest_there_is(bare_machine, monkeypatch):
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device() == MPS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device() == CUDA
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError):
        resolve_device("cuda:2")


def test_layout_is_channels_last_but_on_mps():
    assert [memory_format(device) for device in (CPU, CUDA, MPS)] == [
        torch.channels_last,
        torch.channels_last,
        torch.contiguous_format,
    ]


# ---- Precision


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision_is_that_of_the_products(precision, dtype):
    with autocast(CPU, precision):
        assert (torch.rand(4, 4) @ torch.rand(4, 4)).dtype == dtype
    assert (torch.rand(4, 4) @ torch.rand(4, 4)).dtype == torch.float32


@pytest.mark.parametrize("device", [CPU, CUDA, MPS], ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precision_that_was_asked_for_is_kept(precision, device):
    assert resolve_precision(device, precision) == precision


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (False, True), (True, False)])
def test_automatic_precision_of_a_cpu_follows_the_hardware(avx512, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_precision(CPU) == ("bf16" if avx512 or amx else "fp32")
    with autocast(CPU, "auto"):
        assert torch.is_autocast_enabled("cpu") == (avx512 or amx)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16")],
    ids=["Pascal", "Volta", "Turing", "Ampere"],
)
def test_automatic_precision_of_a_gpu_is_what_its_tensor_cores_multiply(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert resolve_precision(CUDA) == expected


def test_automatic_precision_of_mps_is_full():
    assert resolve_precision(MPS) == "fp32"
