"""Frozen trunks: what doesn't train is computed in its fastest form. Knows torch, no Lightning.

The largest submodules whose parameters are all frozen, and frozen beginnings of others, are
called through a ``Site`` that runs a guarded faster form of them and keeps the outputs of rows
that come again. Class, attributes, parameters and ``state_dict`` of the module stay what they
are; copies and pickles of it know nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from bigdl._base.errors import ConfigError
from bigdl._base.registry import nearest
from bigdl.nano.pytorch.frozen.choose import Budget
from bigdl.nano.pytorch.frozen.find import Place, find_places, is_live, why_none
from bigdl.nano.pytorch.frozen.forms import FORMS, Form, gentler_than
from bigdl.nano.pytorch.frozen.site import Made, Site, Terms
from bigdl.nano.pytorch.plan.candidates import Applied, Candidate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from bigdl.nano.pytorch.plan.candidates import Scene

__all__ = ["FrozenTrunk"]


class FrozenTrunk(Candidate):
    """Runs frozen parts in a faster form, and remembers what they gave for rows that come again.

    What is built while a copy is probed serves the real module too, if it is this same object
    that is applied to both.

    Args:
        forms: Names of the forms that may be used, best known first; None is all.
        cache_bytes: Memory for remembered outputs; None is a share of what is available, 0 none.
    """

    name: ClassVar[str] = "frozen_trunk"
    hope: ClassVar[float] = 8.0

    def __init__(
        self, *, forms: Sequence[str] | None = None, cache_bytes: int | None = None
    ) -> None:
        self._forms = tuple(map(_form, forms)) if forms is not None else FORMS
        self._cache_bytes = cache_bytes
        self._pins: dict[str, Form] | None = None
        self._built: dict[tuple[str, Any, bool, bytes], Made] = {}
        self._last: _AppliedTrunks | None = None

    def setup_s(self, scene: Scene) -> float:
        # where the run's length is known, building keeps to what the run can repay
        return 5.0 if scene.steps_left is None else 0.5

    def refuse(self, scene: Scene) -> str | None:
        return why_none(scene.module)

    def apply(
        self,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scene: Scene,
    ) -> Applied:
        reason = why_none(module)
        if reason is not None:
            raise ConfigError(reason)
        self._last = _AppliedTrunks(
            module,
            forms=self._forms,
            pins=self._pins,
            budget=Budget(steps=scene.steps_left) if self._pins is None else None,
            built=self._built,
            # a probe calls with the same rows again and again: it must not time the cache
            cache_bytes=self._cache_bytes if module is scene.module else 0,
        )
        return self._last

    def pinned(self, options: Mapping[str, Any]) -> FrozenTrunk:
        trunks = options.get("trunks")
        if not isinstance(trunks, dict) or not all(isinstance(n, str) for n in trunks.values()):
            raise ConfigError(
                f"A plan's options of frozen_trunk are {{'trunks': {{place: form}}}}, "
                f"not {dict(options)!r}."
            )
        same = FrozenTrunk(cache_bytes=self._cache_bytes)
        same._pins = {str(place): _form(name) for place, name in trunks.items()}
        return same

    def gentler(self) -> FrozenTrunk | None:
        forms = self._last.forms if self._last is not None else []
        if not forms:
            return None
        coarsest = min(forms, key=FORMS.index).precision
        left = gentler_than(self._forms, coarsest)
        if not left:
            return None
        return FrozenTrunk(forms=[form.name for form in left], cache_bytes=self._cache_bytes)


def _form(name: str) -> Form:
    for form in FORMS:
        if form.name == name:
            return form
    known = [form.name for form in FORMS]
    raise ConfigError(
        f"No form {name!r} of a frozen trunk; have {', '.join(known)}.{nearest(name, known)}"
    )


class _AppliedTrunks(Applied):
    """Sites in a module."""

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        forms: Sequence[Form],
        pins: Mapping[str, Form] | None,
        budget: Budget | None,
        built: dict[tuple[str, Any, bool, bytes], Made],
        cache_bytes: int | None,
    ) -> None:
        self._forms, self._pins = forms, pins
        self._terms = Terms(
            budget=budget,
            built=built,
            cached=cache_bytes != 0,
            cache_bytes=cache_bytes,
            dead=self._look_within,
        )
        self._sites: list[Site] = []
        self._settled: list[Form] = []
        if pins is None:
            for place in find_places(module):
                self._sites.append(Site(place, forms, self._terms))
        else:
            for name, form in pins.items():
                self._sites.append(Site(_place(module, name), (form,), self._terms))

    def _look_within(self, site: Site) -> None:
        """Where all of a module can't be one trunk, its larger parts may."""
        if self._pins is not None or not site.place.whole or not site.may_split:
            return
        size = sum(p.numel() for p in site.module.parameters())
        for name, child in site.module.named_children():
            if sum(p.numel() for p in child.parameters()) >= size * _LEAST_SHARE:
                for place in find_places(child, f"{site.place.name}.{name}".lstrip(".")):
                    self._sites.append(Site(place, self._forms, self._terms))

    @property
    def forms(self) -> list[Form]:
        """The forms in force, or those that were when this was undone."""
        return [site.form for site in self._sites if site.form is not None] or self._settled

    @property
    def detail(self) -> str:  # type: ignore[override]
        return "; ".join(
            f"{site.shown} as {site.form.name}" for site in self._sites if site.form is not None
        )

    @property
    def options(self) -> dict[str, Any]:
        return {"trunks": {s.place.name: s.form.name for s in self._sites if s.form is not None}}

    def settle(self) -> None:
        if self.forms:
            return
        reasons = dict.fromkeys(f"{site.shown}: {site.reason}" for site in self._sites)
        raise ConfigError("; ".join(reasons) or "no submodule can be a frozen trunk")

    def epoch_started(self) -> None:
        for site in self._sites:
            for cache in site.caches:
                cache.epoch_started()

    def undo(self) -> None:
        self._settled = self.forms
        for site in self._sites:
            site.remove()


def _place(module: torch.nn.Module, name: str) -> Place:
    try:
        part = module.get_submodule(name)
    except AttributeError as exc:
        raise ConfigError(f"The plan has a frozen trunk at {name!r}, but {exc}.") from exc
    if part._compiled_call_impl is not None:
        raise ConfigError(f"The plan has a frozen trunk at {name!r}, which is compiled already.")
    return Place(name=name, module=part, whole=not is_live(part))


# Of a module that cannot be one trunk, parts with this share of its weights are looked at.
_LEAST_SHARE = 0.05
