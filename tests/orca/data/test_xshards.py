"""Shards on local worker processes: the contract, misuse, interruption, others' libraries."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from bigdl.errors import ArgumentError, ConfigError, ContextError, DataError
from bigdl.orca import init_orca_context
from bigdl.orca.data import XShards, per_worker
from bigdl.testing.processes import are_gone, within
from bigdl.testing.xshards import XShardsContract

pd = pytest.importorskip("pandas")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class TestLocal(XShardsContract):
    @classmethod
    def open_context(cls):
        return init_orca_context(cores=2)


@pytest.fixture
def shards(context):
    return XShards.partition(table(), 2)


@pytest.fixture(scope="module")
def context():
    with init_orca_context(cores=2) as context:
        yield context


def table(rows=6):
    return pd.DataFrame({"a": np.arange(rows), "b": np.arange(rows) / 4, "c": list("xyxyxy")})


# --- misuse: one clear error each, before any work --------------------------------------------


def arrays(shards):
    return XShards.partition(np.arange(4), 2)


MISUSE = [
    (lambda s: XShards.partition([]), DataError, "no rows"),
    (lambda s: XShards.partition(None), DataError, "NoneType has no rows"),
    (lambda s: XShards.partition(5), DataError, "int has no rows"),
    (lambda s: XShards.partition((np.zeros(2), np.zeros(3))), DataError, "2.*3"),
    (lambda s: XShards.partition(np.zeros(3), 4), DataError, "4 shards of 3 rows. Use at most 3"),
    (lambda s: XShards.partition(np.zeros(3), 0), ConfigError, "num_shards=0.*at least 1"),
    (lambda s: XShards.partition(np.zeros(3), 1.5), ArgumentError, "whole number, not 1.5"),
    (lambda s: XShards.partition(np.zeros(3), num_shard=1), ArgumentError, "'num_shards'"),
    (lambda s: s.transform_shard("negative"), ArgumentError, "function, not 'negative'"),
    (lambda s: s.transform_shard(len, colour=1), ArgumentError, "colour"),
    (lambda s: s[0], ArgumentError, r"collect\(\)\[…\]"),
    (lambda s: s[:2], ArgumentError, "not how to take a shard"),
    (lambda s: iter(s), ArgumentError, r"collect\(\)"),
    (lambda s: pickle.dumps(s), ArgumentError, "do not travel"),
    (lambda s: s.repartition(0), ConfigError, "num_partitions=0"),
    (lambda s: s.repartition("2"), ArgumentError, "whole number, not '2'"),
    (lambda s: s.partition_by([]), ConfigError, "names no column"),
    (lambda s: s.partition_by("a", 0), ConfigError, "num_partitions=0"),
    (lambda s: s.zip(table()), ArgumentError, "XShards, not a DataFrame"),
    (lambda s: s.zip(s.repartition(3)), DataError, "2 and 3"),
    (lambda s: s.merge(table()), ArgumentError, "XShards, not a DataFrame"),
    (lambda s: s.merge(s, how="iner"), ConfigError, "'inner'"),
    (lambda s: s.merge(s, how=3), ConfigError, "how=3"),
    (lambda s: s.merge(s, on=[]), ConfigError, "names no column"),
    (lambda s: s.group_by("a", {}), ArgumentError, "agg="),
    (lambda s: s.group_by("a", ["mean"]), ArgumentError, "agg="),
    (lambda s: s.group_by("a", {"b": 3}), ArgumentError, "aggregates for 'b', not 3"),
    (lambda s: s.group_by("a", {"b": []}), ArgumentError, "aggregates for 'b'"),
    (lambda s: s.sort_values([["a"]]), ArgumentError, "names of columns, not a list"),
    (lambda s: s.partition_by({"a": 1}), ArgumentError, "names of columns, not a dict"),
    (lambda s: s.sample(0.5, random_state="x"), ArgumentError, "whole number, not 'x'"),
    (lambda s: s.group_by([], {"b": "mean"}), ConfigError, "names no column"),
    (lambda s: s.group_by("a", {"b": "mean"}, join=True), ArgumentError, r"merge\(\)"),
    (lambda s: s.sort_values("a", "up"), ArgumentError, "ascending.*'up'"),
    (lambda s: s.sort_values(["a", "b"], [True]), ConfigError, "1 values for 2 columns"),
    (lambda s: s.sample("half"), ArgumentError, "number, not 'half'"),
    (lambda s: s.sample(1.5), ConfigError, "0 to 1"),
    (lambda s: s.sample(float("nan")), ConfigError, "0 to 1"),
    (lambda s: s.sample(0.5, random_state=-1), ConfigError, "random_state=-1"),
    (lambda s: s.save_pickle(3), ArgumentError, "path, not 3"),
    (lambda s: s.save_pickle("x", overwrite="yes"), ArgumentError, "overwrite"),
    (lambda s: XShards.load_pickle("x"), ConfigError, "trusted=True"),
    (lambda s: XShards.load_pickle("x", trusted="yes"), ConfigError, "trusted=True"),
    (lambda s: XShards.load_pickle("/no/such", trusted=True), FileNotFoundError, "/no/such"),
    (lambda s: XShards.load_pickle(3, trusted=True), ArgumentError, "path, not 3"),
    (lambda s: per_worker(3), ArgumentError, r"per_worker\(lambda: …\)"),
    (lambda s: s.to_spark_df(), ContextError, "runtime='spark'"),
    (lambda s: s.to_rdd(), ContextError, "runtime='spark'"),
    (lambda s: s.to_ray_dataset(), ContextError, "runtime='ray'"),
    (lambda s: XShards.from_spark_df(table()), ArgumentError, "needs a Spark DataFrame"),
    (lambda s: XShards.from_rdd([1, 2]), ArgumentError, "needs an RDD of Spark's"),
    (lambda s: XShards.from_ray_dataset(None), ContextError, "runtime='ray'"),
]


@pytest.mark.parametrize(("call", "kind", "text"), MISUSE, ids=range(len(MISUSE)))
def test_misuse_is_answered_before_any_work(shards, monkeypatch, tmp_path, call, kind, text):
    def work(*_):
        raise AssertionError("work was begun")

    monkeypatch.chdir(tmp_path)
    for name in ("map", "split", "gather", "scatter", "submit"):
        monkeypatch.setattr(shards._engine, name, work)
    with pytest.raises(kind, match=text):
        call(shards)
    assert list(tmp_path.iterdir()) == []


SEEN_IN_WORKERS = [
    (lambda s: s["aa"].collect(), "No column 'aa'.*'a'"),
    (lambda s: s.sort_values("aa").collect(), "no column 'aa'.*'a'"),
    (lambda s: s.partition_by("aa").collect(), "no column 'aa'"),
    (lambda s: s.group_by("a", {"z": "sum"}).collect(), "no column 'z'"),
    (lambda s: s.merge(s[["a"]], on="b").collect(), "right shards have no column 'b'"),
    (lambda s: s.merge(s[["a"]].transform_shard(lambda f: f.rename(columns={"a": "z"})),
                       ).collect(), "cannot join"),
    (lambda s: s.group_by("a", {"b": "meen"}).collect(), "no aggregate 'meen'.*'mean'"),
    (lambda s: s.group_by("a", {"c": ["mean"]}).collect(), "cannot aggregate"),
    (lambda s: s.transform_shard(lambda f: f.assign(c=["x", 1, 2])).sort_values("c").collect(),
     "cannot put these values in order"),
    (lambda s: s.unique(), "one column, not of frames of 3 columns"),
    (lambda s: s.split(), "tuples or lists, not a DataFrame"),
    (lambda s: arrays(s).describe(), "pandas frames, not of a ndarray"),
    (lambda s: arrays(s).sort_values("a").collect(), "pandas frames"),
    (lambda s: arrays(s).drop_missing_value().collect(), "pandas frames"),
    (lambda s: s["a"].sort_values("a").collect(), "single columns"),
    (lambda s: len(s.transform_shard(lambda f: None)), "forget to return"),
    (lambda s: s.transform_shard(lambda f: None).repartition(1).collect(), "forget to return"),
    (lambda s: s.transform_shard(lambda f: f if f["a"].iloc[0] else f["a"]).repartition(1)
        .collect(), "different kinds.*DataFrame and Series"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), SEEN_IN_WORKERS, ids=range(len(SEEN_IN_WORKERS)))
def test_what_only_the_data_tell(shards, call, text):
    with pytest.raises(DataError, match=text):
        call(shards)
    assert len(shards) == 6


def test_an_aggregate_of_the_users_fails_as_its_own(shards):
    def broken(column):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine") as caught:
        shards.group_by("a", {"b": [broken]}).collect()
    assert not isinstance(caught.value, DataError)


def test_numbers_may_be_numpys(shards):
    assert shards.repartition(np.int64(3)).num_partitions() == 3
    assert len(shards.sample(np.float64(0.5), random_state=np.int32(1))) == 3


def test_a_value_that_nobody_asks_for_any_more_goes(context, tmp_path):
    """With the next work of that worker."""

    class Held:
        def __del__(self):
            (tmp_path / "gone").touch()

    shards = XShards.partition(np.arange(1), 1)
    held = per_worker(Held)
    shards.transform_shard(lambda shard, held: shard, held).collect()
    assert not (tmp_path / "gone").exists()
    del held
    gc.collect()

    def work_reaches_it():
        shards.transform_shard(lambda shard: shard).collect()
        return (tmp_path / "gone").exists()

    assert within(10, work_reaches_it)


def test_names_of_bigdl_2(shards):
    assert shards.sort_values(col_names="a").num_partitions() == 2
    assert len(shards.sample(frac=0.5, seed=3)) == 3
    with pytest.raises(ArgumentError, match="merge"):
        shards.group_by("a", agg={"b": "sum"}, join=True)


@pytest.mark.parametrize("then", ["stopped", "again"])
def test_shards_belong_to_their_context(then):
    """In a program of its own, since this one's context runs."""
    program = """
        import sys
        import numpy as np
        from bigdl.errors import ContextError
        from bigdl.orca import init_orca_context, stop_orca_context
        from bigdl.orca.data import XShards

        try:
            XShards.partition(np.arange(4))
        except ContextError as exc:
            assert "init_orca_context" in str(exc)
        init_orca_context(cores=2)
        old = XShards.partition(np.arange(4)).cache()
        old.collect()
        stop_orca_context()
        if sys.argv[1] == "again":
            init_orca_context(cores=2)
            other = XShards.partition(np.arange(4))
        else:
            other = old.transform_shard(np.negative)
        for call in (old.collect, old.__len__, lambda: other.zip(old).collect()):
            try:
                call()
            except ContextError as exc:
                print("refused")
        """
    done = run(program, then)
    assert (done.stdout, done.stderr) == ("refused\n" * 3, "")


