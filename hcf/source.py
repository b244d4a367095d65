"""Opens a model as an ordinary diffusers pipeline: how every stage reads one.

    open_pipeline("out/student")                            a folder
    open_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5")     the hub's cache, then the hub
    open_pipeline("model.safetensors")                      one file with A1111 or CompVis names

HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE hold. Pickles are never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hcf.artifact import INDEX, check_model_folder
from hcf.errors import HcfError, InvalidArtifact, MissingDependency, RecipeError
from hcf.source_file import no_progress_bars, open_single_file, refuse_absent
from hcf.weights import check_weights, read_header

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".json", ".yaml")  # ends of no hub id
# "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", the shards' older form
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<new>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<old>\w+))?"
    r"\.safetensors"
)
# names that both libraries have changed since files were published, by today's
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def open_pipeline(
    path: str | Path,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    config: str | Path | None = None,
) -> Any:
    """The pipeline at `path` on the CPU, in `dtype`, in eval mode, without gradients.

    `path` is a folder, a hub id or a safetensors file of a whole model. `variant` chooses among
    weight files ("fp16"); without it the plain ones are taken, or the one variant there is. For a
    single file `config` is a folder with the model's configurations, or with a CLIP tokenizer.
    The class is the one `model_index.json` names, from diffusers or from `taiji.pipelines`.
    Raises InvalidArtifact for what is no pipeline or has a broken, missing or non-finite weight,
    UnsafeFile for pickled weights, MissingDependency where a package is not there.
    """
    path = Path(path)
    if path.is_file():
        whole = config is not None and (Path(config) / INDEX).is_file()
        pipeline = pipeline_class(Path(str(config))) if whole else None
        return _ready(open_single_file(path, pipeline, config, dtype), dtype)
    if config is not None:
        raise RecipeError(f"config={config} is for single files", fix=f"leave it out for {path}")
    folder = path
    if not path.exists() and is_hub_id(str(path)):
        folder = hub_folder(str(path), variant)
    else:
        check_model_folder(path)
    pipeline = pipeline_class(folder)
    variant = find_variant(folder, variant)
    try:
        with no_progress_bars():
            pipe = pipeline.from_pretrained(
                folder, dtype=dtype, variant=variant, local_files_only=True, use_safetensors=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidArtifact(
            f"{path} cannot be opened as {pipeline.__name__}: {error}",
            fix="check that every folder model_index.json names is complete (`hcf verify`)",
        ) from error
    check_loaded(pipe, folder, variant)
    return _ready(pipe, dtype)


def pipeline_class(path: Path) -> Any:
    """The pipeline class that `model_index.json` in folder `path` names."""
    import diffusers

    index = path / INDEX
    if not index.is_file():
        raise InvalidArtifact(
            f"{path} has no {INDEX}, so it is not a diffusers pipeline",
            fix="give the folder that `save_pretrained` wrote",
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArtifact(f"{index} names no pipeline class: {error!r}") from error
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if found is None:
        import taiji.pipelines

        found = getattr(taiji.pipelines, str(name), None)
    if found is None:
        raise InvalidArtifact(
            f"{index} names the pipeline {name!r}, which neither diffusers {diffusers.__version__}"
            " nor taiji.pipelines has",
            fix="install the diffusers version the model was saved with",
        )
    check_backends(found)
    return found


def is_hub_id(name: str) -> bool:
    """Whether `name` can be that of a model on the hub: owner/name."""
    return bool(HUB_ID.fullmatch(name)) and not name.endswith(FILES)


def missing_backends(pipeline: Any) -> list[str]:
    """Packages without which diffusers has only a placeholder of this class."""
    from diffusers.utils.import_utils import BACKENDS_MAPPING

    wanted = getattr(pipeline, "_backends", [])
    return [name for name in wanted if name in BACKENDS_MAPPING and not BACKENDS_MAPPING[name][0]()]


def check_backends(pipeline: Any) -> None:
    """Raises MissingDependency for a class whose packages are not installed."""
    if missing := missing_backends(pipeline):
        raise MissingDependency(
            f"{pipeline.__name__} needs {', '.join(missing)}, which is not installed",
            fix=f"pip install {' '.join(missing)}",
        )


def hub_folder(name: str, variant: str | None = None) -> Path:
    """The folder of hub model `name` in the cache, downloaded where that is allowed.

    Raises InvalidArtifact where it is neither there nor to be had, with the download command.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub import constants

    problem: Exception | None = None
    for local in (True, False):
        if not local and constants.is_offline_mode():
            break
        for kind in dict.fromkeys([variant, *(["fp16"] if variant is None else [])]):
            try:
                with no_progress_bars():
                    folder = Path(
                        DiffusionPipeline.download(
                            name, variant=kind, local_files_only=local, use_safetensors=True
                        )
                    )
                check_parts(folder, find_variant(folder, variant))
                return folder
            except (OSError, ValueError, HcfError) as error:
                problem = error
    where = f"the cache {constants.HF_HUB_CACHE}"
    if constants.is_offline_mode():
        where += " has it not whole, and HF_HUB_OFFLINE is set"
    else:
        where += f" and {constants.ENDPOINT} have it not whole"
    reason = problem.message if isinstance(problem, HcfError) else str(problem).split("\n")[0]
    raise InvalidArtifact(
        f"no model at {name}: there is no such folder, and {where} ({reason})",
        fix=f'hf download {name} --include "*.json" "*.txt" "*.model" "*/*.safetensors"',
    ) from problem


