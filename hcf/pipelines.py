"""The diffusers pipelines under their own names, accelerated: change the import, nothing else.

    from hcf.pipelines import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    pipe = StableDiffusionPipeline.from_pretrained(folder, engine="openvino", quantize="int8")
    image = pipe("a red cat", num_inference_steps=20).images[0]

Each class is the one of diffusers (or of `taiji.pipelines`) with `Accelerated` before it: the same
signatures, components, configuration and files. `from_pretrained`, `from_single_file` and
`from_pipe` take the keywords of `hcf.accelerate` besides their own. On a machine with a GPU engines
wait for `pipe.to(...)` or the first call, and a pipeline that moves to another kind of device, or
has a component replaced, gets engines that fit.

Classes are made when they are first asked for: one whose packages are missing costs the others
nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hcf.artifact import INDEX, MANIFEST, read_manifest, refuse_pickle
from hcf.errors import HcfError, UnsafeFile
from hcf.export.component import default_components
from hcf.load import accelerate
from hcf.lora import check_pipeline_lora
from hcf.routing import routes_of
from hcf.source import (
    check_backends,
    check_loaded,
    check_parts,
    find_variant,
    missing_backends,
    pipeline_class,
)
from hcf.source_file import open_single_file, tokenizer_folder

if TYPE_CHECKING:
    from hcf.engines import EngineReport
    from hcf.feature_cache import FeatureCacheConfig
    from hcf.settings import QuantizeConfig

CHOOSING = (
    "DiffusionPipeline",
    "AutoPipelineForText2Image",
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
)
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "KolorsPipeline",
    "KolorsImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "TaijiStableDiffusionPipeline",
)
__all__ = [*PIPELINES, *CHOOSING]


@dataclass
class Request:
    """What a pipeline's engines were asked to be, and what came of it.

    `path` is the artefact whose engines are taken; None where they are built for the pipeline.
    `device` is the kind they were last made for, `report` what was made.
    """

    keywords: Mapping[str, Any]
    path: Path | None = None
    device: str | None = None
    report: Sequence[EngineReport] = ()
    busy: bool = False


def _keywords(
    engine: str = "auto",
    precision: str | None = None,
    quantize: str | QuantizeConfig | None = None,
    cache: str | int | FeatureCacheConfig | None = None,
    components: Sequence[str] | None = None,
    threads: int | None = None,
    prompts: Sequence[str] = (),
) -> dict[str, Any]:
    """The keywords of `hcf.accelerate` that the loading methods take too."""
    return dict(locals())


def _split(kwargs: dict[str, Any]) -> Request:
    """Takes the keywords of `hcf.accelerate` out of `kwargs`."""
    names = inspect.signature(_keywords).parameters
    return Request(_keywords(**{name: kwargs.pop(name) for name in names if name in kwargs}))


class Accelerated:
    """Goes before a diffusers pipeline in the classes of this module."""

    hcf_report: Sequence[EngineReport] = ()
    _hcf_request: Request | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As diffusers', from safetensors only; and the keywords of `hcf.accelerate`.

        A folder that `hcf build` made engines in brings them. The weights of a local folder are
        checked as `hcf.load` does; where it has but one variant ("fp16"), that is taken.
        """
        return _loaded(super().from_pretrained, pretrained_model_name_or_path, kwargs)  # type: ignore[misc]

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | Path, **kwargs: Any) -> Any:
        """As diffusers', and the keywords of `hcf.accelerate`; see `hcf.source_file`.

        A local file needs no network where `config=` or the hub's cache has its tokenizer.
        """
        from huggingface_hub.constants import is_offline_mode

        request = _split(kwargs)
        base: Any = cls.__bases__[-1]
        if not hasattr(base, "from_single_file"):
            raise HcfError(f"{cls.__name__} is not kept in a single file", "use from_pretrained")
        file, config = Path(pretrained_model_link_or_path), kwargs.get("config")
        refuse_pickle(file)
        local = config is None or Path(config).is_dir()
        if not (kwargs.get("local_files_only") or is_offline_mode()):
            # diffusers may fetch what is not here
            local &= tokenizer_folder(Path(config) if config is not None else None) is not None
        if not file.is_file() or not local or "original_config" in kwargs:
            pipe = super().from_single_file(pretrained_model_link_or_path, **kwargs)  # type: ignore[misc]
            return _begin(pipe, request)
        for name in ("local_files_only", "config"):
            kwargs.pop(name, None)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        return _begin(adopt(open_single_file(file, base, config, dtype, **kwargs)), request)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As diffusers'; without keywords of `hcf.accelerate` those of `pipeline` hold.

        The components are shared, and so are their engines where they do for both.
        """
        return _derived(super().from_pipe, pipeline, kwargs)  # type: ignore[misc]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As diffusers', but a LoRA that does not fit this model is an error before it is loaded:
        InvalidArtifact names the first layer. diffusers leaves such layers out with a warning."""
        given = pretrained_model_name_or_path_or_dict
        check_pipeline_lora(self, given, **kwargs)
        super().load_lora_weights(given, adapter_name, **kwargs)  # type: ignore[misc]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        super().to(*args, **kwargs)  # type: ignore[misc]
        kinds = (str, torch.device, int)
        if any(isinstance(value, kinds) for value in (*args, kwargs.get("device"))):
            settle(self)
        return self

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """As diffusers', in safetensors, under published names: the plain weights, no engine."""
        if not safe_serialization:
            raise UnsafeFile(
                "safe_serialization=False would write pickles", "leave it out: safetensors is safe"
            )
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        for name, module in self.components.items():  # type: ignore[attr-defined]
            if type(module).__name__ == "CLIPTextModel":
                publish_names(Path(save_directory) / name)

    def enable_freeu(self, *args: Any, **kwargs: Any) -> None:
        _refuse_with_engines(self, "FreeU changes the U-Net's code, which an engine does not run")
        super().enable_freeu(*args, **kwargs)  # type: ignore[misc]

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        _refuse_with_engines(self, "engines hold weights of their own, which stay where they are")
        super().enable_model_cpu_offload(*args, **kwargs)  # type: ignore[misc]

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        _refuse_with_engines(self, "engines hold weights of their own, which stay where they are")
        super().enable_sequential_cpu_offload(*args, **kwargs)  # type: ignore[misc]