# --- other people's libraries -----------------------------------------------------------------


def test_opencv():
    cv2 = pytest.importorskip("cv2", reason="needs the [vision] extra")
    draw = np.random.default_rng(0)
    pictures = [draw.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8) for i in range(5)]
    files = [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures]

    def small(files, reader):
        grey = (reader(np.frombuffer(file, np.uint8)) for file in files)
        return np.stack([cv2.resize(one, (16, 16), interpolation=cv2.INTER_AREA) for one in grey])

    def reader():
        return lambda data: cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)  # cannot be pickled, too

    shards = XShards.partition(files, 2).transform_shard(small, per_worker(reader))
    wanted = small(files, reader())
    assert wanted.shape == (5, 16, 16)
    np.testing.assert_array_equal(np.concatenate(shards.collect()), wanted)
    assert len(shards) == 5


def test_scipy():
    signal_ = pytest.importorskip("scipy.signal", reason="comes with scikit-learn")
    sparse = pytest.importorskip("scipy.sparse", reason="comes with scikit-learn")
    waves = np.random.default_rng(0).normal(size=(6, 200))

    def smooth(shard, order):
        return signal_.sosfiltfilt(signal_.butter(order, 0.2, output="sos"), shard, axis=1)

    smoothed = XShards.partition(waves, 3).transform_shard(smooth, 4)
    np.testing.assert_allclose(np.concatenate(smoothed.collect()), smooth(waves, 4), rtol=1e-12)
    matrix = sparse.random(7, 5, density=0.4, format="csr", random_state=0)
    rows = XShards.partition(matrix, 3).transform_shard(lambda part: part.multiply(2).tocsr())
    (whole,) = rows.repartition(1).collect()
    assert whole.format == "csr"
    assert len(rows) == 7
    np.testing.assert_array_equal(whole.toarray(), 2 * matrix.toarray())


