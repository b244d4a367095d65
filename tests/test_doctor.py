from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

from hcf.doctor import PACKAGES, describe, examine, pip_line, read_cpu


def test_it_describes_this_machine() -> None:
    machine = examine()
    assert machine.cores >= 1 and machine.memory_gib > machine.memory_free_gib > 0
    assert machine.packages["torch"] == metadata.version("torch")
    engines = {engine.name: engine for engine in machine.engines}
    assert engines["eager"].runs and engines["onnxruntime"].precisions[0] == "fp32"
    if not machine.gpus:
        assert "no GPU" in engines["tensorrt"].reason
    text = describe(machine)
    for name in (*engines, *PACKAGES):
        assert name in text
    json.dumps(machine.summary())


def test_fixes_are_lines_of_pip() -> None:
    assert pip_line("openvino") == "pip install 'hcf-toolkit[openvino]'"
    assert pip_line("torch") == "pip install torch"
    extras = metadata.metadata("hcf-toolkit").get_all("Provides-Extra") or []
    assert {extra for extra, _ in PACKAGES.values() if extra} <= set(extras)


def test_cpu_flags_come_in_a_fixed_order(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor : 0\nmodel name : Some CPU\nflags : fpu amx_int8 avx2 avx512_vnni sse\n"
        "processor : 1\nmodel name : Some CPU\nflags : fpu amx_int8 avx2 avx512_vnni sse\n"
    )
    assert read_cpu(info) == ("Some CPU", ("avx2", "avx512_vnni", "amx_int8"))
    assert read_cpu(tmp_path / "none")[1] == ()
