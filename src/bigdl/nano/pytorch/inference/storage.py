"""Models in folders: ``metadata.json`` beside the runtime's own files. Nothing is pickled.

A folder is written aside and put in its place when it is whole. What is read is held to its
metadata: every file's SHA-256, and no key that is not known.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from torch import nn

import bigdl
from bigdl._base.errors import (
    ArgumentError,
    BigDLError,
    ConfigError,
    MissingDependencyError,
    StoredModelError,
)
from bigdl.nano.accelerators import ACCELERATORS
from bigdl.nano.accelerators.base import Config, Spec, TensorSpec, make_config
from bigdl.nano.accelerators.here import Missing
from bigdl.nano.accelerators.torch_modules import read_weights, write_weights
from bigdl.nano.pytorch.export.binding import Interface
from bigdl.nano.pytorch.inference.accelerated import PRECISIONS, AcceleratedModule

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["load", "save"]

SCHEMA_VERSION = 1
_METADATA = "metadata.json"
_KEYS = {
    "schema_version", "name", "accelerator", "precision", "threads", "config", "inputs",
    "outputs", "forward", "versions", "files",
}  # fmt: skip
# Forms that run the user's own code, whose weights alone are stored.
_NEEDS_MODEL = ("eager", "compile")
# A module of the user's own, not accelerated: "eager" without a description of its inputs.
_PLAIN = "module"
_PACKAGES = ("bigdl-next", "torch", "torchao", "onnx", "onnxruntime", "openvino", "nncf")

Target = str | os.PathLike[str] | IO[bytes]


# --- writing ----------------------------------------------------------------------------------


def save(model: nn.Module, path: Target) -> None:
    """Write ``model`` into a folder, or as one file.

    Args:
        model: An accelerated model, or any module: of that its weights are written.
        path: A folder, made if it is not there; files of others in it are left alone. Or a
            binary file open for writing, which gets the same folder as a zip archive.

    Raises:
        ArgumentError: ``model`` is no module.
        ConfigError: It holds something that cannot be stored without pickling, or ``path`` is a
            file.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; need a torch.nn.Module.")
    if hasattr(path, "write"):
        with tempfile.TemporaryDirectory(prefix="bigdl-") as name:
            _write(model, Path(name))
            _pack(Path(name), cast("IO[bytes]", path))
        return
    target = Path(path).absolute()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; a model is saved into a folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write(model, aside)
        _put(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(model: nn.Module, folder: Path) -> None:
    """The runtime's files, then the metadata that vouches for them."""
    if isinstance(model, AcceleratedModule):
        metadata = _describe(model)
        model._compiled.save(folder)
    else:
        metadata = _describe_plain(model)
        write_weights(model, folder)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    metadata["files"] = {name: _sha256(folder / name) for name in names}
    text = json.dumps(metadata, indent=2) + "\n"
    (folder / _METADATA).write_text(text, encoding="utf-8")


def _describe(model: AcceleratedModule) -> dict[str, Any]:
    spec = model._spec
    config = spec.config
    return {
        "schema_version": SCHEMA_VERSION,
        "name": model.name,
        "accelerator": model.accelerator,
        "precision": model.precision,
        "threads": spec.threads,
        "config": {name: getattr(config, name) for name in config.__dataclass_fields__},
        "inputs": [_tensor_json(each) for each in spec.inputs],
        "outputs": [_tensor_json(each) for each in spec.outputs],
        "forward": model._interface.to_json(),
        "versions": _versions(),
    }


def _describe_plain(model: nn.Module) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "name": type(model).__name__,
        "accelerator": _PLAIN,
        "precision": "fp32",
        "threads": 1,
        "config": {},
        "inputs": [],
        "outputs": [],
        "forward": None,
        "versions": _versions(),
    }


