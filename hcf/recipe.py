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
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from hcf.errors import RecipeError
from hcf.settings import (
    BenchConfig,
    BuildConfig,
    CheckConfig,
    Config,
    DistillConfig,
    ExportConfig,
    FeatureCacheConfig,
    QuantizeConfig,
    ReportConfig,
    SensitivityConfig,
)

STAGES = (
    "distill",
    "sensitivity",
    "quantize",
    "export",
    "build",
    "check",
    "bench",
    "report",
)
INHERITED = ("seed", "threads", "prompts")


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
    sensitivity: SensitivityConfig | None = None
    export: ExportConfig | None = None
    build: BuildConfig | None = None
    cache: FeatureCacheConfig | None = None
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
        if self.cache and not (self.build and self.export):
            raise ValueError("a cache needs engines of its two steps: add `export:` and `build:`")
        if self.sensitivity and not self.quantize:
            raise ValueError("sensitivity chooses what quantize does: add a `quantize:` section")
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
