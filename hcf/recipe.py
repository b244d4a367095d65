"""A recipe: YAML, read with safe_load into strict models, that says what one run does to a model.

    name: quickstart
    model: models/weights/taiji-sd-mini
    output: out/quickstart
    import: shared/defaults.yaml      # relative to this file; what is written here wins
    distill: {steps: 4}
    check: {thresholds: {clip_zh: {ratio_min: 0.98}}}

A stage that is not named is not run. An unknown key is an error that offers the nearest name.
`seed`, `threads` and `prompts` of the top level hold for every stage that does not set its own.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hcf.errors import RecipeError

STAGES = ("distill", "quantize", "export", "build", "check", "bench", "report")
INHERITED = ("seed", "threads", "prompts")
EngineName = Literal["eager", "compile", "onnxruntime", "openvino", "tensorrt"]
Precision = Literal["fp32", "bf16", "int8"]


class Config(BaseModel):
    """One section of a recipe: no unknown keys, no changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DistillConfig(Config):
    """Teacher into a student of `steps` steps, its guidance scale folded in.

    `solver_steps` is the teacher's grid, cut into `steps` phases; the teacher goes `skip` of its
    points per target; `precision` is that of training.
    """

    method: Literal["consistency"] = "consistency"
    steps: int = Field(4, gt=0)
    guidance_scale: float = Field(3.0, ge=1)
    solver_steps: int = Field(48, gt=0)
    skip: int = Field(1, gt=0)
    train_steps: int = Field(1000, gt=0)
    batch_size: int = Field(64, gt=0)
    learning_rate: float = Field(2e-4, gt=0)
    warmup_steps: int = Field(50, ge=0)
    ema_decay: float = Field(0.99, ge=0, lt=1)
    huber_c: float = Field(1e-3, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0


class ExcludeRule(Config):
    """Layers matching `pattern` stay in floating point (`exclude: false` takes them back in)."""

    pattern: str
    reason: str
    exclude: bool = True


class QuantizeConfig(Config):
    """Post-training INT8 of one component: per-channel weights, static per-tensor activations.

    `calibration_prompts` is a list or a JSON file with one; without it the model's own captions.
    `exclude` rules are ordered, come after the built-in ones, and the last match decides.
    """

    component: Literal["unet"] = "unet"
    format: Literal["int8"] = "int8"
    algorithm: Literal["max", "percentile", "mse"] = "max"
    percentile: float = Field(99.99, gt=50, le=100)
    calibration_prompts: list[str] | Path = []
    calibration_samples: int = Field(64, gt=0)
    batch_size: int = Field(8, gt=0)
    exclude: list[ExcludeRule] = []
    seed: int = 0


class ExportConfig(Config):
    """Components to ONNX. `tolerance` bounds the relative L2 error of the graph against torch."""

    components: list[str] = ["unet", "vae_decoder"]
    opset: int = Field(20, ge=17, le=24)
    dynamic: bool = True
    exporter: Literal["dynamo", "torchscript"] = "dynamo"
    tolerance: float = Field(1e-3, gt=0)
    seed: int = 0


class BuildConfig(Config):
    """Engines to build and time; the fastest of each component is chosen by measurement.

    Shapes are `{input name: [1, 8, 16, 16]}`; without them `batch` and the model's own size.
    `compute_capabilities` ("8.0") are TensorRT targets that need no GPU here.
    """

    engines: list[EngineName] = ["eager", "onnxruntime", "openvino"]
    precisions: list[Precision] = ["fp32", "bf16", "int8"]
    components: list[str] = ["unet", "vae_decoder"]
    batch: int = Field(1, gt=0)
    min_shapes: dict[str, list[int]] = {}
    opt_shapes: dict[str, list[int]] = {}
    max_shapes: dict[str, list[int]] = {}
    compute_capabilities: list[str] = []
    builder_optimization_level: int = Field(3, ge=0, le=5)
    threads: int | None = Field(None, gt=0)
    repeats: int = Field(20, gt=0)
    seed: int = 0


class Threshold(Config):
    """Bounds on one metric of the candidate: absolute, relative to the baseline, or a difference.

    `drop_max`: baseline minus candidate may not exceed it.
    """

    min: float | None = None
    max: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    drop_max: float | None = None

    @model_validator(mode="after")
    def _bounds_something(self) -> Threshold:
        if not self.model_fields_set:
            raise ValueError("a threshold needs one of min, max, ratio_min, ratio_max, drop_max")
        return self


class CheckConfig(Config):
    """Candidate against baseline on `images` fixed seeds; a threshold on a missing metric fails.

    `baseline` and `candidate` name artefacts of the run: the given model, the distilled student,
    the built result. `prompts` is a list or a file like check_prompts.json.
    """

    name: str = "quality"
    baseline: Literal["teacher", "student"] = "teacher"
    candidate: Literal["student", "result"] = "result"
    images: int = Field(256, gt=0)
    batch_size: int = Field(16, gt=0)
    prompts: list[str] | Path | None = None
    thresholds: dict[str, Threshold] = {}
    threads: int | None = Field(None, gt=0)
    seed: int = 0


class BenchConfig(Config):
    """Interleaved pairs of teacher and result until decided, within `budget_s` seconds.

    A ratio within `threshold` of 1 or a difference below `floor_ms` counts as the same speed.
    `min_speedup`: the lower bound of the end-to-end interval must reach it; `min_denoiser_speedup`
    likewise for the denoiser alone, over eager fp32.
    """

    pairs: int = Field(10, gt=0)
    budget_s: float = Field(60.0, gt=0)
    batch: int = Field(1, gt=0)
    prompts: list[str] = []
    threads: int | None = Field(None, gt=0)
    threshold: float = Field(0.01, ge=0)
    floor_ms: float = Field(0.0, ge=0)
    min_speedup: float | None = Field(None, gt=0)
    min_denoiser_speedup: float | None = Field(None, gt=0)
    seed: int = 0


class ReportConfig(Config):
    """The page, the card and the grid: teacher, student and result side by side.

    `prompts` (without it the first `images` of the model's check prompts) from seeds `seed` on.
    `licence` (SPDX, lower case) goes into the model card; `name` is the recipe's unless given.
    """

    name: str = ""
    title: str = ""
    prompts: list[str] = []
    images: int = Field(12, gt=0)
    licence: str = ""
    threads: int | None = Field(None, gt=0)
    seed: int = 0


class Recipe(Config):
    """A whole run: `model` (pipeline folder) through the named stages into `output`."""

    name: str
    model: Path
    output: Path
    seed: int = 0
    threads: int | None = Field(None, gt=0)
    prompts: list[str] = []
    distill: DistillConfig | None = None
    quantize: QuantizeConfig | None = None
    export: ExportConfig | None = None
    build: BuildConfig | None = None
    check: list[CheckConfig] = []
    bench: BenchConfig | None = None
    report: ReportConfig | None = None

    @field_validator("check", mode="before")
    @classmethod
    def _one_check_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, Mapping) else value or []

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tree = dict(tree)
        for stage in STAGES:
            section = tree.get(stage)
            fields = _model_in(cls.model_fields[stage].annotation).model_fields
            inherited = (*INHERITED, "name") if stage == "report" else INHERITED
            shared = {k: tree[k] for k in inherited if k in tree and k in fields}
            if isinstance(section, dict):
                tree[stage] = {**shared, **section}
            elif isinstance(section, list):
                tree[stage] = [{**shared, **s} if isinstance(s, dict) else s for s in section]
        return tree

    @model_validator(mode="after")
    def _build_needs_graphs(self) -> Recipe:
        if (
            self.build
            and not self.export
            and {"onnxruntime", "openvino", "tensorrt"} & {*self.build.engines}
        ):
            raise ValueError("build.engines use ONNX graphs: add an `export:` section")
        names = [check.name for check in self.check]
        if len(set(names)) < len(names):
            raise ValueError(f"the checks need distinct names, not {names}")
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads `path` with its imports, applies `a.b=c` overrides; RecipeError for anything amiss."""
    tree = read_tree(path)
    apply_overrides(tree, overrides)
    return parse(Recipe, tree, str(path))


Section = TypeVar("Section", bound=Config)


def stage_config(
    kind: type[Section],
    section: str,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    **options: Any,
) -> Section:
    """One section for a single command: the recipe's (or defaults), overrides, given options.

    Overrides are written as in a recipe (`distill.steps=8`); options that are None are left out.
    """
    tree = read_tree(recipe) if recipe else {}
    apply_overrides(tree, overrides)
    unknown = set(tree) - set(Recipe.model_fields)
    if unknown:
        parse(Recipe, {"name": "", "model": ".", "output": ".", **tree}, str(recipe or "--set"))
    values = tree.get(section) or {}
    if isinstance(values, list):
        values = values[0]
    shared = {k: tree[k] for k in INHERITED if k in tree and k in kind.model_fields}
    given = {k: v for k, v in options.items() if v is not None and v != []}
    return parse(kind, {**shared, **values, **given}, str(recipe or "options"), (section,))


def write_resolved(recipe: Recipe, path: Path) -> None:
    """The recipe as it was understood: every default and import written out."""
    tree = recipe.model_dump(mode="json", exclude_none=True)
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), encoding="utf-8")


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, merged over those that it imports."""
    path = path.resolve()
    if path in seen:
        raise RecipeError(f"{path} imports itself", fix="remove one of the `import:` lines")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, _yaml_names(path.parent), 1)
        fix = f"did you mean {near[0]}?" if near else "check the path"
        raise RecipeError(f"no recipe at {path}", fix) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}", "check indentation and quotes") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", "a recipe is a UTF-8 file") from error
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path} holds {type(tree).__name__}, not a mapping", "start with `name:`"
        )
    imports = tree.pop("import", [])
    merged: dict[str, Any] = {}
    for name in [imports] if isinstance(imports, str) else imports:
        merged = _merge(merged, read_tree(path.parent / str(name), (*seen, path)))
    return _merge(merged, tree)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets `a.b=value` in `tree`, in order; the value is read as YAML, a number is a list index."""
    for text in overrides:
        dotted, separator, value = text.partition("=")
        keys = dotted.strip().split(".")
        if not separator or not all(keys):
            raise RecipeError(
                f"--set {text!r} is not of the form a.b=value", "--set distill.steps=8"
            )
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {text!r}: {error}", "quote the value") from error
        node: Any = tree
        try:
            for key in keys[:-1]:
                if isinstance(node, list):
                    node = node[int(key)]
                else:
                    if node.get(key) is None:
                        node[key] = {}
                    node = node[key]
            node[int(keys[-1]) if isinstance(node, list) else keys[-1]] = parsed
        except (ValueError, IndexError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"--set {text!r}: {dotted} does not exist", "check the path"
            ) from error


Model = TypeVar("Model", bound=BaseModel)


def parse(kind: type[Model], tree: Any, source: str, prefix: tuple[str, ...] = ()) -> Model:
    """`tree` as `kind`; a RecipeError says where in `source` and offers the nearest name."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines, fixes = [], []
        for item in error.errors():
            where = ".".join(str(part) for part in (*prefix, *item["loc"])) or "recipe"
            if item["type"] == "extra_forbidden":
                known = _names_at(kind, item["loc"])
                near = difflib.get_close_matches(str(item["loc"][-1]), known, 1, 0.5)
                lines.append(f"{source}: unknown key {where}")
                fixes.append(f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
            elif item["type"] == "missing":
                lines.append(f"{source}: {where} is missing")
                fixes.append(f"add `{item['loc'][-1]}:`")
            else:
                lines.append(f"{source}: {where}: {item['msg']} (got {_short(item['input'])})")
        raise RecipeError("\n".join(lines), "; ".join(dict.fromkeys(fixes))) from error


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def _model_in(annotation: Any) -> type[BaseModel]:
    """The model class inside `X | None` or `list[X]`; Config where there is none."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else Config
    for inner in typing.get_args(annotation):
        if (found := _model_in(inner)) is not Config:
            return found
    return Config


def _names_at(kind: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """Field names of the model that holds the last part of `loc`."""
    for part in loc[:-1]:
        if part in kind.model_fields:
            kind = _model_in(kind.model_fields[str(part)].annotation)
    return list(kind.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _yaml_names(folder: Path) -> list[str]:
    return [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
