"""The four source roots of one distribution; everything else is in pyproject.toml.

The roots are folders without an `__init__.py` (kernels, models, bench), so that no generic
top-level name becomes importable: Hugging Face itself ships a distribution called `kernels`.
"""

from __future__ import annotations

import os
import subprocess
import sys

from setuptools import find_packages, setup

ROOTS = {"hcf": ".", "hcf_kernels": "kernels", "taiji": "models", "hcf_bench": "bench"}

packages: list[str] = []
package_dir: dict[str, str] = {}
for name, root in ROOTS.items():
    if not os.path.isfile(os.path.join(root, name, "__init__.py")):
        continue
    packages += find_packages(root, include=[name, name + ".*"])
    package_dir[name] = os.path.normpath(os.path.join(root, name))

if os.environ.get("HCF_BUILD_CUDA") == "1":
    # CUDA kernels ahead of time; needs torch and the extra `cuda`, so --no-build-isolation
    cubins = os.path.join("kernels", "hcf_kernels", "cubin")
    command = [sys.executable, "-m", "hcf_kernels.build", "--out", cubins]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": "kernels"})

DATA = "py.typed *.html *.jinja *.css *.json *.txt csrc/*.cu csrc/*.cuh csrc/*.h cubin/*.cubin"
setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"": [*DATA.split(), "tables/*.json"]},
)