def variants_of(folder: Path) -> set[str | None]:
    """Variants of the weights in a component's folder; None stands for the plain files."""
    names = [WEIGHTS.fullmatch(file.name) for file in folder.glob("*.safetensors")]
    return {name["new"] or name["old"] for name in names if name}


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files that are read of a component's folder: all shards of one variant."""
    there = variants_of(folder)
    wanted = variant if variant in there else None
    return sorted(
        file
        for file in folder.glob("*.safetensors")
        if (name := WEIGHTS.fullmatch(file.name)) and (name["new"] or name["old"]) == wanted
    )


def find_variant(folder: Path, variant: str | None) -> str | None:
    """The variant to load: as asked; else none where all have plain files, or the only one.

    Raises InvalidArtifact where no component has the one that was asked for.
    """
    found = {name: variants_of(folder / name) for name in _parts(folder)}
    weighted = {name: there for name, there in found.items() if there}
    every = sorted({str(v) for there in weighted.values() for v in there if v is not None})
    if variant is not None:
        if variant not in every:
            raise InvalidArtifact(
                f"{folder} has no weights of variant {variant!r}",
                fix=f"use {' or '.join(every)}" if every else "leave variant out",
            )
        return variant
    lacking = [there for there in weighted.values() if None not in there]
    if not lacking:
        return None
    shared = [name for name in every if all(name in there for there in lacking)]
    if "fp16" in shared:
        return "fp16"
    if len(shared) != 1:
        raise InvalidArtifact(
            f"{folder} has no plain weights, but {', '.join(every)}", fix="choose one with variant="
        )
    return shared[0]


def check_parts(folder: Path, variant: str | None, given: Container[str] = ()) -> None:
    """As `check_model_folder`, for a folder that may hold more than what will be read.

    `given` names components that come from elsewhere.
    """
    for name in _parts(folder):
        if name in given:
            continue
        if not (folder / name).is_dir():
            raise InvalidArtifact(f"{folder} has no {name}", "download the whole model")
        files = weight_files(folder / name, variant)
        if (folder / name / "config.json").is_file() and not files:
            raise InvalidArtifact(
                f"{folder / name} has no *.safetensors weights",
                fix="download them; pickled ones (*.bin) are not read",
            )
        for index in (folder / name).glob("*.safetensors.index*.json"):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            there = {file.name for file in files}
            if shards & there and shards - there:
                raise InvalidArtifact(
                    f"{folder / name} lacks {', '.join(sorted(shards - there))}",
                    fix="download the whole model",
                )
        for file in files:
            check_weights(file)


def check_loaded(pipe: Any, folder: Path, variant: str | None, given: Container[str] = ()) -> None:
    """Raises InvalidArtifact where a model has weights that its files do not hold.

    Both libraries draw those at random and only log it.
    """
    from diffusers import ModelMixin
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    for name, module in pipe.components.items():
        if name in given:
            continue
        if isinstance(module, ModelMixin | CLIPTextModel | CLIPTextModelWithProjection):
            files = weight_files(folder / name, variant)
            there = {_today(key) for file in files for key in read_header(file)}
            refuse_absent(
                f"{folder / name}", [k for k in module.state_dict() if _today(k) not in there]
            )


def _ready(pipe: Any, dtype: torch.dtype) -> Any:
    from diffusers import ModelMixin

    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
            if not isinstance(component, ModelMixin):
                # transformers keeps the stored dtype whatever the pipeline asked for
                component.to(dtype)
    return pipe


def _parts(folder: Path) -> list[str]:
    """Names of the components that the pipeline in `folder` has."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [
            k for k, v in index.items()
            if isinstance(v, list) and len(v) == 2 and isinstance(v[1], str)
        ]  # fmt: skip
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidArtifact(f"{folder / INDEX}: {error}", "copy the whole model") from error


def _today(key: str) -> str:
    for old, new in RENAMED.items():
        key = key.replace(old, new)
    return key.removeprefix("text_model.")
