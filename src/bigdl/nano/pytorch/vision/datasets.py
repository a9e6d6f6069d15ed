"""``ImageFolder``: torchvision's, decoding as much as the transforms need and no more."""

# mypy: allow-subclassing-any
# torchvision has no types of its own.

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from torchvision import get_image_backend
from torchvision.datasets import folder
from torchvision.transforms import Compose as TorchvisionCompose

from bigdl._base import machine
from bigdl._base.errors import ImageError
from bigdl.nano.pytorch.vision import checks
from bigdl.nano.pytorch.vision.decoding import decode, open_source, opencv
from bigdl.nano.pytorch.vision.left_out import LeftOut
from bigdl.nano.pytorch.vision.picture import Picture
from bigdl.nano.pytorch.vision.pipeline import run_to_end, starts_fast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

__all__ = ["ImageFolder"]

_log = logging.getLogger(__name__)

# What somebody else's reading function raises when the file is at fault, and not the function.
_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)


@checks.checked(
    root=checks.path,
    transform=checks.function,
    target_transform=checks.function,
    loader=checks.function,
    is_valid_file=checks.function,
    on_error=checks.choice("raise", "skip"),
)
class ImageFolder(folder.ImageFolder):
    """Pictures in one folder a class, as torchvision's ``ImageFolder`` has them.

    Where ``transform`` is, or starts with, one of ``bigdl.nano.pytorch.vision.transforms``,
    JPEGs are decoded only when it is known how large they are needed. Otherwise items are the
    RGB PIL images that torchvision gives. EXIF turns are not applied.

    With ``on_error="skip"`` every file is checked once, when the dataset is made, on all cores
    and decoding as little as possible: a row that cannot be read is then in neither ``samples``
    nor ``len``, and each readable row comes once whatever sampler, batch size or wrapper reads
    it. A file that goes bad later is left out of its batch.

    Args:
        root: The folder that holds a folder for each class.
        transform: Function of the picture.
        target_transform: Function of the class number.
        loader: Reads a picture instead of the decoder of this class; always called if given.
        is_valid_file: Says of a path whether it is a picture, instead of its ending.
        allow_empty: Whether a class may have no pictures.
        on_error: "raise" an ``ImageError`` for a picture that cannot be read, or "skip" it.

    Raises:
        FileNotFoundError: There is no such folder, no class in it, or a class without pictures.
        ImageError: With "skip", if not a single picture can be read.
    """

    samples: list[tuple[str, int]]

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        loader: Callable[[str], Any] = folder.default_loader,
        is_valid_file: Callable[[str], bool] | None = None,
        allow_empty: bool = False,
        *,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__(
            root,
            transform=transform,
            target_transform=target_transform,
            loader=loader,
            is_valid_file=is_valid_file,
            allow_empty=allow_empty,
        )
        opencv()  # imported here once, instead of in each forked worker
        self.on_error = on_error
        self._refused: list[str] = []
        if on_error == "skip" and not self._reads_by_itself():
            self._leave_out_unreadable()
        self._left_out = LeftOut([path for path, _ in self.samples])

    @property
    def skipped(self) -> list[str]:
        """Paths of the pictures left out so far, by the workers of a loader too."""
        return [*self._refused, *self._left_out.paths()]

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, target = self.samples[index]
        sample = self._sample(path)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return sample, target

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The items of a batch; a ``DataLoader`` asks for them here if it makes batches."""
        if self.on_error == "raise":
            return [self[index] for index in indices]
        # Nobody but the maker of a batch can give fewer rows than it was asked for, and anything
        # in a row's place would be a row too many.
        faults = _UNREADABLE if self._reads_by_itself() else ImageError
        items = []
        fault: BaseException | None = None
        for index in indices:
            try:
                items.append(self[index])
            except faults as exc:
                fault = exc
                path = self.samples[index][0]
                self._left_out.add(path)
                _log.warning("Left out %s: %s", path, exc)
        if fault is not None and not items:
            raise ImageError(
                f"Not one of the {len(indices)} pictures of a batch can be read, so there is no "
                f"batch to give. The last was {self.samples[indices[-1]][0]}: {fault}"
            ) from fault
        return items

    def extra_repr(self) -> str:
        lines = [super().extra_repr(), f"On error: {self.on_error}"]
        if self.skipped:
            lines.append(f"Left out: {len(self.skipped)}")
        return "\n".join(line for line in lines if line)

    def _sample(self, path: str) -> Any:
        if self.loader is not folder.default_loader or get_image_backend() != "PIL":
            sample = self._read(self.loader, path)
            return sample if self.transform is None else self.transform(sample)
        steps = _fast_steps(self.transform)
        if steps is not None:
            return run_to_end(steps, Picture(self._read(open_source, path)))
        sample = self._read(_load, path)
        return sample if self.transform is None else self.transform(sample)

    def _read(self, read: Callable[[str], Any], path: str) -> Any:
        try:
            return read(path)
        except _UNREADABLE as exc:
            if self.on_error == "raise" or isinstance(exc, ImageError):
                raise
            raise ImageError(f"Cannot read {path}: {exc} ({type(exc).__name__}).") from exc

    def _reads_by_itself(self) -> bool:
        """Whether a subclass reads its rows in its own way, which may not even need a file."""
        return type(self).__getitem__ is not ImageFolder.__getitem__

    def _leave_out_unreadable(self) -> None:
        paths = [path for path, _ in self.samples]
        if self.loader is folder.default_loader:
            with ThreadPoolExecutor(machine.cores()) as pool:  # decoders release the GIL
                faults = list(pool.map(self._fault, paths))
        else:  # a function of the user's may not expect to be called by several threads
            faults = [self._fault(path) for path in paths]
        self._refused = [path for path, fault in zip(paths, faults, strict=True) if fault]
        if not self._refused:
            return
        first = next(fault for fault in faults if fault)
        if len(self._refused) == len(paths):
            raise ImageError(f"None of the {len(paths)} pictures can be read. {first}") from first
        _log.warning(
            "Left out %d of %d pictures that cannot be read. %s",
            len(self._refused),
            len(paths),
            first,
        )
        kept = zip(self.samples, faults, strict=True)
        self.samples = self.imgs = [sample for sample, fault in kept if not fault]
        self.targets = [target for _, target in self.samples]

    def _fault(self, path: str) -> ImageError | None:
        """Why the picture at ``path`` cannot be read, if so."""
        try:
            self._read(
                _probe if self.loader is folder.default_loader else self.loader,
                path,
            )
        except ImageError as exc:
            return exc
        return None


def _load(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return decode(path, file.read())


def _probe(path: str) -> None:
    """Decode the picture at ``path`` as small as it can be."""
    source = open_source(path)
    for scale in source.scales()[:1]:
        source.reduced(scale)


def _fast_steps(transform: Any) -> Iterable[Any] | None:
    """The transforms to run on a picture that is not decoded yet, if the first can take one."""
    if starts_fast(transform):
        return [transform]
    if type(transform) is TorchvisionCompose:
        steps: Sequence[Any] = transform.transforms
        if isinstance(steps, (list, tuple)) and steps and starts_fast(steps[0]):
            return steps
    return None
