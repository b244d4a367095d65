"""Opens a whole Stable Diffusion model in one safetensors file (A1111, CompVis) without network.

diffusers converts the tensors; what the file does not hold comes from `hcf.source_configs`, or from
a folder of configurations, and the tokenizer from that folder or the hub's cache.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hcf.artifact import INDEX, refuse_pickle
from hcf.errors import InvalidArtifact
from hcf.source_configs import Architecture, architecture_of, check_checkpoint, scheduler_config
from hcf.weights import check_weights

# the vocabulary that all of these families share, and where the hub has it
TOKENIZERS = (
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer/"),
)
FLAT_TEXT = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
logger = logging.getLogger("hcf")


def open_single_file(
    file: Path,
    pipeline: Any = None,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    **given: Any,
) -> Any:
    """The pipeline in a safetensors file with A1111 or CompVis names, without network.

    `pipeline` is its class, found from the tensors where not given. `config` is a folder of
    configurations (`model_index.json`; then `pipeline` is needed), else only looked into for a
    tokenizer, after which comes the hub's cache. A YAML file beside `file` says whether SD 2
    predicts noise or v. `given` goes to diffusers' `from_single_file` (components, mostly).

    Raises UnsafeFile for pickles, InvalidArtifact for other files and where no tokenizer is found.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    refuse_pickle(file)
    header = check_weights(file)
    config = Path(config) if config is not None else None
    with tempfile.TemporaryDirectory() as temporary:
        if config is not None and (config / INDEX).is_file():
            check_checkpoint(header, str(file))
        else:
            architecture = architecture_of(header, str(file))
            pipeline = pipeline or getattr(diffusers, architecture.pipeline)
            given = {**_parts_of_config(architecture, header, file, config, given), **given}
            config = write_configs(architecture, Path(temporary))
        if any(name.startswith(p + "embeddings.") for p in FLAT_TEXT for name in header):
            given.setdefault("text_encoder", _flat_text_encoder(file, config, dtype))
        try:
            with no_progress_bars():
                pipe = pipeline.from_single_file(
                    str(file), config=str(config), dtype=dtype, local_files_only=True, **given
                )
        except (OSError, ValueError, RuntimeError, KeyError, SingleFileComponentError) as error:
            reason = str(error)
            if "meta tensor" in reason:  # what torch says of a tensor that got no numbers
                reason = "it lacks weights that this configuration has"
            raise InvalidArtifact(
                f"{file} cannot be opened as {pipeline.__name__}: {reason}",
                fix="give config= the folder of the model it was made from",
            ) from error
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            absent = [key for key, value in module.state_dict().items() if value.is_meta]
            refuse_absent(f"{file}: {name}", absent)
    return pipe


def write_configs(architecture: Architecture, folder: Path) -> Path:
    """A folder of configurations that diffusers reads: no weights, no tokenizers, no scheduler."""
    index: dict[str, Any] = {"_class_name": architecture.pipeline, **architecture.flags}
    for name, config in architecture.models.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        kind = config.get("_class_name") or config["architectures"][0]
        index[name] = ["diffusers" if "_class_name" in config else "transformers", kind]
    for name in architecture.tokenizers:
        index[name] = ["transformers", "CLIPTokenizer"]
    index["scheduler"] = ["diffusers", architecture.scheduler["_class_name"]]
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return folder


def tokenizer_folder(config: Path | None) -> Path | None:
    """Where a CLIP tokenizer lies: in `config`, else in the hub's cache; None without one."""
    from huggingface_hub import try_to_load_from_cache

    places = [config / "tokenizer", config / "tokenizer_2", config] if config is not None else []
    for place in places:
        if (place / "tokenizer.json").is_file() or (place / "vocab.json").is_file():
            return place
    for name, folder in TOKENIZERS:
        for file in ("tokenizer.json", "vocab.json"):
            found = try_to_load_from_cache(name, folder + file)
            if isinstance(found, str):
                return Path(found).parent
    return None


def _parts_of_config(
    architecture: Architecture,
    header: Mapping[str, Any],
    file: Path,
    config: Path | None,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The tokenizers and the scheduler that `given` does not hold."""
    import diffusers
    import yaml
    from transformers import CLIPTokenizer

    parts: dict[str, Any] = {}
    wanted = {k: v for k, v in architecture.tokenizers.items() if k not in given}
    folder = tokenizer_folder(config) if wanted else None
    if wanted and folder is None:
        name = TOKENIZERS[0][0]
        raise InvalidArtifact(
            f"{file} has no tokenizer, and none is in the hub's cache",
            fix=f"hf download {name} tokenizer.json tokenizer_config.json vocab.json merges.txt, "
            "or give config= a folder with one",
        )
    for name, padding in wanted.items():
        parts[name] = CLIPTokenizer.from_pretrained(
            folder, pad_token=padding, model_max_length=77, local_files_only=True
        )
    if "scheduler" in given:
        return parts
    beside = file.with_suffix(".yaml")
    original = yaml.safe_load(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    scheduler = scheduler_config(architecture, header, original or {})
    if architecture.name == "sd21" and not original and "v_pred" not in header:
        logger.warning(
            "%s does not say whether it predicts noise or v; taken is v, as SD 2.1 at 768 pixels. "
            "For noise, put its YAML file beside it", file
        )  # fmt: skip
    kind = getattr(diffusers, scheduler.pop("_class_name"))
    parts["scheduler"] = kind.from_config(scheduler)
    return parts


def _flat_text_encoder(file: Path, config: Path, dtype: torch.dtype | None) -> Any:
    """CLIP of a file whose names lack `text_model.`, which diffusers does not find."""
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from safetensors import safe_open
    from transformers import CLIPTextModel

    tensors: dict[str, torch.Tensor] = {}
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - it is no mapping
            for prefix in FLAT_TEXT:
                if name.startswith(prefix):
                    flat = name.removeprefix(prefix).removeprefix("text_model.")
                    tensors[f"{prefix}text_model.{flat}"] = stored.get_tensor(name)
    return create_diffusers_clip_model_from_ldm(
        CLIPTextModel,
        checkpoint=tensors,
        config=str(config),
        subfolder="text_encoder",
        torch_dtype=dtype,
        local_files_only=True,
    )


def refuse_absent(what: str, absent: list[str]) -> None:
    if absent:
        raise InvalidArtifact(
            f"{what} has no weights for {len(absent)} of its tensors: {', '.join(absent[:3])}",
            fix="copy the whole model, or use the configuration it was made with",
        )


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Both libraries draw bars while they read local files, also where nobody watches."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [m for m in (diffusers_logging, transformers_logging) if m.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()