def test_a_blank_spacy_pipeline():
    spacy = pytest.importorskip("spacy", reason="optional; a pipeline that is slow to build")
    texts = ["Where's the cat?", "On the mat.", "", "Nobody saw it; nobody!", "The end"]

    def parser():
        import spacy  # built in the worker: the pipeline never travels

        pipeline = spacy.blank("en")
        pipeline.add_pipe("sentencizer")
        return pipeline

    def read(texts, pipeline):
        return pd.DataFrame(
            {
                "text": texts,
                "words": [[word.text for word in pipeline(text)] for text in texts],
                "sentences": [len(list(pipeline(text).sents)) for text in texts],
            }
        )

    found = pd.concat(
        XShards.partition(texts, 2).transform_shard(read, per_worker(parser)).collect(),
        ignore_index=True,
    )
    assert spacy.blank("en")  # it works here, too
    assert found["text"].tolist() == texts
    assert found["words"][0] == ["Where", "'s", "the", "cat", "?"]
    assert found["sentences"].tolist() == [1, 1, 0, 1, 1]
    pd.testing.assert_frame_equal(found, read(texts, parser()))


# --- interrupted, killed, left behind ---------------------------------------------------------


def run(program, *args, **more):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *args],
        capture_output=True,
        text=True,
        timeout=60,
        **more,
    )


