"""How far a faster step may stray from the user's own. Knows torch; imports no Lightning."""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from bigdl._base.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Difference", "Guard", "Seen", "compare", "roughened", "with_noise"]

#: Relative noise that stands for the rounding of a bfloat16: what the user's step does to it
#: tells how much of a difference is the step's own doing.
NOISE = 2.0**-9
#: Allowed ratio of gradient norms.
_NORMS = (0.5, 2.0)

Vectors: TypeAlias = "tuple[torch.Tensor | None, ...]"


# Of a step whose own cosine under noise is less, the gradient has no direction to keep.
_CHAOTIC = 0.5


@dataclass(frozen=True)
class Guard:
    """Limits that a candidate must keep on the probe batches, against the user's own step.

    Both widen to what the user's own step shows when its inputs, and what each of its layers
    gives and gets back, carry relative noise of 2⁻⁹: three times its move of the loss; its own
    cosine less 0.02 and a quarter of what it lacks to 1, as one draw of noise is an estimate.
    Where its own cosine is under 0.5, rounding and not the batch decides where the gradient
    points (a deep network with batch norm and fresh weights): then the loss and the gradient's
    norm alone are judged. ``Guard(0, 1)`` is never widened: only steps that are equal bit for bit
    pass.

    Args:
        loss: Largest relative move of the loss.
        cosine: Smallest cosine between the gradients; between the updates for a candidate that
            changes the optimizer's arithmetic.

    Raises:
        ArgumentError: A limit is not a number.
        ConfigError: ``loss`` is negative or ``cosine`` is not within -1 and 1.
    """

    loss: float = 0.01
    cosine: float = 0.99

    def __post_init__(self) -> None:
        for name in ("loss", "cosine"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ArgumentError(
                    f"Guard({name}={value!r}) takes a number, not {type(value).__name__}."
                )
        wrong = []
        if not 0 <= self.loss < math.inf:
            wrong.append(f"loss={self.loss} (need a finite number >= 0)")
        if not -1 <= self.cosine <= 1:
            wrong.append(f"cosine={self.cosine} (need a number from -1 to 1)")
        if wrong:
            raise ConfigError("Guard cannot be used: " + ", ".join(wrong) + ".")

    @property
    def is_exact(self) -> bool:
        """Only bit-equal steps pass."""
        return self.loss == 0 and self.cosine == 1

    def judge(self, difference: Difference, noise: Difference | None = None) -> str | None:
        """Why ``difference`` is too much, in one sentence; None if it is not.

        Args:
            difference: Between the candidate's step and the user's own.
            noise: Between the user's own step with and without noise; None where nothing in it
                can carry any (whole numbers).
        """
        if self.is_exact:
            return None if difference.is_equal else "the step is not equal bit for bit"
        if difference.problem is not None:
            return difference.problem
        loss, cosine = self.loss, self.cosine
        if noise is not None and noise.problem is None:
            loss = max(loss, 3 * noise.loss_change)
            own = noise.cosine
            cosine = min(cosine, own - 0.02 - 0.25 * (1 - own) if own >= _CHAOTIC else -1.0)
        if difference.loss_change > loss:
            return f"the loss moves by {difference.loss_change:.2%}, more than {loss:.2%}"
        if difference.cosine < cosine:
            return (
                f"the {difference.what} turns: cosine {difference.cosine:.4f}, below {cosine:.4f}"
            )
        low, high = _NORMS
        if not low <= difference.norm_ratio <= high:
            return (
                f"the {difference.what} is {difference.norm_ratio:.3g} times as long "
                f"(allowed: {low} to {high})"
            )
        return None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one step on one batch showed.

    Args:
        loss: The loss, None where the step gives none (manual optimization).
        vectors: Gradients, call by call of the optimizers' steps and parameter by parameter;
            or the updates that the parameters got.
        what: "gradient" or "update", for texts.
        callers: Which optimizer made each call, by its place.
        draws: State of the random streams after the step.
    """

    loss: float | None
    vectors: tuple[Vectors, ...]
    what: str = "gradient"
    callers: tuple[int, ...] = ()
    draws: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one step is from another."""

    loss_change: float = 0.0
    cosine: float = 1.0
    norm_ratio: float = 1.0
    is_equal: bool = True
    what: str = "gradient"
    #: Something that no limit can allow; None if there is nothing of the kind.
    problem: str | None = None

    def worse(self, other: Difference) -> Difference:
        """The worse of each, over two batches."""
        far = max(self, other, key=lambda one: abs(math.log(max(one.norm_ratio, 1e-30))))
        return Difference(
            loss_change=max(self.loss_change, other.loss_change),
            cosine=min(self.cosine, other.cosine),
            norm_ratio=far.norm_ratio,
            is_equal=self.is_equal and other.is_equal,
            what=self.what,
            problem=self.problem or other.problem,
        )


def compare(own: Seen, other: Seen) -> Difference:
    """How far ``other`` is from the user's ``own`` step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has words for whoever touches sparse tensors
        return _compare(own, other)


def _compare(own: Seen, other: Seen) -> Difference:
    problem = _problem(own, other)
    if problem is not None:
        return Difference(
            loss_change=math.inf,
            cosine=-1.0,
            norm_ratio=math.inf,
            is_equal=False,
            what=own.what,
            problem=problem,
        )
    pairs = [
        (a, b)
        for mine, theirs in zip(own.vectors, other.vectors, strict=True)
        for a, b in zip(mine, theirs, strict=True)
        if a is not None and b is not None
    ]
    dot = sum(_dot(a, b) for a, b in pairs)
    length = math.sqrt(sum(_dot(a, a) for a, _ in pairs))
    other_length = math.sqrt(sum(_dot(b, b) for _, b in pairs))
    if length == 0 or other_length == 0:
        both = length == other_length
        cosine, ratio = (1.0, 1.0) if both else (0.0, math.inf if length == 0 else 0.0)
    else:
        cosine, ratio = min(1.0, dot / length / other_length), other_length / length
    return Difference(
        loss_change=_move(own.loss, other.loss),
        cosine=cosine,
        norm_ratio=ratio,
        is_equal=own.loss == other.loss and all(_is_equal(a, b) for a, b in pairs),
        what=own.what,
    )


def _problem(own: Seen, other: Seen) -> str | None:
    """What makes two steps incomparable or the other one unusable."""
    if other.loss is not None and not math.isfinite(other.loss):
        return f"the loss is {other.loss}"
    if (own.loss is None) != (other.loss is None):
        return "only one of the two steps gives a loss"
    if len(own.vectors) != len(other.vectors):
        return (
            f"the optimizers step {len(other.vectors)} times instead of {len(own.vectors)} times"
        )
    for mine, theirs in zip(own.vectors, other.vectors, strict=True):
        if len(mine) != len(theirs):
            return "another set of parameters is updated"
        for a, b in zip(mine, theirs, strict=True):
            if (a is None) != (b is None):
                return f"a parameter {'lost' if b is None else 'got'} its {own.what}"
            if a is None or b is None:
                continue
            if a.is_sparse != b.is_sparse:
                return f"a sparse {own.what} became dense" if a.is_sparse else "it became sparse"
            if not bool(torch.isfinite(_values(b)).all()):
                return f"the {own.what} is not finite"
    return None


def _move(own: float | None, other: float | None) -> float:
    """The relative move of the loss."""
    if own is None or other is None or own == other:
        return 0.0
    if not math.isfinite(own):
        return math.inf
    return abs(other - own) / max(abs(own), 1e-8)


def _values(vector: torch.Tensor) -> torch.Tensor:
    return vector.coalesce().values() if vector.is_sparse else vector


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_sparse:
        product = a.coalesce() * b.coalesce()
        return float(product.coalesce().values().double().sum())
    if a.is_complex() or b.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    flat, other = a.detach().reshape(-1), b.detach().reshape(-1)
    # in blocks: double precision without a double copy of the whole
    return sum(
        (
            float(torch.dot(x.double(), y.double()))
            for x, y in zip(torch.split(flat, 1 << 20), torch.split(other, 1 << 20), strict=True)
        ),
        0.0,
    )


def _is_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_sparse:
        a, b = a.coalesce(), b.coalesce()
        return torch.equal(a.indices(), b.indices()) and torch.equal(a.values(), b.values())
    return torch.equal(a, b)


def with_noise(tensors: Sequence[torch.Tensor], seed: int = 0) -> list[torch.Tensor]:
    """Copies of ``tensors`` in which floating numbers have relative noise of 2⁻⁹."""
    generator = torch.Generator().manual_seed(seed)
    return [_noisy(tensor, generator) for tensor in tensors]


def _noisy(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    uniform = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
    factor = 1 + NOISE * (2 * uniform - 1)
    return tensor * factor.to(device=tensor.device, dtype=tensor.dtype)


class _Rough(torch.autograd.Function):
    """Noise on a tensor, and on the gradient that comes back through it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        ctx.generator = generator
        return _noisy(tensor, generator)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _noisy(gradients[0], ctx.generator), None


@contextmanager
def roughened(module: torch.nn.Module, seed: int = 0) -> Iterator[None]:
    """In the block each layer of ``module`` rounds as coarsely as it would in bfloat16.

    What a layer (a module without submodules) gives, and the gradient it gets back, carry
    relative noise of 2⁻⁹, drawn from a stream of its own. Noise on the inputs alone says too
    little of a deep network: its layers each add their own.
    """
    generator = torch.Generator().manual_seed(seed)

    def rough(layer: torch.nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            return _Rough.apply(output, generator)
        return output

    layers = [one for one in module.modules() if next(one.children(), None) is None]
    handles = [one.register_forward_hook(rough) for one in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
