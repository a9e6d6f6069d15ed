"""The cache by content: right for any order, bounded, gone without a trace."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from bigdl.nano.pytorch.frozen import feature_cache
from bigdl.nano.pytorch.frozen.feature_cache import FeatureCache


class Doubling:
    """Counts the rows it computes."""

    def __init__(self):
        self.rows = 0

    def __call__(self, inputs):
        self.rows += len(inputs[0])
        return (inputs[0].flatten(1) * 2, inputs[0].flatten(1).sum(1).bfloat16())


def take(cache, x, compute):
    doubled, total = cache.take((x,), compute)
    assert torch.equal(doubled, x.flatten(1) * 2)
    assert torch.equal(total, x.flatten(1).sum(1).bfloat16())
    return doubled


def test_second_time_nothing_is_computed():
    cache, compute, x = FeatureCache(), Doubling(), torch.randn(8, 3, 4, 4)
    take(cache, x, compute)
    take(cache, x, compute)
    assert (compute.rows, cache.hits, cache.misses) == (8, 8, 8)


def test_any_order_and_batch_size():
    cache, compute, x = FeatureCache(), Doubling(), torch.randn(23, 6)
    for part in x.split(5):  # ragged end
        take(cache, part, compute)
    for part in x[torch.randperm(23)].split(4):
        take(cache, part, compute)
    assert compute.rows == 23


def test_only_the_misses_are_computed():
    cache, compute, x = FeatureCache(), Doubling(), torch.randn(6, 5)
    take(cache, x[:4], compute)
    take(cache, x[[5, 0, 4, 2]], compute)
    assert compute.rows == 6


def test_rows_that_are_equal_are_computed_once():
    cache, compute = FeatureCache(), Doubling()
    x = torch.randn(2, 5)[[0, 1, 0, 0, 1]]
    take(cache, x, compute)
    assert compute.rows == 2
    assert len(cache) == 2


def test_what_is_handed_out_is_the_callers():
    cache, compute, x = FeatureCache(), Doubling(), torch.randn(3, 5)
    take(cache, x, compute).zero_()
    take(cache, x, compute).zero_()
    take(cache, x, compute)
    assert not take(cache, x, compute).requires_grad


def test_layouts_never_mix():
    # the same bytes in memory, another picture
    cache, compute = FeatureCache(), Doubling()
    x = torch.randn(2, 3, 4, 4)
    other = x.reshape(2, 4, 4, 3).permute(0, 3, 1, 2)
    assert other.is_contiguous(memory_format=torch.channels_last)
    take(cache, x, compute)
    take(cache, other, compute)
    take(cache, other, compute)
    assert compute.rows == 4


def test_several_inputs_all_count():
    cache, seen = FeatureCache(), []

    def compute(inputs):
        seen.append(len(inputs[0]))
        return (inputs[0] + inputs[1],)

    a, b = torch.randn(4, 3), torch.randn(4, 3)
    for first, second in ((a, b), (a, b), (b, a), (a, b + 1)):
        (got,) = cache.take((first, second), compute)
        assert torch.equal(got, first + second)
    assert seen == [4, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_types(dtype):
    cache = FeatureCache()
    x = torch.randint(0, 2, (4, 3)).to(dtype)
    for _ in range(2):
        (got,) = cache.take((x,), lambda inputs: (inputs[0].clone(),))
        assert got.dtype == dtype
        assert torch.equal(got, x)


def test_without_xxhash(monkeypatch):
    monkeypatch.setattr(feature_cache, "is_installed", lambda name: False)
    cache, compute, x = FeatureCache(), Doubling(), torch.randn(4, 3)
    take(cache, x, compute)
    take(cache, x, compute)
    assert compute.rows == 4


def test_inference_mode_and_training_share_rows():
    cache, compute, x = FeatureCache(), Doubling(), torch.randn(4, 3)
    with torch.inference_mode():
        take(cache, x, compute)
        inside = take(cache, x, compute)
    outside = take(cache, x, compute)
    weight = torch.ones(3, requires_grad=True)
    (outside * weight).sum().backward()
    assert inside.is_inference()
    assert compute.rows == 4


class TestBudget:
    def test_none_at_all(self):
        cache, compute, x = (
            FeatureCache(memory_bytes=0, spill_bytes=0),
            Doubling(),
            torch.ones(4, 3),
        )
        x = x * torch.arange(4)[:, None]
        take(cache, x, compute)
        take(cache, x, compute)
        assert compute.rows == 8
        assert len(cache) == 0

    def test_spills_once_rows_come_back(self, tmp_path):
        row = 100 * 4 + 2 + 160
        cache = FeatureCache(memory_bytes=10 * row, directory=tmp_path)
        compute, x = Doubling(), torch.randn(40, 100)
        take(cache, x, compute)
        assert len(cache) == 10  # nothing is known yet: no file
        take(cache, x, compute)
        assert len(cache) == 40
        assert compute.rows == 40 + 30
        take(cache, x[torch.randperm(40)], compute)
        assert compute.rows == 70
        assert list(tmp_path.iterdir()) == []  # a file without a name

    def test_of_the_file(self, tmp_path):
        row = 100 * 4 + 2
        cache = FeatureCache(
            memory_bytes=10 * (row + 160), spill_bytes=5 * row, directory=tmp_path
        )
        compute, x = Doubling(), torch.randn(40, 100)
        for _ in range(3):
            take(cache, x, compute)
        assert len(cache) == 15

    def test_disk_that_cannot_be_written(self, tmp_path):
        blocker = tmp_path / "file"
        blocker.write_text("no folder")
        cache = FeatureCache(memory_bytes=10 * 562, directory=blocker / "below")
        compute, x = Doubling(), torch.randn(40, 100)
        for _ in range(3):
            take(cache, x, compute)
        assert len(cache) == 10

    def test_default_folder_is_our_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        cache, compute, x = FeatureCache(memory_bytes=562), Doubling(), torch.randn(4, 100)
        for _ in range(2):
            take(cache, x, compute)
        assert len(cache) == 4
        assert (tmp_path / "bigdl").is_dir()

    @pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads Linux' list of files")
    def test_nothing_is_left_after_kill(self, tmp_path):
        code = textwrap.dedent(f"""
            import os, signal, torch
            from pathlib import Path
            from bigdl.nano.pytorch.frozen.feature_cache import FeatureCache
            cache = FeatureCache(memory_bytes=0, directory=Path({str(tmp_path)!r}))
            cache.hits = 1
            cache.take((torch.randn(9, 1000),), lambda inputs: (inputs[0] * 2,))
            links = [os.readlink(f"/proc/self/fd/{{n}}") for n in os.listdir("/proc/self/fd")
                     if os.path.islink(f"/proc/self/fd/{{n}}")]
            assert any({str(tmp_path)!r} in link for link in links), links
            os.kill(os.getpid(), signal.SIGKILL)
        """)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == -9, done.stderr
        assert list(tmp_path.iterdir()) == []


class TestEnds:
    def test_when_rows_never_come_back(self):
        cache, compute = FeatureCache(), Doubling()
        for _ in range(2):
            take(cache, torch.randn(32, 4), compute)
            cache.epoch_started()
        assert not cache.closed or len(cache) == 0
        take(cache, torch.randn(32, 4), compute)
        cache.epoch_started()
        assert cache.closed
        assert len(cache) == 0
        take(cache, torch.randn(32, 4), compute)  # still right

    def test_not_while_they_do(self):
        cache, compute, x = FeatureCache(), Doubling(), torch.randn(32, 4)
        for _ in range(4):
            take(cache, x[torch.randperm(32)], compute)
            cache.epoch_started()
        assert not cache.closed
        assert compute.rows == 32

    def test_not_when_it_began_late_in_an_epoch(self):
        cache, compute, x = FeatureCache(), Doubling(), torch.randn(100, 4)
        take(cache, x[98:], compute)
        cache.epoch_started()
        take(cache, x, compute)
        cache.epoch_started()
        assert not cache.closed

    def test_not_by_an_epoch_without_calls(self):
        cache, compute, x = FeatureCache(), Doubling(), torch.randn(10, 4)
        take(cache, x, compute)
        for _ in range(3):
            cache.epoch_started()
        take(cache, x, compute)
        assert compute.rows == 10

    def test_without_epochs_after_many_rows(self, monkeypatch):
        monkeypatch.setattr(feature_cache, "_PATIENCE", 0)
        cache, compute = FeatureCache(), Doubling()
        take(cache, torch.randn(8, 4), compute)
        assert cache.closed

    def test_closed_twice(self):
        cache, compute, x = FeatureCache(), Doubling(), torch.randn(8, 4)
        take(cache, x, compute)
        cache.close()
        cache.close()
        take(cache, x, compute)
        assert compute.rows == 16


def test_outputs_of_changing_length_are_not_kept():
    cache = FeatureCache()
    widths = iter((3, 5, 5))

    def compute(inputs):
        return (torch.ones(len(inputs[0]), next(widths)),)

    assert cache.take((torch.zeros(1, 2),), compute)[0].shape == (1, 3)
    assert cache.take((torch.ones(1, 2),), compute)[0].shape == (1, 5)
    assert cache.take((torch.ones(1, 2),), compute)[0].shape == (1, 5)
    assert len(cache) == 1