CTRL_C = """
    import os, signal, sys, threading, time
    from pathlib import Path
    import numpy as np
    from bigdl.orca import init_orca_context, stop_orca_context
    from bigdl.orca.data import XShards

    folder = Path(sys.argv[1])

    def slow(shard):
        (folder / str(os.getpid())).touch()
        time.sleep(300)

    def interrupt():
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    init_orca_context(cores=2)
    shards = XShards.partition(np.arange(8), 8)
    slowed = shards.transform_shard(slow).cache()
    threading.Thread(target=interrupt).start()
    try:
        slowed.collect()
    except KeyboardInterrupt:
        print("interrupted")
    since = time.monotonic()
    print(np.concatenate(shards.transform_shard(np.negative).collect()).tolist())
    print("soon", time.monotonic() - since < 30)
    stop_orca_context()
"""


@linux
def test_ctrl_c_ends_the_work_and_the_context_goes_on(tmp_path):
    notes, temporary = tmp_path / "notes", tmp_path / "temporary"
    notes.mkdir()
    temporary.mkdir()
    done = run(CTRL_C, str(notes), env={**os.environ, "TMPDIR": str(temporary)})
    assert done.stderr == ""
    assert done.stdout == "interrupted\n[0, -1, -2, -3, -4, -5, -6, -7]\nsoon True\n"
    assert are_gone([int(note.name) for note in notes.iterdir()])
    assert list(temporary.iterdir()) == []


KILLED = """
    import os, sys, time
    import numpy as np
    from bigdl.orca import init_orca_context
    from bigdl.orca.data import XShards

    def slow(shard, folder):
        if shard[0] == 1:
            open(os.path.join(folder, str(os.getpid())), "w").close()
            time.sleep(300)
        return np.zeros(500_000)

    init_orca_context(cores=2)
    XShards.partition(np.arange(3), 3).transform_shard(slow, sys.argv[1]).collect()
"""


@linux
def test_a_killed_driver_leaves_nothing(tmp_path):
    notes, temporary = tmp_path / "notes", tmp_path / "temporary"
    notes.mkdir()
    temporary.mkdir()
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(notes)],
        env={**os.environ, "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert within(30, lambda: list(notes.iterdir()))
    (worker,) = (int(note.name) for note in notes.iterdir())
    assert list(temporary.iterdir())
    program.kill()
    program.communicate(timeout=20)
    assert are_gone([worker])
    assert within(15, lambda: not list(temporary.iterdir()))


def test_values_go_with_the_last_shards_that_need_them(context):
    """What is dropped, or not cached any more, is no longer stored."""
    before = stored(context)
    made = XShards.partition(np.arange(8), 4).transform_shard(
        lambda part: np.zeros(50_000) + part[0]
    )
    made.cache().collect()
    with_cache = stored(context)
    assert with_cache > before + 4 * 400_000
    child = made.transform_shard(np.sum)
    del made
    gc.collect()
    assert stored(context) == with_cache  # the child needs it
    assert child.collect() == [0.0, 100_000.0, 200_000.0, 300_000.0]
    del child
    gc.collect()
    assert within(5, lambda: stored(context) <= before)


def stored(context):
    root, total = Path(context.engine._start().folder()), 0
    for file in root.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # workers put files away meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total
