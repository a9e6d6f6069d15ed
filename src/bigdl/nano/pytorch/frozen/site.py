"""Stands in for the calls of one submodule: the trunk's form where it is right, else the user's.

Knows torch. Whatever is in doubt runs the user's own module, as if nothing stood here.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

from bigdl._base.errors import BigDLError, ConfigError
from bigdl.nano.pytorch.frozen.call import Kind, as_now, is_plain, kind_of, quiet
from bigdl.nano.pytorch.frozen.choose import Budget, Chosen, choose
from bigdl.nano.pytorch.frozen.feature_cache import FeatureCache
from bigdl.nano.pytorch.frozen.forms import drift, gentler_than
from bigdl.nano.pytorch.frozen.reference import FlatTrunk, take_reference
from bigdl.nano.pytorch.frozen.split import make_trunk
from bigdl.nano.pytorch.frozen.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bigdl.nano.pytorch.export.structure import Structure
    from bigdl.nano.pytorch.frozen.find import Place
    from bigdl.nano.pytorch.frozen.forms import Form, Subject, Tensors
    from bigdl.nano.pytorch.frozen.reference import Reference
    from bigdl.nano.pytorch.frozen.split import Trunk

__all__ = ["Made", "Site", "Terms"]

_log = logging.getLogger(__name__)

# Calls at which the form is held to the user's own trunk once more, on what comes then.
_CHECKED_AT = frozenset(8**k for k in range(2, 20))
# After so many calls in a row that could not use the form it is given up.
_GIVE_UP = 64
# Modes that a module may alternate between, kinds of call known, kinds that get a form built.
_MOST_MODES, _MOST_KINDS, _MOST_BUILT = 8, 16, 3
# Hashing a batch may cost at most this share of what the form takes.
_HASH_SHARE = 0.3
_HASH_BYTES_PER_S = 3e9
_HASH_ROW_S = 4e-6

_NEW: Final = object()


@dataclass(kw_only=True)
class Terms:
    """What all sites of one application share.

    Args:
        budget: How long building may take; None if a plan is replayed and nothing is timed.
        built: What was built, by place, kind of call and weights; in a copy's probe, too.
        cached: Whether outputs are kept across epochs.
        dead: Called with a site that can have no form.
        cache_bytes: Memory for kept outputs, None for the default.
        aside: Above 0 while sites let every call through.
    """

    budget: Budget | None
    built: dict[tuple[str, Any, bool, bytes], Made]
    cached: bool
    dead: Callable[[Site], None]
    cache_bytes: int | None = None
    aside: int = 0


@dataclass(frozen=True, kw_only=True)
class Made:
    """A form, and what its outputs must become to be the user's.

    Args:
        chosen: The form in working order.
        result: How the outputs are nested.
        wanted: An example of each output: types and layouts.
        rows: All inputs and outputs have one number of rows.
    """

    chosen: Chosen
    result: Structure
    wanted: Tensors
    rows: bool

    def __call__(self, inputs: Tensors) -> Tensors:
        return tuple(map(_like, self.chosen.run(inputs), self.wanted))


def _like(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    output = output.to(wanted.dtype)
    return output.contiguous() if wanted.is_contiguous() else output


@dataclass(kw_only=True)
class _Way:
    """One kind of call with its form in force.

    Training and evaluation have caches of their own: often only one of the two pipelines is
    random, and its rows must not fill the memory that the other's make good use of.
    """

    made: Made
    caches: dict[bool, FeatureCache]  # by whether gradients are recorded
    own: Callable[[Tensors], Tensors]
    calls: int = 0


@dataclass(kw_only=True)
class _Cut:
    """The trunk under certain modes, and a way for each kind of call (None: has no form)."""

    arguments: Structure
    trunk: Trunk
    watch: Watch
    fingerprint: bytes
    ways: dict[Any, _Way | None] = field(default_factory=dict)


class Site:
    """What ``nn.Module.__call__`` reaches in place of the module's own call.

    Args:
        place: Where.
        forms: Forms that may be used, best known first.
        terms: Shared by all sites of one application.
    """

    def __init__(self, place: Place, forms: Sequence[Form], terms: Terms) -> None:
        self.place, self.module, self._forms, self._terms = place, place.module, forms, terms
        self._cuts: dict[Any, _Cut | None] = {}
        self._cut: _Cut | None = None
        self._idle = self._rebuilds = 0
        self._patience = self._calm_calls = 0
        #: Why no form is in force; "" if one is.
        self.reason = "it is not called in a training step"
        #: It cannot be one trunk, whatever the form; parts of it might.
        self.may_split = False
        self._hook: Any = torch.compiler.disable(self._call)  # type: ignore[no-untyped-call]
        self._own_call: Callable[..., Any] = self.module._call_impl
        self.module._compiled_call_impl = self._hook

    @property
    def form(self) -> Form | None:
        """The form in force, None if there is none."""
        return next((way.made.chosen.form for way in self._ways()), None)

    @property
    def caches(self) -> list[FeatureCache]:
        """The caches in use."""
        return [cache for way in self._ways() for cache in way.caches.values()]

    def remove(self) -> None:
        """Let the module be called as before. Calling it twice is harmless."""
        if vars(self.module).get("_compiled_call_impl") is self._hook:
            del self.module._compiled_call_impl
        self._forget()

    # --- a call -------------------------------------------------------------------------------

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._terms.aside:
            return self._own_call(*args, **kwargs)
        kind = kind_of(args, kwargs) if is_plain() else None
        cut = self._current_cut(kind.arguments) if kind is not None else None
        if kind is None or cut is None:
            return self._own(args, kwargs)
        tensors = kind.tensors
        way = cut.ways.get(kind.key, _NEW)
        if way is _NEW:
            return self._first(cut, kind, args, kwargs)
        if not isinstance(way, _Way) or (way.made.rows and len({len(t) for t in tensors}) > 1):
            return self._own(args, kwargs)
        return self._run(cut, way, tensors, args, kwargs)

    def _run(
        self, cut: _Cut, way: _Way, tensors: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        way.calls += 1
        try:
            cache = way.caches.get(torch.is_grad_enabled())
            with torch.no_grad():
                made = way.made
                outputs = cache.take(tensors, made) if cache is not None else made(tensors)
        except (BigDLError, RuntimeError, ValueError) as exc:
            # the user's own module may take what the form cannot; if not, it says why itself
            _log.warning("Frozen trunk %s: its form failed (%s).", self.shown, exc)
            return self._own(args, kwargs)
        if way.calls in _CHECKED_AT and not self._still_right(way, tensors):
            return self._own(args, kwargs)
        self._idle = 0
        value = way.made.result.build(outputs)
        rest = cut.trunk.rest
        return value if rest is None else rest(*value, *tensors)

    def _own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The user's own module answers; too often in a row, and the form is given up."""
        self._idle += 1
        if self._idle > _GIVE_UP:
            if self.form is not None:
                _log.info("Frozen trunk %s is given up: it can no longer be used.", self.shown)
            self.reason = self.reason or "it could no longer be used"
            self.remove()
        return self._own_call(*args, **kwargs)

    @property
    def shown(self) -> str:
        """The place in words."""
        return repr(self.place.name) if self.place.name else type(self.module).__name__

    # --- what the module is now ---------------------------------------------------------------

    def _current_cut(self, arguments: Structure) -> _Cut | None:
        """The trunk for the present modes and weights; None while there is none."""
        cut = self._cut
        if cut is None or cut.arguments != arguments or not cut.watch.same_form():
            cut = self._cut = self._cut_for_modes(arguments)
        if cut is None:
            return None
        if not cut.watch.same_values() and not self._take_values(cut):
            return None
        if self._calm_calls:
            self._calm_calls -= 1
            return None
        return cut

    def _cut_for_modes(self, arguments: Structure) -> _Cut | None:
        modes = (arguments, *(part.training for part in self.module.modules()))
        if modes in self._cuts:
            cut = self._cuts[modes]
            return cut if cut is not None and cut.watch.same_form() else None
        if len(self._cuts) >= _MOST_MODES:
            return None
        self._cuts[modes] = cut = self._new_cut(arguments)
        return cut

    def _new_cut(self, arguments: Structure) -> _Cut | None:
        live = {id(m) for cut in self._cuts.values() if cut for m in cut.trunk.live}
        try:
            with torch.inference_mode(False):
                trunk = make_trunk(self.module, self.place.name, arguments, live)
                watch = Watch(trunk.modules, trunk.frozen)
            if not watch.same_form():
                raise ConfigError("it has forward hooks")
        except ConfigError as exc:
            if not self._cuts:  # none before: no form, ever
                self.reason, self.may_split = str(exc), True
                self._die()
            return None
        return _Cut(arguments=arguments, trunk=trunk, watch=watch, fingerprint=watch.fingerprint())

    def _take_values(self, cut: _Cut) -> bool:
        """Weights were written: whether they are the same all the same, as after a reload.

        If not, the form is forgotten, and built anew once as many calls with unchanged weights
        have gone by as building it took.
        """
        cut.watch.accept_values()
        if cut.watch.fingerprint() == cut.fingerprint:
            return True
        ways = list(self._ways())
        if ways:
            _log.info("Frozen trunk %s: its weights were changed.", self.shown)
            repaid = max(_calls_to_repay(way.made.chosen) for way in ways)
            self._patience = repaid * 2**self._rebuilds
            self._rebuilds += 1
        self._calm_calls = self._patience
        built = self._terms.built
        for place in [place for place in built if place[0] == self.place.name]:
            del built[place]
        self._forget()
        return False

    def _forget(self) -> None:
        for cache in self.caches:
            cache.close()
        self._cuts.clear()
        self._cut = None

    def _die(self) -> None:
        self.remove()
        self._terms.dead(self)

    def _ways(self) -> Iterator[_Way]:
        for cut in self._cuts.values():
            if cut is not None:
                yield from (way for way in cut.ways.values() if way is not None)

    # --- the first call of a kind -------------------------------------------------------------

    def _first(self, cut: _Cut, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The user's own module answers, and shows what a form must give."""
        tensors, key = kind.tensors, kind.key
        place = (self.place.name, key, cut.trunk.rest is None, cut.fingerprint)
        known = self._terms.built.get(place)
        if known is not None and known.chosen.form in self._forms:
            self._put_in_force(cut, kind, known)
            return self._call(*args, **kwargs)
        if len(cut.ways) >= _MOST_KINDS:
            return self._own(args, kwargs)
        reference = take_reference(
            cut.trunk,
            lambda: self._aside(self._own_call, *args, **kwargs),
            tensors,
            checks_rest=self._terms.budget is not None,
            module=self.module,
        )
        try:
            made = self._make(cut, reference)
        except ConfigError as exc:
            cut.ways[key] = None
            if not any(self._ways()):
                self.reason, self.may_split = str(exc), reference.subject is None
                self._die()
        else:
            self._terms.built[place] = made
            self._put_in_force(cut, kind, made)
        return reference.answer

    def _aside(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``call`` with no site acting in it."""
        self._terms.aside += 1
        try:
            return call(*args, **kwargs)
        finally:
            self._terms.aside -= 1

    def _make(self, cut: _Cut, reference: Reference) -> Made:
        subject, result = reference.subject, reference.result
        if subject is None or result is None:
            raise reference.fault or ConfigError("it gives no tensors")
        own = as_now(lambda inputs: subject.module(*inputs), subject.device.type)
        budget = self._terms.budget
        with quiet(subject.device):
            chosen = self._made_already(cut, subject)
            if chosen is None:
                if len({id(way.made.chosen) for way in self._ways()}) >= _MOST_BUILT:
                    raise ConfigError(f"{_MOST_BUILT} kinds of call have a form already")
                chosen = choose(subject, lambda: own(subject.inputs), self._forms, budget)
        return Made(
            chosen=chosen,
            result=result,
            wanted=tuple(t[:1].clone() if t.dim() else t.clone() for t in subject.outputs),
            rows=subject.rows is not None,
        )

    def _made_already(self, cut: _Cut, subject: Subject) -> Chosen | None:
        """A form made for other modes or another autocast, if it is right for these, too."""
        for (name, _, _, fingerprint), made in self._terms.built.items():
            chosen = made.chosen
            if (name, fingerprint) != (self.place.name, cut.fingerprint):
                continue
            if chosen.form not in self._forms:
                continue
            try:
                outputs = chosen.run(subject.inputs)
            except (BigDLError, RuntimeError, ValueError, TypeError):
                continue  # made for other shapes or types
            if [t.shape for t in outputs] != [t.shape for t in subject.outputs]:
                continue
            if drift(outputs, subject.outputs).exceeds(chosen.form.precision) is None:
                return chosen
        return None

    def _put_in_force(self, cut: _Cut, kind: Kind, made: Made) -> None:
        flat = FlatTrunk(cut.trunk.ahead)
        own = as_now(lambda inputs: flat(*inputs), kind.tensors[0].device.type)
        cut.ways[kind.key] = _Way(made=made, caches=self._caches_for(kind.tensors, made), own=own)
        self.reason = ""
        _log.debug("Frozen trunk %s runs as %s.", self.shown, made.chosen.form.name)

    def _caches_for(self, tensors: Tensors, made: Made) -> dict[bool, FeatureCache]:
        """Caches, where rows are rows, and hashing them is cheap beside computing them."""
        if not (self._terms.cached and made.rows and made.chosen.by_rows):
            return {}
        if any(tensor.device.type != "cpu" for tensor in (*tensors, *made.wanted)):
            return {}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        hash_s = size / _HASH_BYTES_PER_S + len(tensors[0]) * _HASH_ROW_S
        form_s = made.chosen.form_s
        if form_s and hash_s > _HASH_SHARE * form_s:
            return {}
        memory = self._terms.cache_bytes
        half = None if memory is None else memory // 2
        return {grad: FeatureCache(memory_bytes=half) for grad in (True, False)}

    # --- later --------------------------------------------------------------------------------

    def _still_right(self, way: _Way, tensors: Tensors) -> bool:
        """Hold the form to the user's own trunk on inputs that it was not made with."""
        form = way.made.chosen.form
        inputs = tuple(tensor.detach() for tensor in tensors)
        wanted = self._aside(way.own, tuple(tensor.clone() for tensor in inputs))
        far = drift(way.made(inputs), wanted).exceeds(form.precision)
        if far is None:
            return True
        _log.warning(
            "Frozen trunk %s: %s is not used any longer, as on later data %s.",
            self.shown,
            form.name,
            far,
        )
        self._forms = gentler_than(self._forms, form.precision)
        self._forget()
        return False


def _calls_to_repay(chosen: Chosen) -> int:
    """Calls after which building has paid; at least 1."""
    gain_s = chosen.own_s - chosen.form_s
    return max(1, math.ceil(chosen.build_s / gain_s)) if gain_s > 0 else 1
