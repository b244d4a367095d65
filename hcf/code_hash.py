"""Which code made a result: a hash of source files, for the keys of results that are kept."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path


def code_hash(sources: Iterable[str]) -> str:
    """SHA-256 over the files of `sources`, such as "hcf/trace.py" or "hcf/export", templates too.

    A version number stays the same from one commit to the next, and what the commit makes does not.
    Raises FileNotFoundError for a source that is not there: it would change no key.
    """
    return _hash_once(tuple(sources))


# Read once: a process goes on with the code it imported, whatever a commit puts on the disk then.
@functools.cache
def _hash_once(sources: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in sources:
        package, _, rest = name.partition("/")
        spec = importlib.util.find_spec(package)
        roots = spec.submodule_search_locations if spec else None
        path = Path(roots[0]) / rest if roots else Path(name)
        if not path.exists():
            raise FileNotFoundError(f"{name}: no such source of a result that is kept")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
