"""The fingerprint: complete, anonymous, and strict about what may be compared."""

from __future__ import annotations

import getpass
import platform

import pytest
import torch
from pydantic import ValidationError

from hcf_bench.environment import (
    Environment,
    Gpu,
    describe,
    installed_versions,
    read_environment,
    same_environment,
    usable_cores,
)


def test_this_machine_is_itself() -> None:
    environment = read_environment(threads=2)
    assert same_environment(environment, read_environment(threads=2)) == []
    assert environment.threads == 2
    assert environment.packages["torch"] == torch.__version__
    assert environment.cpu_cores == usable_cores() >= 1


def test_load_average_is_recorded_but_not_compared() -> None:
    environment = read_environment()
    busy = environment.model_copy(update={"load_average": environment.load_average + 7})
    assert same_environment(environment, busy) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"threads": 77}, "threads"),
        ({"cpu_model": "Another CPU"}, "Another CPU"),
        ({"packages": {"torch": "0.1"}}, "torch"),
        (
            {
                "gpus": (
                    Gpu(name="NVIDIA A100", driver="1", memory_mib=1, compute_capability="8.0"),
                )
            },
            "A100",
        ),
        ({"python": "3.0.0"}, "python"),
    ],
)
def test_every_difference_is_named(change: dict[str, object], named: str) -> None:
    environment = read_environment()
    differences = same_environment(environment, environment.model_copy(update=change))
    assert differences
    assert any(named in difference for difference in differences)


def test_nothing_names_the_machine_or_the_user() -> None:
    text = read_environment().model_dump_json()
    host = platform.node()
    if len(host) > 3:  # a host called "a" would be found in any text
        assert host not in text
    user = getpass.getuser()
    if len(user) > 3 and user not in ("root", "runner"):
        assert user not in text
    assert "/home" not in text and "/root" not in text


def test_the_schema_is_strict_and_round_trips() -> None:
    environment = read_environment()
    assert Environment.model_validate_json(environment.model_dump_json()) == environment
    with pytest.raises(ValidationError):
        Environment.model_validate({**environment.model_dump(), "hostname": "box"})


def test_description_and_versions_are_for_people() -> None:
    assert "cores" in describe(read_environment())
    versions = installed_versions()
    assert versions["torch"].startswith("2.")
    assert "not-a-package" not in versions
