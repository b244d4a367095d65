"""What reaches NVIDIA's driver is what cuda.h declares: a driver of ours, which launches emulated.

The driver is compiled against the real header, checks what the real one requires of a tensor map,
and runs csrc/gemm_sm90.cu on the CPU with what the launch hands it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hcf_kernels import build
from hcf_kernels.build import SOURCES, Kernel
from hcf_kernels.gpu import cuda_gemm
from hcf_kernels.gpu.cuda_gemm import gemm_boxes, problem_of, resident, tensor_map, tiling_of

DRIVER = r"""
#include <cuda.h>
#include "gemm_sm90.cu"

extern "C" {
CUresult cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    *context = reinterpret_cast<CUcontext>(0x100000001);
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
    const bool known = context == reinterpret_cast<CUcontext>(0x100000001);
    return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    *module = reinterpret_cast<CUmodule>(0x200000002);
    return std::memcmp(image, "\x7f" "ELF\0code", 9) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    if (module != reinterpret_cast<CUmodule>(0x200000002)) return CUDA_ERROR_INVALID_HANDLE;
    *function = reinterpret_cast<CUfunction>(0x300000003);
    return std::strcmp(name, "gemm_sm90") ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
    const bool shared = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    return shared && value <= 232448 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "a driver's word";
    return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
    const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
    const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    if (reinterpret_cast<size_t>(map) % 64 || reinterpret_cast<size_t>(address) % 16 ||
        interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle != CU_TENSOR_MAP_SWIZZLE_128B ||
        promotion != CU_TENSOR_MAP_L2_PROMOTION_L2_256B ||
        fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || type > CU_TENSOR_MAP_DATA_TYPE_UINT16)
        return CUDA_ERROR_INVALID_VALUE;
    const int bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
    emulation::Tensor tensor{static_cast<const u8*>(address), static_cast<int>(rank), bytes};
    for (unsigned d = 0; d < 4; ++d) {
        tensor.sizes[d] = d < rank ? sizes[d] : 1;
        tensor.box[d] = d < rank ? box[d] : 1;
        tensor.strides[d] = d == 0 || d >= rank ? bytes : strides[d - 1];
        if (d < rank && (steps[d] != 1 || box[d] > 256 || (d && tensor.strides[d] % 16)))
            return CUDA_ERROR_INVALID_VALUE;
    }
    std::memcpy(map, &tensor, sizeof(tensor));
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned blocks, unsigned y, unsigned z,
                        unsigned threads, unsigned, unsigned, unsigned shared, CUstream stream,
                        void** arguments, void** extra) {
    if (function != reinterpret_cast<CUfunction>(0x300000003) || y != 1 || z != 1 || extra ||
        stream != reinterpret_cast<CUstream>(0x400000004))
        return CUDA_ERROR_INVALID_VALUE;
    const emulation::Launch launch{int(blocks), int(threads), CLUSTER, int(shared), 2, 0};
    TensorMap maps[2];
    for (int i = 0; i < 2; ++i) std::memcpy(&maps[i], arguments[i], sizeof(TensorMap));
    const char* failure = emulate(launch, &maps[0], &maps[1], *static_cast<Problem*>(arguments[2]));
    return failure ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}
}
"""
CONFIG = {"variant": "cuda", "kernel": "gemm_sm90", "block_n": 128, "stages": 3}
TILING = tiling_of(CONFIG, torch.int8)


@pytest.fixture
def our_driver(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("driver")
    for source in SOURCES.iterdir():
        shutil.copy(source, folder)
    (folder / "driver.cu").write_text(DRIVER)
    headers = Path(torch.__file__).parents[1] / "nvidia/cu13/include"
    command = ["g++", "-std=c++17", "-Og", "-w", "-shared", "-fPIC", "-DHCF_EMULATE"]
    command += [f"-D{name}={value}" for name, value in TILING.defines.items()]
    command += ["-I", str(headers), "-x", "c++", "driver.cu", "-o", "libcuda.so"]
    subprocess.run(command, check=True, cwd=folder)
    library = ctypes.CDLL(str(folder / "libcuda.so"))
    monkeypatch.setattr(build, "driver", lambda: library)
    monkeypatch.setattr(cuda_gemm, "driver", lambda: library)
    tensor_map.cache_clear()
    yield
    tensor_map.cache_clear()


def test_a_launch_reaches_the_kernel(our_driver: None) -> None:
    m, n, k = 130, 136, 336
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.tensor(1e-3)
    y = torch.full((m, n), torch.nan, dtype=torch.float16)
    problem, kept = problem_of(y, scale, None, None, None, "none")
    problem.m, problem.n, problem.k = m, n, k
    kernel = Kernel(b"\x7fELF\0code", "gemm_sm90", TILING.shared_bytes, 0)
    maps = [tensor_map(box) for box in gemm_boxes(a, b, TILING)]
    assert tensor_map(gemm_boxes(a, b, TILING)[0]) is maps[0], "made once"
    blocks = resident(TILING, -(-m // TILING.block_m), -(-n // TILING.columns), 132)
    kernel.launch(blocks, TILING.threads, 0x400000004, *maps, problem)
    del kept
    assert torch.equal(y, ((a.double() @ b.double().T).float() * scale).half())


def test_what_the_driver_refuses_is_said(our_driver: None) -> None:
    with pytest.raises(RuntimeError, match=r"finding other: a driver's word \(500\)"):
        Kernel(b"\x7fELF\0code", "other", 1024, 0)
    odd = torch.zeros(8, 40, dtype=torch.int8)[:, :20]
    with pytest.raises(RuntimeError, match=r"a tensor map of Box.*: a driver's word \(1\)"):
        tensor_map(cuda_gemm.box_of(odd, (8, 128)))
