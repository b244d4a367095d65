"""Who else uses a GPU and what holds its clock down: parsed from text as the tools print it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from hcf.errors import HcfError
from hcf_bench.gpu_state import (
    GpuProcess,
    GpuState,
    busy_reasons,
    decode_reasons,
    own_process_tree,
    parse_smi,
    parse_smi_processes,
    read_gpu_state,
    read_smi,
    require_exclusive,
    throttled,
    visible_gpu,
)

A100 = (
    "0, NVIDIA A100-SXM4-80GB, 1155, 1410, 1593, 34, 68.42, 400.00, 0, 4, 81920, "
    "0x0000000000000001\n"
)
H100 = (
    "1, NVIDIA H100 80GB HBM3, 1665, 1980, 2619, 61, 697.81, 700.00, 100, 41377, 81559, "
    "0x0000000000000004\n"
)
HIDDEN = (
    "0, NVIDIA GB10, [N/A], [Not Supported], [N/A], 40, 12.10, [N/A], [N/A], [N/A], [N/A], "
    "[Unknown Error]\n"
)
PROCESSES = (
    "4242, /opt/env/bin/python3.12, 40960\n"
    "5151, C:\\tools\\render, fast.exe, [N/A]\n"
    "6161, [Not Found], 512\n"
)
IDLE = GpuState("0", "NVIDIA H100", utilisation_percent=0.0, memory_used_mib=4.0, processes=())


def parsed(text: str, processes: str | None = None) -> GpuState:
    state = parse_smi(text, processes)
    assert state is not None
    return state


def test_an_idle_a100() -> None:
    state = parsed(A100, "")
    assert (state.index, state.name) == ("0", "NVIDIA A100-SXM4-80GB")
    assert (state.sm_clock_mhz, state.sm_clock_max_mhz, state.memory_clock_mhz) == (
        1155.0, 1410.0, 1593.0,
    )  # fmt: skip
    assert (state.temperature_c, state.power_w, state.power_limit_w) == (34.0, 68.42, 400.0)
    assert (state.utilisation_percent, state.memory_used_mib, state.memory_total_mib) == (
        0.0, 4.0, 81920.0,
    )  # fmt: skip
    assert state.reasons == ("idle",)
    assert state.processes == ()
    assert busy_reasons(state, own_pids=()) == []


def test_a_busy_h100_names_what_uses_it() -> None:
    state = parsed(H100, PROCESSES)
    assert state.reasons == ("power cap",)
    found = "; ".join(busy_reasons(state, own_pids=()))
    assert "process 4242 (python3.12, 40960 MiB)" in found
    assert "process 6161 (name hidden, 512 MiB)" in found
    assert "100 % utilised" in found and "41377 MiB used" in found


def test_cells_without_a_figure_are_none() -> None:
    state = parsed(HIDDEN)
    assert state.sm_clock_mhz is state.power_limit_w is state.memory_used_mib is None
    assert state.temperature_c == 40.0
    assert state.reasons == () and state.processes is None
    assert busy_reasons(state, own_pids=()) == []


@pytest.mark.parametrize(
    "text", ["", "\n", "No devices were found\n", "0, NVIDIA A100-SXM4-80GB, 1155\n"]
)
def test_an_answer_that_names_no_gpu(text: str) -> None:
    assert parse_smi(text) is None


def test_process_lines() -> None:
    assert parse_smi_processes("") == ()
    assert parse_smi_processes("No running processes found\n") == ()
    assert parse_smi_processes(PROCESSES) == (
        GpuProcess(4242, "python3.12", 40960.0),
        GpuProcess(5151, "render, fast.exe", None),
        GpuProcess(6161, "", 512.0),
    )


def test_reasons_are_bits() -> None:
    assert decode_reasons(0) == ()
    assert decode_reasons(0x44) == ("power cap", "hardware thermal slowdown")
    assert decode_reasons(0x801) == ("idle", "reason 0x800")


def tool(folder: Path, script: str) -> str:
    """A program that answers as `nvidia-smi` would."""
    path = folder / "fake-smi"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_the_tool_is_asked_about_one_card(tmp_path: Path) -> None:
    script = (
        'case "$2" in\n'
        "*compute-apps*) printf '4242, python, 512\\n' ;;\n"
        f"*) printf '{A100.strip()}\\n' ;;\nesac\n"
        f'echo "$1" >> {tmp_path}/asked'
    )
    state = read_smi("3", tool(tmp_path, script))
    assert state is not None and state.name == "NVIDIA A100-SXM4-80GB"
    assert state.processes == (GpuProcess(4242, "python", 512.0),)
    assert set((tmp_path / "asked").read_text().split()) == {"--id=3"}


def test_an_old_driver_knows_the_reasons_by_their_former_name(tmp_path: Path) -> None:
    script = (
        'case "$2" in\n'
        '*event_reasons*) echo \'Field "clocks_event_reasons.active" is not a valid field to '
        "query.'; exit 2 ;;\n"
        f"*query-gpu*) printf '{H100.strip()}\\n' ;;\nesac"
    )
    state = read_smi("1", tool(tmp_path, script))
    assert state is not None and state.reasons == ("power cap",) and state.processes == ()


def test_a_tool_that_fails_or_is_missing_gives_nothing(tmp_path: Path) -> None:
    failing = 'echo "NVIDIA-SMI has failed because it couldn\'t communicate"; exit 9'
    assert read_smi("0", tool(tmp_path, failing)) is None
    assert read_smi("0", str(tmp_path / "absent")) is None


def test_our_own_family_may_use_the_card() -> None:
    code = "import time; print('up', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline()
        family = own_process_tree()
        assert {os.getpid(), os.getppid(), child.pid} <= family
        ours = replace(IDLE, processes=(GpuProcess(child.pid, "python", 3000.0),))
        used = replace(ours, memory_used_mib=3000.0 + 700.0)
        assert busy_reasons(used, own_pids=family) == []
    finally:
        child.kill()
        child.wait()


def test_use_by_processes_that_a_container_hides() -> None:
    hidden = replace(IDLE, processes=())
    assert busy_reasons(replace(hidden, memory_used_mib=1400.0), own_pids=()) == []
    assert "MiB used" in busy_reasons(replace(hidden, memory_used_mib=2000.0), own_pids=())[0]
    assert "% utilised" in busy_reasons(replace(hidden, utilisation_percent=11.0), own_pids=())[0]
    # what torch holds here is no sign of somebody else
    held = replace(hidden, memory_used_mib=9000.0)
    assert busy_reasons(held, own_pids=(), held_mib=8500.0) == []
    assert busy_reasons(held, own_pids=(), held_mib=100.0)


def test_our_own_context_under_the_id_of_the_host() -> None:
    unknown = GpuProcess(2**22 + 5)  # above any id that this system gives
    seen = replace(IDLE, processes=(unknown,))
    exists = psutil.pid_exists
    assert busy_reasons(seen, own_pids=(1,), held_mib=0.0, exists=exists) == []
    assert busy_reasons(seen, own_pids=(1,), held_mib=None, exists=exists)
    two = replace(IDLE, processes=(unknown, GpuProcess(2**22 + 6)))
    assert len(busy_reasons(two, own_pids=(1,), held_mib=0.0, exists=exists)) == 2


def test_throttling_becomes_a_note() -> None:
    cool = replace(IDLE, sm_clock_mhz=1980.0, reasons=(), cut_ms={"power cap": 100.0})
    assert throttled(None, None) == []
    assert throttled(cool, cool) == []
    capped = replace(cool, reasons=("power cap",), cut_ms={"power cap": 350.0})
    assert throttled(cool, capped) == ["power cap for 250 ms"]
    hot = replace(cool, reasons=("thermal slowdown", "application clocks"), sm_clock_mhz=1200.0)
    assert throttled(cool, hot) == ["thermal slowdown", "SM clock fell from 1980 to 1200 MHz"]
    assert throttled(None, hot) == ["thermal slowdown"]
    asleep = replace(cool, reasons=("idle",), sm_clock_mhz=345.0)
    assert throttled(cool, asleep) == []


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cuda", None, "0"),
        ("cuda:1", "", "1"),
        ("cuda", "3,1", "3"),
        ("cuda:1", "3, 1", "1"),
        ("cuda:0", "GPU-8a1b", "GPU-8a1b"),
    ],
)
def test_the_driver_s_name_of_a_torch_device(
    device: str, visible: str | None, expected: str
) -> None:
    assert visible_gpu(device, visible) == expected


def fake_nvml(**functions: object) -> ModuleType:
    """A binding that knows the named functions and fails at every other question."""
    module = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def refuses(*_: object) -> None:
        raise NVMLError

    names = (
        "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetClockInfo",
        "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetViolationStatus",
    )  # fmt: skip
    answers: dict[str, object] = dict.fromkeys(names, refuses)
    answers |= {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: ("gpu", index),
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "NVML_PERF_POLICY_POWER": 0,
        "NVML_PERF_POLICY_THERMAL": 1,
    }
    vars(module).update(answers | functions)
    return module


def test_the_binding_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * 2**30)
    binding = fake_nvml(
        nvmlDeviceGetName=lambda handle: "NVIDIA H100 80GB HBM3",
        nvmlDeviceGetMemoryInfo=lambda handle, version=None: SimpleNamespace(
            used=4 * 2**30, total=80 * 2**30
        ),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=7),
        nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1980, 2: 2619}[kind],
        nvmlDeviceGetPowerUsage=lambda handle: 698_000,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [process],
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x4,
        nvmlDeviceGetViolationStatus=lambda handle, policy: SimpleNamespace(
            violationTime=5_000_000 * (policy + 1)
        ),
    )
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    state = read_gpu_state("cuda")
    assert state is not None
    assert (state.index, state.name) == ("2", "NVIDIA H100 80GB HBM3")
    assert (state.sm_clock_mhz, state.memory_clock_mhz, state.power_w) == (1980.0, 2619.0, 698.0)
    assert (state.memory_used_mib, state.utilisation_percent) == (4096.0, 7.0)
    assert state.reasons == ("power cap",)
    assert state.cut_ms == {"power cap": 5.0, "thermal slowdown": 10.0}
    assert state.temperature_c is None  # this binding has no such function
    assert state.processes is not None and state.processes[0].memory_mib == 3072.0
    assert require_exclusive("cuda", patience_s=0.0) == state


def test_a_busy_card_is_refused_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    binding = fake_nvml(
        nvmlDeviceGetName=lambda handle: "NVIDIA A100",
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=2**22 + 5, usedGpuMemory=None)
        ],
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=93),
    )
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    with pytest.raises(HcfError, match=f"process {2**22 + 5}.*93 % utilised") as caught:
        require_exclusive("cuda", patience_s=0.0)
    assert "nothing was timed" in caught.value.fix


def test_the_cpu_has_no_such_state() -> None:
    assert read_gpu_state("cpu") is None
    assert require_exclusive("cpu") is None


@pytest.mark.gpu
def test_this_gpu_can_be_read() -> None:
    state = read_gpu_state("cuda")
    assert state is not None and state.name
    assert state.memory_total_mib is None or state.memory_total_mib > 1000
