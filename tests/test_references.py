"""Names of models, results and commits, and comparisons of two versions of the code; no speeds.

The repository is made of this tree's sources with commits of its own, so it needs no history.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from hcf.artifact import Sampling, clone_artifact, read_manifest, write_manifest
from hcf.errors import HcfError, RecipeError
from hcf.settings import BenchConfig
from hcf_bench.environment import read_environment
from hcf_bench.records import Record, Row
from hcf_bench.references import compare_references
from hcf_bench.results import Latency, Measurement, Side, write_result
from hcf_bench.revisions import CHECKOUT, Reference, checked_out, resolve, source_roots
from hcf_bench.statistics import Verdict

# So wide a margin that a loaded machine cannot decide otherwise, and few pairs.
CONFIG = BenchConfig(pairs=6, budget_s=20.0, threads=1, threshold=20.0)
# A budget that the first launch of two processes fills: no verdict yet, but all else of it.
ONE_LAUNCH = CONFIG.model_copy(update={"budget_s": 5.0})
SETTINGS: dict[str, Any] = {"workload": "tiny/unet", "log": lambda line: None}


def git(repo: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    command = ["git", "-C", str(repo), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(repo: Path, message: str) -> str:
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "--no-verify", "-m", message)
    return git(repo, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree's sources with one commit for each kind of candidate, as tags, on branch main."""
    repo = tmp_path_factory.mktemp("repository")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "hcf", repo / "hcf", ignore=ignore)
    shutil.copytree(CHECKOUT / "models/taiji", repo / "models/taiji", ignore=ignore)
    (repo / ".gitignore").write_text("__pycache__/\n")
    git(repo, "init", "-q", "-b", "main")
    commit(repo, "first")
    git(repo, "tag", "v1.0")
    package = repo / "hcf/__init__.py"
    plain = package.read_text()

    def version(name: str, code: str) -> None:
        package.write_text(plain + code)
        commit(repo, name)
        git(repo, "tag", name)
        git(repo, "reset", "-q", "--hard", "v1.0")

    version("other", "\nOTHER = True\n")
    version("raising", "\nraise RuntimeError(f'boom in {__file__}')\n")
    version("hanging", "\nimport time\ntime.sleep(600)\n")
    infinite = "lambda s, x: s._conv_forward(x, s.weight, None) / 0"
    version("not-finite", f"\nimport torch\ntorch.nn.Conv2d.forward = {infinite}\n")
    git(repo, "rm", "-rq", "hcf")
    commit(repo, "empty")
    git(repo, "tag", "no-hcf")
    git(repo, "reset", "-q", "--hard", "v1.0")
    return repo


@pytest.fixture
def model(tiny_folder: Path) -> Path:
    """The tiny pipeline as an artefact that is sampled in 2 steps."""
    target = tiny_folder.with_name("artefact")
    manifest = clone_artifact(tiny_folder, target)
    manifest.sampling = Sampling(steps=2, guidance_scale=1.0)
    write_manifest(target, manifest)
    return target


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Any:
    """No test leaves a worktree or a branch, here or in the test's repository."""
    yield
    if "repository" in request.fixturenames:
        repo = request.getfixturevalue("repository")
        assert len(git(repo, "worktree", "list", "--porcelain").split("\n\n")) == 1
        assert git(repo, "branch", "--list", "--format=%(refname:short)") == "main"
        assert git(repo, "status", "--porcelain") == ""


def record_of(path: Path, threads: int = 1, **changes: Any) -> Path:
    """A suite's record with one row of tiny/unet by eager."""
    latency = Latency.of([20.0 + i for i in range(9)])
    row = Row(workload="tiny/unet", subject="eager", batch=2, latency=latency)
    record = Record(
        name="cpu",
        date=date(2026, 1, 2),
        commit="0" * 40,
        command="",
        environment=read_environment(threads).model_copy(update=changes),
        rows=(row, row.model_copy(update={"subject": "openvino", "latency": None})),
    )
    path.write_text(record.model_dump_json())
    return path


def measurement_of(path: Path, samples_ms: list[float]) -> Path:
    side = Side(name="stored", latency=Latency.of(samples_ms))
    words = "pipeline end to end, batch 1"
    return write_result(
        path, Measurement(workload=words, subject=side, seed=0, environment=read_environment(1))
    )


