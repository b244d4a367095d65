"""The same recipe on one process or many: DDP and DeepSpeed through accelerate, FSDP2 by torch.

    torchrun --nproc-per-node 4 --no-python hcf train RECIPE      (or accelerate launch)

What a run computes does not depend on how many processes share it: a step's global batch is
`micro_batches` pieces with a randomness of their own each, and a process takes every world-size'th
piece. One process does them all by accumulation. Means over pieces, then over processes, are the
mean over the batch, so losses differ by the order of summation only.

FSDP2 is torch's `fully_shard` itself: accelerate offers it on GPUs alone, and this form runs under
gloo as well. Checkpoints hold whole tensors in every mode, so that a run can go on in another one.
"""

import copy
import os
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    is_deepspeed_available,
    is_tensorboard_available,
)
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

Mode = Literal["ddp", "fsdp2", "zero1", "zero2"]


class ParallelConfig(BaseModel):
    """How several processes share a run; with one process every mode is a plain run.

    ddp: whole model on each. zero1, zero2: DeepSpeed, optimiser state (and gradients) divided.
    fsdp2: parameters, gradients and optimiser state divided; a module of at least `unit_params`
    parameters is gathered as a unit. `cpu_offload` keeps what is divided in host memory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode = "ddp"
    unit_params: int = Field(5_000_000, gt=0)
    cpu_offload: bool = False
    bucket_mb: int = Field(25, gt=0)


def rank() -> int:
    """Of this process, as its launcher says; 0 without one."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes share the run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def meet() -> None:
    """Waits for every process."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def refresh_masters(model: nn.Module) -> None:
    """DeepSpeed's own copies of the weights from those of `model`, after they were set."""
    from deepspeed.utils import safe_set_full_fp32_param

    for parameter in model.parameters():
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, parameter.detach().float())


def make_accelerator(
    config: ParallelConfig, *, precision: str, batch_size: int, micro_batches: int, turns: int,
    max_grad_norm: float, tensorboard: bool | None, folder: Path | None,
) -> Accelerator:  # fmt: skip
    """The process group and what accelerate keeps of it.

    Raises ValueError where the pieces of a batch do not divide among the processes, ImportError for
    a package that was asked for and is missing.
    """
    if tensorboard and not is_tensorboard_available():
        raise ImportError("tensorboard is missing: pip install 'hcf-toolkit[train]'")
    # one process may train several phases, each with its own precision
    AcceleratorState._reset_state(reset_partial_state=False)
    processes = world()
    if micro_batches % processes:
        raise ValueError(
            f"{micro_batches} micro_batches do not divide among {processes} processes; set "
            f"loop.micro_batches to a multiple of {processes} (it is part of the result, see "
            "docs/training.md)"
        )
    pieces, several = micro_batches // processes, processes > 1
    plugin = None
    if several and config.mode in ("zero1", "zero2"):
        if turns > 1:
            raise ValueError("DeepSpeed has one optimiser; train turns with parallel.mode=ddp")
        plugin = _deepspeed(config, precision, batch_size // micro_batches, pieces, max_grad_norm)
    offloaded = torch.cuda.is_available() and config.cpu_offload and config.mode == "fsdp2"
    backend = "cuda:nccl,cpu:gloo" if several and offloaded else None
    return Accelerator(
        # DeepSpeed would turn the parameters themselves into bfloat16; autocast keeps fp32 masters
        mixed_precision="bf16" if precision == "bf16" and plugin is None else "no",
        cpu=several and not torch.cuda.is_available(),
        deepspeed_plugin=plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=pieces),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                bucket_cap_mb=config.bucket_mb, find_unused_parameters=turns > 1
            ),
            InitProcessGroupKwargs(backend=backend),
        ],
        log_with="tensorboard" if tensorboard is not False and is_tensorboard_available() else None,
        project_dir=folder,
    )


def _deepspeed(
    config: ParallelConfig, precision: str, micro_batch: int, pieces: int, max_grad_norm: float
) -> DeepSpeedPlugin:
    if not is_deepspeed_available():
        raise ImportError(
            f"parallel.mode={config.mode} needs DeepSpeed: pip install deepspeed, or use ddp, fsdp2"
        )
    if not torch.cuda.is_available():
        raise ValueError(f"parallel.mode={config.mode} needs GPUs; use ddp or fsdp2 on processors")
    plugin = DeepSpeedPlugin(
        zero_stage=1 if config.mode == "zero1" else 2,
        gradient_accumulation_steps=pieces,
        gradient_clipping=max_grad_norm,
        offload_optimizer_device="cpu" if config.cpu_offload else "none",
    )
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": micro_batch,
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "zero_force_ds_cpu_optimizer": False,  # the loop's own AdamW, offloaded or not
    }
    return plugin


def shard(objective: nn.Module, config: ParallelConfig, device: torch.device) -> nn.Module:
    """A copy of `objective` whose parameters are divided among the processes.

    A copy, because sharding changes classes and parameters; `gather_into` brings the result back.
    """
    model = copy.deepcopy(objective).to(device)
    offload = CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy()
    for module in _units(model, config.unit_params):
        fully_shard(module, offload_policy=offload)
    fully_shard(model, offload_policy=offload)
    return model


def _units(module: nn.Module, least: int) -> list[nn.Module]:
    """The innermost modules of at least `least` parameters that are called as a whole.

    Innermost, because an outer one (a first stage) may be entered by another method than forward,
    which would find its own parameters still divided; those belong to the whole objective instead.
    """
    units: list[nn.Module] = []
    for child in module.children():
        if sum(p.numel() for p in child.parameters()) >= least:
            inner = _units(child, least)
            is_list = isinstance(child, nn.ModuleList | nn.ModuleDict)
            units += inner or ([] if is_list else [child])
    return units


@torch.no_grad()
def gather_into(objective: nn.Module, model: nn.Module) -> None:
    """Whole parameters and buffers of the divided `model` into `objective`, on every process."""
    divided = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in [*objective.named_parameters(), *objective.named_buffers()]:
        tensor.copy_(whole(divided[name]))


def whole(tensor: Tensor) -> Tensor:
    """A divided tensor gathered from all processes; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Whole `values` into `target`, which may be divided."""
    target.copy_(like(values, target))


def like(values: Tensor, target: Tensor) -> Tensor:
    """Whole `values` divided as `target` is, where it is and their shapes agree."""
    if not isinstance(target, DTensor) or values.shape != target.shape:
        return values
    mesh = target.device_mesh
    divided = distribute_tensor(values.to(mesh.device_type), mesh, target.placements)
    return divided.to(target.device)  # host memory, where it is offloaded


def mean_over_processes(values: list[float], accelerator: Accelerator) -> list[float]:
    """Mean of each over the processes, in float64; as they are with one process."""
    if accelerator.num_processes == 1 or not values:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    dist.all_reduce(total)
    return [float(v) for v in total / accelerator.num_processes]


def slowest(seconds: float, accelerator: Accelerator) -> tuple[float, int]:
    """The largest of the processes' values, and whose it is."""
    if accelerator.num_processes == 1:
        return seconds, 0
    each = accelerator.gather(torch.tensor([seconds], device=accelerator.device))
    return float(each.max()), int(each.argmax())


def close() -> None:
    """Ends the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        PartialState().destroy_process_group()
