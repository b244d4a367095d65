"""The npm packages the emoji data is built from: fixed versions, hashes, licences.

A package is a tarball that is read in memory: nothing is unpacked and none of its code runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Role = Literal["generator", "judge", "text"]


@dataclass(frozen=True)
class Package:
    """One pinned npm package: what it holds, who drew it and under which licence.

    `role` says who may see the art: the generator trains on its vendors, the judge on others.
    """

    name: str
    version: str
    sha256: str
    licence: str
    art: str
    source: str
    role: Role

    @property
    def tarball(self) -> str:
        """File name that `npm pack` gives the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT",
    "Emojibase names and tags, (c) 2017-2019 Miles Johnson",
    "https://github.com/milesj/emojibase",
    "text",
)

VENDORS: dict[str, Package] = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Noto Emoji, Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        "generator",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twemoji, Twitter Inc and other contributors",
        "https://github.com/jdecked/twemoji",
        "generator",
    ),
    "fluent-emoji-flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Fluent Emoji Flat, Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "generator",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "Emoji One (Colored), Emoji One",
        "https://github.com/EmojiTwo/emojitwo",
        "generator",
    ),
    "openmoji": Package(
        "@iconify-json/openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
        "OpenMoji, the OpenMoji authors",
        "https://github.com/hfg-gmuend/openmoji",
        "judge",
    ),
    "noto-v1": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "Noto Emoji v1, Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        "judge",
    ),
    "emojione-v1": Package(
        "@iconify-json/emojione-v1",
        "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        "CC-BY-SA-4.0",
        "Emoji One v1 (Colored), Emoji One",
        "https://github.com/joypixels/emojione-legacy",
        "judge",
    ),
    "fluent-emoji": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT",
        "Fluent Emoji, Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "judge",
    ),
}


def default_cache() -> Path:
    """Folder of downloaded packages: `$HCF_HOME/packages`, else `~/.cache/hcf/packages`."""
    home = os.environ.get("HCF_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "hcf") / "packages"


def obtain(package: Package, cache: Path) -> Path:
    """Path of the verified tarball of `package` in `cache`, fetched by `npm pack` when absent.

    Raises:
        ValueError: the tarball's SHA-256 is not the pinned one.
        RuntimeError: npm is not installed, or it failed.
    """
    tarball = cache / package.tarball
    if not tarball.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _npm_pack(package, tarball)
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"{tarball.name} has SHA-256 {digest}, expected {package.sha256}: the file is damaged "
            f"or not the release this data set is made from. Delete {tarball} and build again."
        )
    return tarball


def _npm_pack(package: Package, tarball: Path) -> None:
    """Download one tarball beside its final place, then rename it there."""
    spec = f"{package.name}@{package.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"npm is needed to download {spec} and was not found. Install Node.js (for example "
            f"`apt-get install npm`), or put {package.tarball} into {tarball.parent} by hand."
        )
    with tempfile.TemporaryDirectory(dir=tarball.parent) as folder:
        command = [npm, "pack", spec, "--ignore-scripts", "--silent", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        packed = Path(folder) / package.tarball
        if done.returncode != 0 or not packed.exists():
            reason = (done.stderr or done.stdout).strip()[-500:]
            raise RuntimeError(
                f"`npm pack {spec}` failed ({reason or f'exit code {done.returncode}'}). Check the "
                f"network, or put {package.tarball} into {tarball.parent} by hand."
            )
        os.replace(packed, tarball)


def read_json(tarball: Path, *members: str) -> list[Any]:
    """JSON values of `members` (paths below `package/`), read in one pass without unpacking.

    Raises:
        ValueError: a member is missing.
    """
    found: dict[str, Any] = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for entry in archive:
            name = entry.name.removeprefix("package/")
            if name in members and entry.isfile():
                handle = archive.extractfile(entry)
                assert handle is not None  # isfile() above
                found[name] = json.load(handle)
    missing = [name for name in members if name not in found]
    if missing:
        raise ValueError(f"{tarball.name} lacks {', '.join(missing)}")
    return [found[name] for name in members]
