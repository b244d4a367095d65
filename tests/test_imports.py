"""Who may import whom, that the command starts light, and that the roots leak no names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = {"hcf": "hcf", "hcf_kernels": "kernels/hcf_kernels", "taiji": "models/taiji"}
ROOTS["hcf_bench"] = "bench/hcf_bench"
FORBIDDEN = {
    "hcf_kernels": {"hcf", "taiji", "hcf_bench"},
    "taiji": {"hcf", "hcf_kernels", "hcf_bench"},
    "hcf_bench": set[str](),
    "hcf": set[str](),
}
# Inside hcf upward only: a module may import from its own layer and from those before it.
LAYERS = (
    ("errors",),
    ("weights",),
    ("settings",),
    ("recipe", "artifact", "code_hash"),
    ("source_configs",),
    ("source_file",),
    ("source", "trace"),
    ("quality",),
    ("decode",),
    ("distill", "quantize", "fuse", "feature_cache"),
    ("export",),
    ("engines",),
    ("lora",),
    ("routing",),
    ("store",),
    ("load",),
    ("pipelines",),
    ("report", "doctor", "inspect", "generate"),
    ("run", "run_stages", "run_report"),
    ("sweep",),
    ("terminal",),
    (
        "cli",
        "cli_bench",
        "cli_data",
        "cli_dataset",
        "cli_measure",
        "cli_stages",
        "cli_suite",
        "cli_sweep",
    ),
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
# Nothing outside these imports hcf_bench, and only inside functions.
MAY_MEASURE = {"cli_bench", "cli_suite", "run_stages", "run_report", "sweep"}
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "modelopt",
         "tensorrt", "tensorrt_rtx", "torchmetrics", "numpy", "accelerate")  # fmt: skip


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module, whether it runs when the file is imported) of every import statement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from hcf import trace` names the module trace as well as the package
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in inside


def files(package: str) -> list[Path]:
    return sorted((ROOT / ROOTS[package]).rglob("*.py"))


@pytest.mark.parametrize("package", [name for name in ROOTS if (ROOT / ROOTS[name]).is_dir()])
def test_packages_import_only_downwards(package: str) -> None:
    assert files(package)
    for path in files(package):
        for name, _ in imports(path):
            assert name.split(".")[0] not in FORBIDDEN[package], f"{path} imports {name}"


def test_hcf_imports_upward_only() -> None:
    for path in files("hcf"):
        own = path.relative_to(ROOT / "hcf").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in LAYER, f"hcf/{own} has no place in the order of layers"
        for name, _ in imports(path):
            package, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if package == "hcf" and target in LAYER:
                assert LAYER[target] <= LAYER[own], f"{path}: {own} may not import {target}"


def test_bench_and_models_are_imported_lazily_by_hcf() -> None:
    for path in files("hcf"):
        own = path.relative_to(ROOT / "hcf").parts[0].removesuffix(".py")
        for name, at_import in imports(path):
            if name.startswith(("hcf_bench", "taiji")):
                assert not at_import, f"{path} imports {name} when it is imported"
            if name.startswith("hcf_bench"):
                assert own in MAY_MEASURE, f"{path} imports {name}"


@pytest.mark.parametrize(
    "statement",
    ["import hcf", "import hcf.cli", "import hcf.run, hcf.run_stages, hcf.recipe, hcf.artifact",
     "import hcf.doctor, hcf.inspect, hcf.generate"],
)  # fmt: skip
def test_lean_import(statement: str) -> None:
    code = f"{statement}; import sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert found.stdout.strip() == "[]"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\nfrom hcf.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert "distill" in found.stdout and found.stdout.strip().splitlines()[-1] == "[]"


def test_no_generic_name_becomes_importable() -> None:
    code = (
        "from importlib.util import find_spec\n"
        "print([n for n in ('kernels', 'models', 'bench', 'recipes', 'tests') if find_spec(n)])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert found.stdout.strip() == "[]"
    for folder in ("kernels", "models", "bench", "recipes", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_roots_are_typed_and_importable() -> None:
    for package in ("hcf", "taiji", "hcf_bench"):
        assert find_spec(package) is not None
        assert (ROOT / ROOTS[package] / "py.typed").is_file()


def test_hcf_load_is_a_function_even_after_its_module_was_imported() -> None:
    code = (
        "import hcf; from hcf.load import load; import hcf.load as again\n"
        "assert hcf.load is load and callable(hcf.accelerate), hcf.load; print(hcf.__version__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().count(".") == 2
