"""The global random streams (Python, NumPy, torch) as data: read, put back, compared.

A state is made of plain values and tensors only, so that a checkpoint that holds one loads with
``weights_only=True``.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["State", "generators", "kept", "read", "read_generator", "same", "write"]

State: TypeAlias = dict[str, Any]


def read() -> State:
    """The state of every global stream."""
    version, numbers, gauss = random.getstate()
    words = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state(legacy=True))
    name, keys, position, has_gauss, cached = words
    state: State = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position)],
        "numpy_gauss": [int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized() and torch.cuda.is_available():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def write(state: State) -> None:
    """Put every stream back to ``state``."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position = state["numpy"]
    has_gauss, cached = state["numpy_gauss"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    cuda = state.get("cuda", [])
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in cuda])


def same(one: State, other: State) -> bool:
    """Whether two states are equal: the same draws led to them."""
    return (
        one["python"] == other["python"]
        and one["numpy"][0] == other["numpy"][0]
        and one["numpy"][2] == other["numpy"][2]
        and one["numpy_gauss"] == other["numpy_gauss"]
        and torch.equal(one["numpy"][1], other["numpy"][1])
        and torch.equal(one["torch"], other["torch"])
        and len(one.get("cuda", [])) == len(other.get("cuda", []))
        and all(map(torch.equal, one.get("cuda", []), other.get("cuda", [])))
    )


@contextmanager
def kept() -> Iterator[State]:
    """Whatever is drawn in the block, the streams are afterwards as before; gives that state."""
    before = read()
    try:
        yield before
    finally:
        write(before)


# --- generators of one's own ------------------------------------------------------------------


def generators(*owners: Any) -> list[Any]:
    """The random generators that ``owners`` hold as attributes, each once, in order.

    Looks one level into samplers and batch samplers, where loaders keep theirs.
    """
    found: dict[int, Any] = {}
    seen: set[int] = set()
    queue = list(owners)
    while queue:
        owner = queue.pop(0)
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        for name, value in sorted(getattr(owner, "__dict__", {}).items()):
            if isinstance(value, _KINDS):
                found.setdefault(id(value), value)
            elif name in ("sampler", "batch_sampler"):
                queue.append(value)
    return list(found.values())


_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def read_generator(generator: Any) -> Any:
    """The state of one generator as plain values and tensors."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    version, numbers, gauss = generator.getstate()
    return [version, list(numbers), gauss]


def write_generator(generator: Any, state: Any) -> None:
    """Put ``generator`` back to what ``read_generator`` gave."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _numpy(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_numpy(state))
    else:
        version, numbers, gauss = state
        generator.setstate((version, tuple(numbers), gauss))


def _plain(value: Any) -> Any:
    """NumPy's state dicts with arrays as tensors (unsigned words kept in 64 bits)."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), torch.from_numpy(value.astype(np.int64))]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _numpy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numpy(part) for key, part in value.items()}
    if isinstance(value, list) and len(value) == 3 and value[0] == "array":
        return value[2].numpy().astype(value[1])
    return value
