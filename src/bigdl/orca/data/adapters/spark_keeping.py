"""How long files live that a DataFrame reads: as long as Spark has a plan that reads them.

A DataFrame made from another one does not know the other's Python object, so that object alone
cannot say when the files may go. What all of their plans share is the function that reads the
files, an object in Spark's JVM: when that has been collected, nobody can ask for the rows any
more. Over Spark Connect there is no JVM to ask; the files live as long as the session.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

from py4j.protocol import Py4JError

if TYPE_CHECKING:
    from collections.abc import Callable

    from bigdl.orca.data.spool import Shards

__all__ = ["keep", "let_go"]

logger = logging.getLogger(__name__)

#: Seconds between looks.
_EVERY_S = 5.0

#: Files, each with what tells whether they are still needed.
_kept: list[tuple[Shards, Callable[[], bool]]] = []
_changing = threading.Lock()


def keep(frame: Any, shards: Shards) -> None:
    """Keep files for a DataFrame, and for all that are made from it.

    Args:
        frame: Made by ``mapInArrow`` and ``toDF``.
        shards: What it reads.
    """
    needed = _watched(frame)
    with _changing:
        is_first = not _kept
        _kept.append((shards, needed))
        if is_first:
            threading.Thread(target=_look_after, name="spool-keeper", daemon=True).start()


def let_go() -> None:
    """Remove what no plan reads any more."""
    with _changing:
        gone = [one for one in _kept if not one[1]()]
        _kept[:] = [one for one in _kept if one not in gone]
    for shards, _ in gone:
        shards.close()


def _look_after() -> None:
    wake = threading.Event()
    while True:
        wake.wait(_EVERY_S)
        try:
            let_go()
        except Exception:  # whatever happens to one, the others are looked after
            logger.exception("Spooled rows could not be let go")
        with _changing:
            if not _kept:
                return


def _watched(frame: Any) -> Callable[[], bool]:
    """Tells whether a plan still reads; the session decides where nothing else can."""
    session = frame.sparkSession
    if not hasattr(frame, "_jdf"):  # Spark Connect
        alive = weakref.ref(session)
        return lambda: (found := alive()) is not None and not getattr(found, "is_stopped", False)
    context = session.sparkContext
    plan = frame._jdf.queryExecution().logical()
    while "MapInArrow" not in plan.getClass().getSimpleName():  # "PythonMapInArrow" before Spark 4
        plan = plan.children().head()
    function = plan.functionExpr().func()
    weak = context._jvm.java.lang.ref.WeakReference(function)
    is_there = _is_there
    try:
        is_there(weak)
    except Py4JError:  # Java before 16
        is_there = _can_be_had

    def is_needed() -> bool:
        if context._jsc is None:  # stopped
            return False
        try:
            return is_there(weak)
        except (Py4JError, OSError):  # the JVM has gone
            return False

    return is_needed


def _is_there(weak: Any) -> bool:
    """Whether a weak reference still refers, without making a strong one."""
    return not weak.refersTo(None)


def _can_be_had(weak: Any) -> bool:
    return weak.get() is not None
