"""CUDA C++ kernels: compiled without a GPU, kept by content, refused with what is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hcf_kernels import build
from hcf_kernels.build import (
    Build,
    build_all,
    build_one,
    builds,
    compile_source,
    compiled_key,
    require,
    source_key,
)

SMALL: dict[str, str | int] = {"ELEMENT": "INT8", "BLOCK_M": 64, "STAGES": 2}


def chosen() -> list[Build]:
    """Of each kernel and element the first, and one of each way through the sources."""
    found: dict[tuple[object, ...], Build] = {}
    for one in builds():
        ways = {name: one.defines.get(name) for name in ("PINGPONG", "PROMOTE", "GEGLU")}
        element = None if any(ways.values()) else one.defines["ELEMENT"]
        found.setdefault((one.stem, one.arch, element, *ways.values()), one)
    return list(found.values())


@pytest.mark.parametrize("one", chosen(), ids=lambda b: f"{b.stem}-{b.arch}-{b.defines['ELEMENT']}")
def test_machine_code_has_no_spills_and_what_it_needs(one: Build) -> None:
    report = build_one(one, None)
    assert report["problems"] == []
    assert one.expect and set(one.expect) <= set(report["instructions"])
    assert report["registers"] <= 255 and report["stack_bytes"] == 0
    # on sm_90 with the kilobyte that CUDA keeps for itself
    limit = {"sm_80": 163, "sm_89": 99, "sm_90": 228, "sm_90a": 228}[one.arch]
    assert 0 < report["shared_bytes"] <= limit * 1024


def test_every_source_is_built_for_its_architectures() -> None:
    made = {(one.stem, one.arch) for one in builds()}
    assert {stem for stem, _ in made} == {path.stem for path in build.SOURCES.glob("*.cu")}
    assert {("gemm_sm80", "sm_80"), ("gemm_sm90", "sm_90a"), ("conv3x3_sm90", "sm_90a")} <= made


def test_what_was_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCF_HOME", str(tmp_path))
    cubin = compile_source("gemm_sm80", "sm_80", SMALL)
    assert cubin.startswith(b"\x7fELF")
    (kept,) = (tmp_path / "cubin").iterdir()
    assert kept.name == f"gemm_sm80-sm_80-{compiled_key('gemm_sm80', 'sm_80', SMALL)}.cubin"
    kept.write_bytes(b"from the cache")
    assert compile_source("gemm_sm80", "sm_80", SMALL) == b"from the cache"

    monkeypatch.setattr(build, "AHEAD", tmp_path / "ahead")
    ahead = f"gemm_sm80-sm_80-{source_key('gemm_sm80', 'sm_80', SMALL)}.cubin"
    build.write_whole(tmp_path / "ahead" / ahead, b"from the package")
    assert compile_source("gemm_sm80", "sm_80", SMALL) == b"from the package"


def test_keys_are_of_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n#include "emulate.h"\n')
    (tmp_path / "b.cuh").write_text('#include "c.cuh"\n')
    (tmp_path / "c.cuh").write_text("int x;\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)

    def key(arch: str = "sm_80", **defines: int) -> str:
        build._files.cache_clear()
        return source_key("a", arch, defines)

    first = key()
    assert key() == first and len({first, key("sm_90a"), key(X=1), key(X=2)}) == 4
    (tmp_path / "c.cuh").write_text("int y;\n")
    assert key() != first
    build._files.cache_clear()


def test_what_does_not_compile_is_said_with_the_log() -> None:
    with pytest.raises(RuntimeError, match=r"gemm_sm80.cu does not compile for sm_80.*") as error:
        build.compile_now("gemm_sm80", "sm_80", {"ROW_BYTES": 96})
    assert "static assertion failed" in str(error.value)


def test_without_cuda_core_the_pip_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCF_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    build._compiler.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'hcf-toolkit\[cuda\]'"):
        compile_source("gemm_sm80", "sm_80", SMALL)
    build._compiler.cache_clear()


def test_capabilities_are_needed_and_found() -> None:
    require("gemm_sm80", "sm_80", (8, 0))
    require("gemm_sm80", "sm_80", (8, 6))
    require("gemm_sm90", "sm_90a", (9, 0))
    with pytest.raises(RuntimeError, match="exactly 9.0, this GPU has 8.0"):
        require("gemm_sm90", "sm_90a", (8, 0))
    with pytest.raises(RuntimeError, match="exactly 9.0, this GPU has 10.0"):
        require("gemm_sm90", "sm_90a", (10, 0))
    with pytest.raises(RuntimeError, match="8.0 to 8.9, this GPU has 9.0"):
        require("gemm_sm80", "sm_80", (9, 0))


def test_all_are_built_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    one = Build("gemm_sm80", "sm_80", SMALL, 16384, ("IMMA", "UTMALDG"))
    monkeypatch.setattr(build, "builds", lambda: iter([one]))
    (report,) = build_all(tmp_path, ["sm_80"])
    assert report["problems"] == ["no UTMALDG"] and report["shared_bytes"] == 16384
    assert build_all(tmp_path, ["sm_90a"]) == []
    monkeypatch.setattr(build, "AHEAD", tmp_path)
    assert compile_source("gemm_sm80", "sm_80", SMALL).startswith(b"\x7fELF")

    assert build.main(["--arch", "80"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == ["no UTMALDG"]
    assert build.main(["--arch", "90a"]) == 0