class Choosing:
    """Goes before diffusers' classes whose pipelines are of the class that the model asks for."""

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str | Path, **kwargs: Any) -> Any:
        """As `Accelerated.from_pretrained`; the pipeline is of this module's class."""
        base: Any = cls.__bases__[-1]  # by the module of the class diffusers finds its own
        folder = Path(pretrained_model_or_path)
        if base.__name__ == "DiffusionPipeline" and (folder / INDEX).is_file():
            base = pipeline_class(folder)
        return _loaded(base.from_pretrained, pretrained_model_or_path, kwargs)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As `Accelerated.from_pipe`; the pipeline is of this module's class."""
        return _derived(super().from_pipe, pipeline, kwargs)  # type: ignore[misc]


def _loaded(load: Callable[..., Any], path: str | Path, kwargs: dict[str, Any]) -> Any:
    """What `from_pretrained` of diffusers, `load`, returns, checked and accelerated."""
    request = _split(kwargs)
    if kwargs.setdefault("use_safetensors", True) is False:
        raise UnsafeFile(
            "use_safetensors=False would read pickles, which can run any code",
            fix="leave it out; convert the weights to .safetensors where you trust them",
        )
    folder = Path(path)
    if not (folder / INDEX).is_file():
        return _begin(adopt(load(path, **kwargs)), request)
    variant = kwargs["variant"] = find_variant(folder, kwargs.get("variant"))
    given = set(kwargs)
    check_parts(folder, variant, given)
    if (folder / MANIFEST).is_file() and read_manifest(folder).engines:
        request.path = folder
    pipe = load(path, **kwargs)
    check_loaded(pipe, folder, variant, given)
    return _begin(adopt(pipe), request)


def _derived(derive: Callable[..., Any], pipeline: Any, kwargs: dict[str, Any]) -> Any:
    """What `from_pipe` of diffusers, `derive`, returns, accelerated as `pipeline` is."""
    request = _split(kwargs)
    return _begin(adopt(derive(pipeline, **kwargs)), request, like=pipeline)


def adopt(pipe: Any) -> Any:
    """Makes a diffusers pipeline one of this module's, in place: the class alone is another."""
    if not isinstance(pipe, Accelerated):
        base: Any = type(pipe)
        pipe.__class__ = drop_in(base)
    return pipe


def _begin(pipe: Any, request: Request, like: Any = None) -> Any:
    """Gives a pipeline that was just made its engines, or has it wait for a device.

    `like` is the pipeline it shares components with.
    """
    before: Request | None = getattr(like, "_hcf_request", None)
    if before is not None and request.keywords == _keywords():
        request = Request(before.keywords, before.path)
    pipe._hcf_request, pipe.hcf_report = request, []
    as_before = request.keywords == (before.keywords if before else _keywords())
    made = {report.component: report for report in getattr(like, "hcf_report", [])}
    wanted = request.keywords["components"] or default_components(pipe)
    if as_before and set(wanted) <= set(made):
        pipe.hcf_report = request.report = [made[name] for name in wanted]
        request.device = pipe.device.type
    waits = torch.cuda.is_available() and pipe.device.type == "cpu"
    if not waits or request.keywords["engine"] == "eager":
        settle(pipe)
    return pipe


