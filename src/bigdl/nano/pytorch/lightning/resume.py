"""Checkpoints that resume at the next row: Lightning's loops, with a memory of their loader.

A training loader's order comes out of random streams when its iteration begins. So the streams
of that moment are noted each epoch and travel in checkpoints; a resumed run puts them back,
begins the iteration again, passes over the batches that were trained on (without reading their
rows where the dataset is indexed), and then goes on with the streams of the checkpoint.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import StoredModelError
from bigdl.nano.pytorch.lightning.host import part
from bigdl.nano.pytorch.lightning.summed_strategy import SummedStrategy
from bigdl.nano.pytorch.plan import streams
from bigdl.nano.pytorch.processes.part_loader import whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["KEY", "install"]

#: The one key that we add to a checkpoint.
KEY = "bigdl"
_SCHEMA = 1

_StockFitLoop = part("loops.fit_loop:_FitLoop")
_StockEpochLoop = part("loops.training_epoch_loop:_TrainingEpochLoop")
_StockConnector = part("trainer.connectors.checkpoint_connector:_CheckpointConnector")
_sized_len = part("loops.fit_loop:sized_len")
_TrainerFn = part("trainer.states:TrainerFn")


def install(trainer: Any) -> None:
    """Give a trainer that was just made loops and a connector that remember."""
    stock = trainer.fit_loop
    fit_loop = _FitLoop(trainer, min_epochs=stock.min_epochs, max_epochs=stock.max_epochs)
    fit_loop.epoch_loop = _TrainingEpochLoop(
        trainer, min_steps=stock.epoch_loop.min_steps, max_steps=stock.epoch_loop.max_steps
    )
    trainer.fit_loop = fit_loop
    trainer._checkpoint_connector = _CheckpointConnector(trainer)


# --- where the streams stand ------------------------------------------------------------------


def _read(loaders: Sequence[Any]) -> dict[str, Any]:
    """The global streams, the loaders' own generators, and samplers that have a state."""
    return {
        "streams": streams.read(),
        "generators": [streams.read_generator(one) for one in _generators(loaders)],
        "samplers": [copy.deepcopy(one.state_dict()) for one in _stateful_samplers(loaders)],
    }


def _write(state: dict[str, Any], loaders: Sequence[Any], *, samplers: bool) -> None:
    streams.write(state["streams"])
    found = _generators(loaders)
    if len(found) != len(state["generators"]):
        raise StoredModelError(
            f"The checkpoint was made with {len(state['generators'])} random generators in the "
            f"training loaders; these have {len(found)}. Resume with the same loaders."
        )
    for generator, one in zip(found, state["generators"], strict=True):
        streams.write_generator(generator, one)
    if samplers:
        for sampler, one in zip(_stateful_samplers(loaders), state["samplers"], strict=False):
            sampler.load_state_dict(copy.deepcopy(one))


def _generators(loaders: Sequence[Any]) -> list[Any]:
    owners = [owner for one in loaders for owner in (one, getattr(one, "dataset", None))]
    return streams.generators(*owners)