def _tensor_json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _versions() -> dict[str, str]:
    found = {"bigdl": bigdl.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put(aside: Path, target: Path) -> None:
    """Make ``aside`` the folder ``target``; what others have put there stays."""
    aside.chmod(0o777 & ~_umask())
    if not target.exists():
        aside.rename(target)
        return
    # without metadata a folder is no model: so a crash half-way leaves none that looks whole
    old = target / _METADATA
    stale = _own_files(old)
    old.unlink(missing_ok=True)
    fresh = [path for path in aside.rglob("*") if path.is_file() and path.name != _METADATA]
    for path in fresh:
        place = target / path.relative_to(aside)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    for name in stale - {path.relative_to(aside).as_posix() for path in fresh}:
        (target / name).unlink(missing_ok=True)
    (aside / _METADATA).replace(old)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _own_files(metadata: Path) -> set[str]:
    """The files of a model that is about to be replaced."""
    try:
        files = _checked_files(json.loads(metadata.read_text(encoding="utf-8")).get("files"))
    except (OSError, ValueError, AttributeError):
        return set()
    return set(files)


def _pack(folder: Path, file: IO[bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())


# --- reading ----------------------------------------------------------------------------------


def load(path: Target, model: nn.Module | None = None, *, threads: int | None = None) -> nn.Module:
    """Read what ``save`` wrote.

    Args:
        path: The folder, or a binary file open for reading.
        model: For forms that run the user's code (eager, bf16, compile, a plain module): a module
            of the same class. It gives the code; it is not changed.
        threads: Cores a call may use; None is as many as when it was made.

    Returns:
        An accelerated model; for a plain module, a copy of ``model`` with the stored weights.

    Raises:
        FileNotFoundError: There is no such folder.
        StoredModelError: It was changed, is damaged, or is of a form that is not known.
        ConfigError: ``model`` is needed, or not needed; or the form cannot run here.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; need a torch.nn.Module.")
    if hasattr(path, "read"):
        with tempfile.TemporaryDirectory(prefix="bigdl-") as name:
            _unpack(cast("IO[bytes]", path), Path(name))
            return _load(Path(name), model, threads)
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"No saved model: {folder} does not exist.")
    if folder.is_file():
        with folder.open("rb") as file:
            return load(file, model, threads=threads)
    return _load(folder, model, threads)


def _unpack(file: IO[bytes], folder: Path) -> None:
    """The files of an archive that its metadata names, and only these."""
    try:
        with zipfile.ZipFile(file) as archive:
            metadata = archive.read(_METADATA)
            (folder / _METADATA).write_bytes(metadata)
            for name in _checked_files(_parsed(metadata).get("files")):
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as packed, place.open("wb") as out:
                    shutil.copyfileobj(packed, out)
    except (zipfile.BadZipFile, KeyError, io.UnsupportedOperation) as exc:
        raise StoredModelError(f"The file is no saved model: {exc}") from exc


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except ValueError as exc:
        raise StoredModelError(f"{_METADATA} is damaged: {exc}") from exc
    if not isinstance(metadata, dict):
        raise StoredModelError(f"{_METADATA} is damaged: it holds no object.")
    return metadata


def _load(folder: Path, model: nn.Module | None, threads: int | None) -> nn.Module:
    metadata = _checked(folder)
    name = metadata["accelerator"]
    needs_model = name in (_PLAIN, *_NEEDS_MODEL)
    if needs_model and model is None:
        raise ConfigError(
            f"{metadata['name']!r} runs the original's own code: load(path, model=...) needs a "
            "model of the same class."
        )
    if not needs_model and model is not None:
        raise ConfigError(f"{metadata['name']!r} runs without the original: leave model= out.")
    if name == _PLAIN:
        assert model is not None
        return read_weights(model, folder)
    if name not in ACCELERATORS:
        raise StoredModelError(f"{_METADATA} names the accelerator {name!r}, which is not known.")
    runtime = ACCELERATORS.get(name)()
    spec = _spec(metadata, runtime.options)
    spec = spec if threads is None else replace(spec, threads=threads)
    interface = Interface.from_json(metadata["forward"], spec.inputs, spec.outputs)
    reason = runtime.refuse(spec)
    if reason is not None:
        text = f"{metadata['name']!r} cannot run here: {reason}."
        raise MissingDependencyError(text) if isinstance(reason, Missing) else ConfigError(text)
    compiled = runtime.load(folder, spec, model)
    return AcceleratedModule(
        compiled, interface, spec, name=metadata["name"], accelerator=name, original=model
    )


def _checked(folder: Path) -> dict[str, Any]:
    """The metadata, after every file was held to it."""
    path = folder / _METADATA
    if not path.is_file():
        raise StoredModelError(f"{folder} is no saved model: it has no {_METADATA}.")
    metadata = _parsed(path.read_bytes())
    schema = metadata.get("schema_version")
    if not isinstance(schema, int) or schema < 1:
        raise StoredModelError(f"{path} has no valid schema_version: {schema!r}.")
    if schema > SCHEMA_VERSION:
        raise StoredModelError(
            f"{path} has schema_version {schema}; this version of bigdl knows up to "
            f"{SCHEMA_VERSION}. Load it with a newer one."
        )
    differing = sorted(map(str, metadata.keys() ^ _KEYS))
    if differing:
        kind = "an unknown key" if differing[0] in metadata else "no key"
        raise StoredModelError(f"{path} has {kind} {differing[0]!r}.")
    for key in ("name", "accelerator"):
        if not isinstance(metadata[key], str):
            raise StoredModelError(f"{path}: {key} is {metadata[key]!r}, not text.")
    for name, wanted in _checked_files(metadata["files"]).items():
        file = folder / name
        if not file.is_file():
            raise StoredModelError(f"{folder} lacks {name!r}, which its metadata names.")
        if _sha256(file) != wanted:
            raise StoredModelError(f"{file} is not what was saved: its SHA-256 has changed.")
    return metadata


def _checked_files(files: Any) -> dict[str, str]:
    """The files of a model: plain names below its folder."""
    if not isinstance(files, dict):
        raise StoredModelError(f"{_METADATA} has no list of files.")
    for name, digest in files.items():
        parts = name.split("/")
        if "\\" in name or ":" in name or "\0" in name or set(parts) & {"", ".", ".."}:
            raise StoredModelError(f"{_METADATA} names {name!r}, which is not below its folder.")
        if not isinstance(digest, str):
            raise StoredModelError(f"{_METADATA} has no SHA-256 for {name!r}.")
    return files


def _spec(metadata: Mapping[str, Any], options: type[Config]) -> Spec:
    try:
        precision, threads = metadata["precision"], metadata["threads"]
        if precision not in PRECISIONS or type(threads) is not int:
            raise StoredModelError(f"{_METADATA}: precision {precision!r}, threads {threads!r}.")
        return Spec(
            precision=precision,
            inputs=_tensors(metadata["inputs"]),
            outputs=_tensors(metadata["outputs"]),
            threads=threads,
            config=make_config(options, metadata["config"]),
        )
    except StoredModelError:
        raise
    except (BigDLError, TypeError) as exc:
        raise StoredModelError(f"{_METADATA} cannot be used: {exc}") from exc


def _tensors(written: Any) -> tuple[TensorSpec, ...]:
    found = []
    for each in written if isinstance(written, list) else [None]:
        if (
            not isinstance(each, dict)
            or set(each) != {"name", "dtype", "shape"}
            or not isinstance(each["name"], str)
            or not isinstance(each["dtype"], str)
            or not isinstance(each["shape"], list)
            or not all(n is None or (type(n) is int and n >= 0) for n in each["shape"])
        ):
            raise StoredModelError(f"{_METADATA} describes a tensor as {each!r}.")
        found.append(
            TensorSpec(name=each["name"], dtype=each["dtype"], shape=tuple(each["shape"]))
        )
    return tuple(found)