def settle(pipe: Any) -> None:
    """Gives the pipeline the engines that were asked for, unless it has them.

    Raises HcfError where a component was replaced under an artefact's engines.
    """
    request: Request | None = pipe._hcf_request
    if request is None or request.busy:
        return
    if request.device is not None and pipe.hcf_report is not request.report:
        pipe._hcf_request = None  # hcf.accelerate or hcf.decelerate was called since
        return
    replaced = _replaced(pipe)
    if request.device == pipe.device.type and not replaced:
        return
    if replaced and request.path is not None:
        raise HcfError(
            f"{', '.join(replaced)} was replaced, and the engines of {request.path} are of another",
            fix="hcf.decelerate(pipe), or hcf.accelerate(pipe) to build engines of it",
        )
    request.busy = True
    try:
        accelerate(pipe, request.path, **request.keywords)
    finally:
        request.busy = False
    request.device, request.report = pipe.device.type, pipe.hcf_report


def _replaced(pipe: Any) -> list[str]:
    """Components that an engine was made for, and whose module is another one now."""
    engines = [r for r in pipe.hcf_report if (r.engine, r.precision) != ("eager", "fp32")]
    if not engines:
        return []
    routes = routes_of(pipe)
    return [report.component for report in engines if report.component not in routes]


def _refuse_with_engines(pipe: Any, reason: str) -> None:
    if routes_of(pipe):
        names = ", ".join(routes_of(pipe))
        raise HcfError(f"{names} run on engines: {reason}", "load the pipeline with engine='eager'")


def publish_names(folder: Path) -> None:
    """Gives a saved CLIPTextModel the names that every version of transformers reads.

    transformers 5.6 dropped the prefix `text_model.`; 4 would draw all weights at random.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    def published(name: str) -> str:
        return name if name.startswith("text_model.") else f"text_model.{name}"

    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
            tensors = {published(name): stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        temporary = file.with_name(f".hcf-{file.name}")
        save_file(tensors, temporary, metadata)
        temporary.replace(file)
    for index in folder.glob("*.safetensors.index*.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        names = content["weight_map"]
        content["weight_map"] = {published(name): shard for name, shard in names.items()}
        index.write_text(json.dumps(content, indent=2), encoding="utf-8")


@functools.cache
def drop_in(base: Any) -> Any:
    """The class of this module for a diffusers pipeline class, under the same name."""
    if base.__name__ in CHOOSING:
        return type(
            base.__name__, (Choosing, base), {"__module__": __name__, "__doc__": base.__doc__}
        )
    members = {"__module__": __name__, "__doc__": base.__doc__, "__call__": _calling(base)}
    encode = getattr(base, "encode_prompt", None)
    if encode is not None and "clip_skip" in inspect.signature(encode).parameters:
        members["encode_prompt"] = _encoding(encode)
    return type(base.__name__, (Accelerated, base), members)


def _calling(base: Any) -> Callable[..., Any]:
    call = base.__call__

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        settle(self)
        return call(self, *args, **kwargs)

    return __call__


def _encoding(encode: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(encode)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _inner_text_model(getattr(self, "text_encoder", None)):
            return encode(self, *args, **kwargs)

    return encode_prompt


@contextlib.contextmanager
def _inner_text_model(text_encoder: Any) -> Iterator[None]:
    """Inside, a CLIPTextModel has the attribute `text_model`, which clip_skip reads.

    transformers 5.6 made it one module instead of two; diffusers 0.42 knows the two.
    """
    flat = isinstance(text_encoder, nn.Module) and not hasattr(text_encoder, "text_model")
    if flat:
        # beside torch's registry, so that no weight appears twice
        text_encoder.__dict__["text_model"] = text_encoder
    try:
        yield
    finally:
        if flat:
            text_encoder.__dict__.pop("text_model", None)


def _placeholder(base: Any) -> type:
    """A class that says what is missing as soon as it is used."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        check_backends(base)

    def method(cls: Any, *args: Any, **kwargs: Any) -> Any:
        check_backends(base)

    names = ("from_pretrained", "from_single_file", "from_pipe")
    methods = {name: classmethod(method) for name in names}
    return type(base.__name__, (), {"__module__": __name__, "__init__": __init__, **methods})


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hcf.pipelines' has no attribute '{name}'")
    library = "taiji.pipelines" if name.startswith("Taiji") else "diffusers"
    base = getattr(importlib.import_module(library), name)
    found = _placeholder(base) if missing_backends(base) else drop_in(base)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