def test_a_name_is_a_model_a_result_a_commit_or_the_working_tree(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sha = git(repository, "rev-parse", "v1.0^{commit}")
    for ref in ("HEAD", "main", "v1.0"):
        assert resolve(ref, repository) == Reference("commit", f"{ref} ({sha[:7]})", None, sha)
    assert resolve(sha[:9], repository).label == sha[:7]
    tree = resolve(".", repository / "models")
    assert tree == Reference("tree", f"working tree ({sha[:7]})", repository, sha)
    for name in ("model_index.json", "hcf_manifest.json"):
        (tmp_path / name[:5]).mkdir()
        (tmp_path / name[:5] / name).write_text("{}")
        found = resolve(name[:5], repository)
        assert (found.kind, found.label, found.path) == ("folder", name[:5], Path(name[:5]))
    (tmp_path / "stored.json").write_text("{}")
    assert resolve("stored.json", repository).kind == "result"


def test_a_working_tree_with_changes_is_dirty(repository: Path) -> None:
    (repository / "hcf/__init__.py").write_text("")
    try:
        assert resolve(".", repository).label.endswith("-dirty)")
    finally:
        git(repository, "reset", "-q", "--hard", "v1.0")


def test_a_path_goes_before_a_revision_of_its_name(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sha = git(repository, "rev-parse", "main")
    (tmp_path / "main").mkdir()
    assert resolve("main", repository).label == f"main (commit {sha[:7]}, not the path)"
    (tmp_path / "main/model_index.json").write_text("{}")
    found = resolve("main", repository)
    assert (found.kind, found.label) == ("folder", f"main (the path, not commit {sha[:7]})")


def test_a_name_that_means_nothing_says_what_was_tried(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no such path, and no such commit") as caught:
        resolve("mian", repository)
    assert "did you mean main?" in caught.value.fix
    with pytest.raises(RecipeError, match="has no model_index.json and no hcf_manifest.json"):
        resolve(str(tmp_path), repository)
    with pytest.raises(RecipeError, match="not a git repository"):
        resolve("main", tmp_path)
    for ref in ("--all", "-x", ""):
        with pytest.raises(RecipeError, match="nothing that can be compared"):
            resolve(ref, repository)
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", "shallow")
    with pytest.raises(RecipeError, match="fetch --unshallow"):
        resolve("HEAD~3", tmp_path / "shallow")


def test_a_checked_out_commit_is_gone_afterwards_also_after_an_error(repository: Path) -> None:
    sha = git(repository, "rev-parse", "other^{commit}")
    with checked_out(sha, repository) as first, checked_out(sha, repository) as second:
        assert first != second
        assert "OTHER = True" in (first / "hcf/__init__.py").read_text()
        assert (second / "models/taiji").is_dir()
    assert not first.exists() and not second.exists()
    with pytest.raises(ZeroDivisionError), checked_out(sha, repository) as tree:
        raise ZeroDivisionError
    assert not tree.exists()
    with pytest.raises(HcfError, match="cannot check out"), checked_out("f" * 40, repository):
        pass


def test_the_extension_is_built_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "setup.py").write_text("import sys\nopen('built', 'w').write(' '.join(sys.argv))\n")
    good = commit(tmp_path, "builds")
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler')\n")
    bad = commit(tmp_path, "does not")
    monkeypatch.delenv("HCF_BUILD_CUDA", raising=False)
    with checked_out(bad, tmp_path) as tree:
        assert not (tree / "built").exists()
    monkeypatch.setenv("HCF_BUILD_CUDA", "1")
    with checked_out(good, tmp_path) as tree:
        assert (tree / "built").read_text() == "setup.py build_ext --inplace"
    with pytest.raises(HcfError, match="does not build: no compiler"), checked_out(bad, tmp_path):
        pass
    assert not tree.exists()
    assert "\n\n" not in git(tmp_path, "worktree", "list", "--porcelain")


def test_the_sources_are_the_commits_and_the_harness_is_ours(repository: Path) -> None:
    roots = source_roots(repository)
    assert roots == (repository, repository / "models", CHECKOUT / "bench")


@pytest.mark.parametrize("folder", [CHECKOUT, Path("/")])
def test_a_worker_imports_its_own_commit(
    repository: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the package is installed editable, and wherever the command is started."""
    monkeypatch.chdir(folder)
    found = compare_references("raising", "v1.0", CONFIG, root=repository, **SETTINGS)
    sha = git(repository, "rev-parse", "raising^{commit}")
    assert found.verdict is Verdict.INVALID and found.speedup is None
    assert found.reason.startswith(f"raising ({sha[:7]}): eager on tiny/unet ended with 1")
    assert f"boom in {Path('/')}" in found.reason and f"{sha[:12]}/hcf/__init__.py" in found.reason
    assert Path.cwd() == folder


@pytest.mark.slow
def test_two_commits_are_compared_side_by_side(repository: Path) -> None:
    lines: list[str] = []
    settings = {**SETTINGS, "log": lines.append}
    found = compare_references("v1.0", "other", ONE_LAUNCH, root=repository, **settings)
    shas = [git(repository, "rev-parse", f"{ref}^{{commit}}") for ref in ("v1.0", "other")]
    names = (f"v1.0 ({shas[0][:7]})", f"other ({shas[1][:7]})")
    assert found.verdict is Verdict.UNDECIDED and found.paired, found.reason
    assert found.pairs == CONFIG.pairs * found.launches and "launches" in found.reason
    assert found.speedup is not None and found.speedup.value > 0.0
    assert (found.baseline.name, found.candidate.name) == names
    sources = tuple(f"{n}: sources of {s}" for n, s in zip(names, shas, strict=True))
    assert found.notes[1:] == sources
    assert found.workload == "tiny/unet by eager, batch 2"
    assert found.fidelity["max_abs_error"] == 0.0
    assert found.baseline.engines[0]["threads"] == 1
    assert lines[-1] == found.headline()


@pytest.mark.slow
def test_the_working_tree_runs_a_model_in_stages(repository: Path, model: Path) -> None:
    settings: dict[str, Any] = {"model": model, "log": lambda line: None}
    found = compare_references("HEAD", ".", ONE_LAUNCH, root=repository, **settings)
    assert found.verdict is Verdict.UNDECIDED, found.reason
    assert found.workload == "pipeline end to end, batch 1"
    for side in (found.baseline, found.candidate):
        assert side.stages is not None and side.stages.denoise_ms > 0.0
        assert side.engines[0]["engine"] == "eager"
        assert side.sampling["num_inference_steps"] == 2
        assert side.content_hash == read_manifest(model).content_hash
    assert "anything but SAME is a false alarm" in found.notes[-1]


def test_a_side_that_fails_makes_it_invalid(repository: Path) -> None:
    found = compare_references("v1.0", "raising", CONFIG, root=repository, **SETTINGS)
    assert found.verdict is Verdict.INVALID and found.speedup is None
    assert found.reason.startswith("raising (") and "RuntimeError: boom" in found.reason
    assert found.baseline.latency is None


def test_a_side_that_hangs_is_killed(repository: Path) -> None:
    began = time.monotonic()
    found = compare_references(
        "hanging", "v1.0", CONFIG, root=repository, allowance_s=0.5, **SETTINGS
    )
    assert found.verdict is Verdict.INVALID
    assert found.reason.startswith("hanging (") and "was killed" in found.reason
    assert time.monotonic() - began < 60.0


def test_code_that_is_not_this_toolkit_is_refused(repository: Path) -> None:
    with pytest.raises(RecipeError, match="no-hcf .* holds no sources of hcf"):
        compare_references("no-hcf", "v1.0", CONFIG, root=repository, **SETTINGS)


@pytest.mark.slow
def test_two_folders_share_a_process_or_take_one_each(model: Path) -> None:
    lines: list[str] = []
    ref = str(model)
    one = compare_references(ref, ref, CONFIG, log=lines.append)
    assert one.verdict is Verdict.SAME
    assert lines[:2] == ["compare artefact with artefact", "load artefact on auto"]
    two = compare_references(ref, ref, ONE_LAUNCH, processes=2, log=lines.append)
    assert two.verdict is Verdict.UNDECIDED and "a process of its own" in two.notes[0]
    assert two.baseline.name == "artefact, 2 steps, eager fp32"
    assert (two.workload, two.baseline.sampling) == (one.workload, one.baseline.sampling)
    assert two.candidate.stages is not None and two.fidelity == {}


def test_code_is_timed_against_the_row_of_a_record(repository: Path, tmp_path: Path) -> None:
    stored = str(record_of(tmp_path / "record.json"))
    found = compare_references(stored, "other", CONFIG, root=repository, **SETTINGS)
    assert found.verdict is Verdict.SAME and not found.paired, found.reason
    assert "unpaired" in found.reason and found.baseline.name == "eager in record.json"
    assert found.candidate.latency is not None
    assert len(found.candidate.latency.samples_ms) == CONFIG.pairs


def test_a_row_of_another_machine_is_not_compared(repository: Path, tmp_path: Path) -> None:
    stored = str(record_of(tmp_path / "record.json", cpu_model="another"))
    found = compare_references(stored, "other", CONFIG, root=repository, **SETTINGS)
    assert found.verdict is Verdict.INVALID and not found.paired and found.speedup is None
    assert "cpu_model: another and " in found.reason
    failed = compare_references(
        str(record_of(tmp_path / "same.json")), "raising", CONFIG, root=repository, **SETTINGS
    )
    assert failed.verdict is Verdict.INVALID and "RuntimeError: boom" in failed.reason


def test_output_that_is_not_finite_is_not_timed(repository: Path, tmp_path: Path) -> None:
    stored = str(record_of(tmp_path / "record.json"))
    config = CONFIG.model_copy(update={"budget_s": 1.0})
    found = compare_references(stored, "not-finite", config, root=repository, **SETTINGS)
    assert found.verdict is Verdict.INVALID and found.speedup is None
    assert "not finite" in found.reason


def test_a_row_that_is_not_there_is_named_with_those_that_are(
    repository: Path, tmp_path: Path
) -> None:
    stored = str(record_of(tmp_path / "record.json"))
    asked: list[dict[str, Any]] = [{"workload": "tiny/unet", "peer": "openvino"}]
    for settings in (*asked, {"workload": "sd15/unet"}, {}):
        with pytest.raises(RecipeError, match="without times of") as caught:
            compare_references(stored, "v1.0", CONFIG, root=repository, **settings)
        assert "tiny/unet by eager, batch 2" in caught.value.fix


def test_a_model_is_timed_against_stored_times(
    repository: Path, model: Path, tmp_path: Path
) -> None:
    stored = str(measurement_of(tmp_path / "stored.json", [30.0, 31.0, 32.0, 33.0, 34.0, 35.0]))
    lines: list[str] = []
    by_folder = compare_references(stored, str(model), CONFIG, log=lines.append)
    by_code = compare_references(
        stored, "other", CONFIG, root=repository, model=model, log=lines.append
    )
    for found in (by_folder, by_code):
        assert not found.paired and found.verdict is not Verdict.INVALID, found.reason
        assert found.candidate.stages is not None
    with pytest.raises(RecipeError, match="of which"):
        compare_references(stored, "other", CONFIG, root=repository)
    with pytest.raises(RecipeError, match="not of tiny/unet"):
        compare_references(stored, "other", CONFIG, root=repository, **SETTINGS)


@pytest.mark.parametrize(
    ("baseline", "candidate", "settings", "message"),
    [
        ("model", "v1.0", {}, "one is a model, the other is code"),
        ("v1.0", "model", {}, "one is a model, the other is code"),
        ("model", "stored.json", {}, "only a baseline can be"),
        ("v1.0", "stored.json", {}, "only a baseline can be"),
        ("v1.0", "other", {"processes": 1}, "do not fit one process"),
        ("v1.0", "other", {"processes": 3}, "1 process or 2, not 3"),
        ("stored.json", "model", {"processes": 2}, "one process is timed"),
        ("model", "model", {"workload": "tiny/unet"}, "tiny/unet is not run by it"),
        ("v1.0", "other", {"model": Path("nowhere")}, "nowhere holds no model"),
        ("v1.0", "other", {"model": Path("model"), "workload": "tiny/unet"}, "both to be run"),
        ("v1.0", "other", {"workload": "tiny/unett"}, "tiny/unett"),
        ("v1.0", "other", {"workload": "tiny/unet", "peer": "eagre"}, "eagre"),
        (
            "v1.0",
            "other",
            {"workload": "tiny/unet", "engines": ("eager", "auto")},
            "an engine is a model's",
        ),
        ("v1.0", "other", {"device": "cuda"}, "cuda is for a workload"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    baseline: str,
    candidate: str,
    settings: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text(json.dumps({}))
    measurement_of(tmp_path / "stored.json", [1.0])
    with pytest.raises(RecipeError, match=message):
        compare_references(baseline, candidate, CONFIG, root=repository, **settings)
