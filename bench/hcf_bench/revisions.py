"""What a name means: a model folder, a stored result, a commit, the working tree."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hcf.artifact import MANIFEST
from hcf.errors import HcfError, MissingDependency, RecipeError
from hcf_bench.suite import source_commit

Kind = Literal["folder", "result", "commit", "tree"]
CHECKOUT = Path(__file__).parents[2]
MODEL_FILES = ("model_index.json", MANIFEST)
GIT_S, BUILD_S = 300.0, 1800.0
LAST_LINES = 6
# A git hook sets these for its own repository, and `git -C` would follow them.
GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")


@dataclass(frozen=True)
class Reference:
    """What a name means. `path` is the folder, the file or the working tree; a commit has none.

    `sha` is the commit's, with "-dirty" for a working tree that differs from it.
    """

    kind: Kind
    label: str
    path: Path | None = None
    sha: str = ""


def resolve(ref: str, root: Path) -> Reference:
    """What `ref` names: "." the working tree around `root`, a model, a stored .json, a revision.

    A path goes before a revision of the same name; the label then says which was meant.

    Raises:
        RecipeError: none of these; says what was tried, and which names are near.
    """
    if ref == ".":
        found = _git(root, "rev-parse", "--show-toplevel")
        tree = Path(found.stdout.strip()) if found.returncode == 0 else root.resolve()
        sha = source_commit(tree)
        return Reference("tree", f"working tree ({_short(sha)})", tree, sha)
    path, sha = Path(ref), _revision(ref, root)
    is_model = any((path / name).is_file() for name in MODEL_FILES)
    if is_model or (path.is_file() and path.suffix == ".json"):
        label = f"{ref} (the path, not commit {_short(sha)})" if sha else path.resolve().name
        return Reference("folder" if is_model else "result", label, path)
    if sha:
        meant = f"commit {_short(sha)}, not the path" if path.exists() else _short(sha)
        label = _short(sha) if sha.startswith(ref) else f"{ref} ({meant})"
        return Reference("commit", label, None, sha)
    raise _unknown(ref, path, root)


@contextmanager
def checked_out(sha: str, root: Path) -> Iterator[Path]:
    """The commit as a folder of its own, built where it must be, and gone afterwards.

    Raises:
        HcfError: git cannot check it out, or its extension does not build; with the last lines.
    """
    with tempfile.TemporaryDirectory(prefix="hcf-bench-", ignore_cleanup_errors=True) as folder:
        tree = Path(folder) / sha[:12]
        try:
            added = _git(root, "worktree", "add", "--quiet", "--detach", str(tree), sha)
            if added.returncode != 0:
                raise HcfError(f"git cannot check out {sha[:12]}: {_last_lines(added.stderr)}")
            _build_extension(tree)
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))
            _git(root, "worktree", "prune")


def source_roots(tree: Path) -> tuple[Path, ...]:
    """Folders that a worker of `tree` imports from, before all others.

    The harness is that of this checkout whatever the tree: times are only comparable if both sides
    were measured by the same code, and an old commit may have another harness or none.
    """
    roots = (tree, tree / "kernels", tree / "models", CHECKOUT / "bench")
    return tuple(root.resolve() for root in roots if root.is_dir())


def _build_extension(tree: Path) -> None:
    """The CUDA extension of a checked-out commit, where this machine builds it at all."""
    if os.environ.get("HCF_BUILD_CUDA") != "1" or not (tree / "setup.py").is_file():
        return
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    try:
        built = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=BUILD_S)
    except subprocess.TimeoutExpired:
        raise HcfError(f"{tree.name}: its extension was not built in {BUILD_S:g} s") from None
    if built.returncode != 0:
        said = f"{tree.name}: its extension does not build: {_last_lines(built.stderr)}"
        raise HcfError(said, "compare without it: unset HCF_BUILD_CUDA")


def _revision(ref: str, root: Path) -> str:
    """The commit's full hash; "" where `ref` is none."""
    if ref.startswith("-"):
        return ""
    found = _git(root, "rev-parse", "--quiet", "--verify", f"{ref}^{{commit}}")
    return found.stdout.strip() if found.returncode == 0 else ""


def _unknown(ref: str, path: Path, root: Path) -> RecipeError:
    tried = "there is no such path"
    if path.exists():
        tried = f"the path is no .json and has no {' and no '.join(MODEL_FILES)}"
    shallow = _git(root, "rev-parse", "--is-shallow-repository")
    if shallow.returncode != 0:
        tried += f", and git says: {_last_lines(shallow.stderr)}"
    else:
        tried += ", and no such commit, branch or tag"
    if shallow.stdout.strip() == "true":
        tried += " in this shallow clone (`git fetch --unshallow` gets the rest)"
    names = _git(root, "for-each-ref", "--format=%(refname:short)").stdout.split()
    near = difflib.get_close_matches(ref, names, 3, 0.5)
    return RecipeError(
        f"{ref!r} is nothing that can be compared: {tried}",
        (f"did you mean {', '.join(near)}? " if near else "")
        + "give a model folder, a stored .json, a commit, branch or tag, or `.`",
    )


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(root), "-c", f"core.hooksPath={os.devnull}", *arguments]
    places = {name: value for name, value in os.environ.items() if name not in GIT_PLACES}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, env=places)
    except FileNotFoundError:
        raise MissingDependency("git is not installed", "install git") from None
    except subprocess.TimeoutExpired:
        raise HcfError(f"git {arguments[0]} took longer than {GIT_S:g} s") from None


def _last_lines(text: str) -> str:
    return "; ".join(line.strip() for line in text.strip().splitlines()[-LAST_LINES:])


def _short(sha: str) -> str:
    """Its first seven characters, with "-dirty" where it has it."""
    return f"{sha[:7]}-dirty" if "-dirty" in sha else sha[:7]
