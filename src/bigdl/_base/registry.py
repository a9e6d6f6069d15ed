"""Tables of implementations by name, imported when they are asked for."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from bigdl._base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

T = TypeVar("T")


def nearest(name: str, known: Mapping[str, object] | list[str] | tuple[str, ...]) -> str:
    """A sentence " Did you mean 'x'?" for the nearest known name, or ""."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class Registry(Generic[T]):
    """A table from a name to ``"module:attribute"``; other packages add rows by entry point.

    Args:
        kind: What a row is, for error texts ("accelerator").
        known: The rows that we ship.
        group: Entry point group whose entries are added; ours win over theirs.
    """

    def __init__(self, kind: str, known: Mapping[str, str], *, group: str | None = None) -> None:
        self.kind = kind
        self._known = dict(known)
        self._group = group

    def _rows(self) -> dict[str, str]:
        if self._group is not None:  # asked once, when first needed
            from importlib.metadata import entry_points

            for entry in entry_points(group=self._group):
                self._known.setdefault(entry.name, entry.value)
            self._group = None
        return self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows())

    def __contains__(self, name: object) -> bool:
        return name in self._rows()

    def __repr__(self) -> str:
        return f"Registry({self.kind}: {', '.join(self)})"

    def get(self, name: str) -> T:
        """Import and return what stands under ``name``.

        Raises:
            ConfigError: No row has that name; the text lists the rows and the nearest one.
        """
        rows = self._rows()
        if name not in rows:
            raise ConfigError(
                f"No {self.kind} {name!r}; have {', '.join(sorted(rows))}.{nearest(name, rows)}"
            )
        module, _, attribute = rows[name].partition(":")
        return cast("T", getattr(importlib.import_module(module), attribute))
