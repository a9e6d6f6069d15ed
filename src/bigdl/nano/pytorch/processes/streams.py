"""A rank's own random streams: those of PyTorch, NumPy and Python, as plain bytes."""

from __future__ import annotations

import base64
import contextlib
import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Streams"]


class Streams:
    """Three random streams that are in force only inside a ``with`` block.

    Args:
        *seed: Whole numbers that together name the streams.
    """

    def __init__(self, *seed: int) -> None:
        words = np.random.SeedSequence(seed).generate_state(3)
        # generators of their own: the process's streams are not seeded
        self._torch = torch.Generator().manual_seed(int(words[0])).get_state()
        self._numpy: Any = np.random.RandomState(int(words[1])).get_state()
        self._python = random.Random(int(words[2])).getstate()

    @contextlib.contextmanager
    def drawn(self) -> Iterator[None]:
        """Draw from these streams inside; outside, the process's go on as if nothing was."""
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        self._set()
        try:
            yield
        finally:
            self.keep()
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])
            random.setstate(before[2])

    def put_in_force(self) -> None:
        """Draw from these from now on; only in a process of our own."""
        self._set()

    def keep(self) -> None:
        """Take over what the process's streams are now; only for use inside ``drawn``."""
        self._torch = torch.get_rng_state()
        self._numpy = np.random.get_state()
        self._python = random.getstate()

    def _set(self) -> None:
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)
        random.setstate(self._python)

    def to_bytes(self) -> bytes:
        kind, keys, *rest = self._numpy
        version, internal, gauss = self._python
        content = {
            "torch": base64.b64encode(self._torch.numpy().tobytes()).decode(),
            "numpy": [kind, keys.tolist(), *rest],
            "python": [version, internal, gauss],
        }
        return json.dumps(content).encode()

    def from_bytes(self, payload: bytes) -> None:
        content = json.loads(payload)
        state = np.frombuffer(base64.b64decode(content["torch"]), np.uint8)
        self._torch = torch.from_numpy(state.copy())
        kind, keys, *rest = content["numpy"]
        self._numpy = (kind, np.array(keys, np.uint32), *rest)
        version, internal, gauss = content["python"]
        self._python = (version, tuple(internal), gauss)