def _stateful_samplers(loaders: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for loader in loaders:
        outer = getattr(loader, "batch_sampler", None)
        for one in (outer, getattr(outer, "sampler", None), getattr(loader, "sampler", None)):
            has_state = hasattr(one, "state_dict") and hasattr(one, "load_state_dict")
            if has_state and not any(one is other for other in found):
                found.append(one)
    return found


# --- the loops --------------------------------------------------------------------------------


class _FitLoop(_StockFitLoop):  # type: ignore[misc,valid-type]
    """Lightning's fit loop that notes how the iteration of its loaders began."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: How this epoch's iteration began: just before it, and before its first batch.
        self.began: dict[str, Any] = {}
        #: What a checkpoint said, until the first epoch after it has begun.
        self.resume: dict[str, Any] | None = None
        self._is_begun_anew = False

    @property
    def loaders(self) -> list[Any]:
        combined = self._combined_loader
        return [] if combined is None else [whole(one) for one in combined.flattened]

    @property
    def has_own_state(self) -> bool:
        """A loader keeps its place by itself: Lightning stores and loads that."""
        return bool(self._combined_loader is not None and self._combined_loader._state_dicts())

    def _load_combined_loader_states(self) -> None:
        super()._load_combined_loader_states()
        # the iterator is made right after this
        if self.resume is not None and self.resume["began"] and not self.has_own_state:
            _write(self.resume["began"]["iterator"], self.loaders, samplers=True)
            self._is_begun_anew = True
        self.note_iterator()

    def note_iterator(self) -> None:
        """The loaders' iterator is about to be made."""
        self.began = {"iterator": _read(self.loaders), "again": {}, "is_over": False}

    def note_first(self) -> None:
        """The first batch is about to be fetched."""
        self.began["first"] = _read(self.loaders)

    def note_again(self, batch: int) -> None:
        """A shorter loader is about to begin again, before the fetch of this batch."""
        self.began["again"][batch] = _read(self.loaders)

    def on_advance_end(self) -> None:
        self.began["is_over"] = True
        super().on_advance_end()

    def on_run_start(self) -> None:
        super().on_run_start()
        if self.resume is not None:  # what on_train_start drew was drawn before the checkpoint
            _write(self.resume["now"], self.loaders, samplers=False)

    def begin_again(self, data_fetcher: Any) -> None:
        """Make the iterator anew, unless that would lose rows of a stream."""
        if not any(isinstance(one, Iterator) for one in self.loaders):
            iter(data_fetcher)

    def begins_with_an_epoch(self, batches: int) -> bool:
        """Whether the run goes on with a whole epoch: nothing of it was fetched before."""
        assert self.resume is not None
        began = self.resume["began"]
        return batches == 0 and (
            not began or began["is_over"] or not self.resume["is_within_batch"]
        )

    def pass_over(self, data_fetcher: Any, batches: int) -> None:
        """In a broken epoch: to where the checkpoint was made."""
        assert self.resume is not None
        began, now = self.resume["began"], self.resume["now"]
        if began and not self.has_own_state:
            if not self._is_begun_anew:  # the loaders were set up before the checkpoint was read
                _write(began["iterator"], self.loaders, samplers=True)
                self.begin_again(data_fetcher)
            _write(began["first"], self.loaders, samplers=False)
            for batch in range(batches):
                if batch in began["again"]:
                    _write(began["again"][batch], self.loaders, samplers=False)
                _pass_over(data_fetcher)
            self.began = began
            if batches == 0:  # saved within the first batch: that is fetched once more
                now = began["first"]
        _write(now, self.loaders, samplers=False)
        _write_gradients(self.trainer.lightning_module, self.resume["gradients"])

    def state_now(self) -> dict[str, Any]:
        """What a checkpoint needs to know."""
        progress = self.epoch_loop.batch_progress.current
        return {
            "began": dict(self.began) if "first" in self.began else {},
            "now": _read(self.loaders),
            "is_within_batch": progress.ready != progress.processed,
            "gradients": _gathered_gradients(self.trainer),
        }


class _TrainingEpochLoop(_StockEpochLoop):  # type: ignore[misc,valid-type]
    """Lightning's epoch loop that resumes its loader where it was.

    It keeps the name of the stock class, which profilers show.
    """

    _again_at: tuple[int, ...] = ()
    #: Called after each step, while set.
    after_step: Callable[[], None] | None = None
    #: Called when an epoch begins, while set.
    epoch_started: Callable[[], None] | None = None

    def reset(self) -> None:
        fit_loop = self.trainer.fit_loop
        if fit_loop.resume is not None and fit_loop.restarted_on_epoch_start:
            # saved before this epoch's first batch: the counters are still the last epoch's,
            # and stock Lightning takes this one for done
            self.restarting = False
        with warnings.catch_warnings():
            if fit_loop.resume is not None:  # these loaders are resumable
                warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended")
            super().reset()

    def on_run_start(self, data_fetcher: Any) -> None:
        fit_loop = self.trainer.fit_loop
        is_broken_epoch = self.restarting
        batches = self.batch_progress.current.ready
        if fit_loop.resume is None:
            if self._begins_anew():
                fit_loop.note_iterator()
            super().on_run_start(data_fetcher)
            fit_loop.note_first()
        elif is_broken_epoch and not fit_loop.begins_with_an_epoch(batches):
            super().on_run_start(data_fetcher)
            fit_loop.pass_over(data_fetcher, batches)
            fit_loop.resume = None
        else:
            if not fit_loop.has_own_state:
                fit_loop.note_iterator()
                fit_loop.begin_again(data_fetcher)
            super().on_run_start(data_fetcher)
            fit_loop.note_first()
            fit_loop.resume = None
        self._again_at = _beginning_again(fit_loop._combined_loader)
        if self.epoch_started is not None and not is_broken_epoch:
            self.epoch_started()

    def _begins_anew(self) -> bool:
        """Whether the stock loop makes the iterator anew (the first one was made before)."""
        return bool(
            self.trainer.current_epoch > 0
            and not self.trainer.fit_loop.is_resuming
            and not self.restarting
        )

    def advance(self, data_fetcher: Any) -> None:
        if self._again_at:
            batch = self.batch_progress.current.ready
            if any(batch and batch % length == 0 for length in self._again_at):
                self.trainer.fit_loop.note_again(batch)
        super().advance(data_fetcher)
        if self.after_step is not None:
            self.after_step()


# --- passing over -----------------------------------------------------------------------------


class _NoRows:
    """Stands for the part of a loader's iterator that reads rows."""

    def fetch(self, index: Any) -> None:
        return None


def _pass_over(data_fetcher: Any) -> None:
    """Take one batch out of the fetcher without counting it (it is counted already)."""
    source = data_fetcher if data_fetcher.length is None else data_fetcher.iterator
    with _not_reading(data_fetcher), suppress(StopIteration):
        next(source)


def _beginning_again(combined_loader: Any) -> tuple[int, ...]:
    """Lengths of loaders that begin again while a longer one still goes on."""
    if combined_loader is None or combined_loader._mode != "max_size_cycle":
        return ()
    lengths = [_sized_len(one) for one in combined_loader.flattened]
    longest = max((length for length in lengths if length is not None), default=0)
    return tuple({length for length in lengths if length and length < longest})


@contextmanager
def _not_reading(data_fetcher: Any) -> Iterator[None]:
    """Indexed datasets read in this process are not read in the block.

    Streams have to be, and so have rows of worker processes, whose random numbers would
    otherwise not be where they were.
    """
    changed = []
    if data_fetcher.length is not None:  # else a batch fetched ahead would be an empty one
        for one in getattr(data_fetcher.iterator._iterator, "iterators", []):
            reader = getattr(one, "_dataset_fetcher", None)
            if type(reader).__name__ == "_MapDatasetFetcher":
                changed.append((one, reader))
                one._dataset_fetcher = _NoRows()
    try:
        yield
    finally:
        for one, reader in changed:
            one._dataset_fetcher = reader


# --- gradients between two updates ------------------------------------------------------------


def _gathered_gradients(trainer: Any) -> dict[str, Any]:
    """Gradients gathered since the last update, by parameter; {} if there are none."""
    module = trainer.lightning_module
    gathers = trainer.accumulate_grad_batches > 1 and trainer.training
    if module is None or not gathers or not trainer.fit_loop._should_accumulate():
        return {}
    if isinstance(trainer.strategy, SummedStrategy):
        whole = trainer.strategy.gathered_gradients()
        if whole is not None:
            return whole
    return {
        name: p.grad.detach().clone()
        for name, p in module.named_parameters()
        if p.grad is not None
    }


def _write_gradients(module: Any, gradients: dict[str, Any]) -> None:
    if module.trainer.global_rank > 0:
        return  # they are everybody's, and are added up once more
    parameters = dict(module.named_parameters())
    for name, gradient in gradients.items():
        if name in parameters:
            parameters[name].grad = gradient.to(parameters[name].device)


# --- in a checkpoint --------------------------------------------------------------------------


class _CheckpointConnector(_StockConnector):  # type: ignore[misc,valid-type]
    """Lightning's connector, with one more key in the checkpoints."""

    _is_tuning = False

    def dump_checkpoint(self, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().dump_checkpoint(weights_only)
        trainer = self.trainer
        if trainer._session is not None and trainer._session.force is not None:
            trainer._session.force.as_users(checkpoint)
        ours: dict[str, Any] = {"schema_version": _SCHEMA, "plan": trainer._plan_in_words()}
        if not weights_only and trainer.state.fn == _TrainerFn.FITTING:
            ours["data"] = trainer.fit_loop.state_now()
        checkpoint[KEY] = ours
        return checkpoint

    def restore(self, *args: Any, **kwargs: Any) -> None:
        # only a tuner restores all at once, in the middle of a run: the streams go on
        self._is_tuning = True
        try:
            super().restore(*args, **kwargs)
        finally:
            self._is_tuning = False

    def restore_training_state(self) -> None:
        super().restore_training_state()
        ours = self._loaded_checkpoint.get(KEY) if self._loaded_checkpoint else None
        if ours is None or self._is_tuning or self.trainer.state.fn != _TrainerFn.FITTING:
            return
        if ours.get("schema_version") != _SCHEMA:
            raise StoredModelError(
                f"The checkpoint's part of ours is of schema {ours.get('schema_version')!r}; "
                f"this version reads {_SCHEMA}. Take the key {KEY!r} out to resume without it."
            )
        self.trainer.fit_loop.resume = ours.get("data")
        self.trainer._keep_plan(ours.get("plan"))
