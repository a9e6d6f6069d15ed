"""Files as shards: which ones, in which order, read as pandas reads them; what cannot be read."""

from __future__ import annotations

import gzip
import zipfile

import numpy as np
import pytest

from bigdl.errors import ArgumentError, ConfigError, DataError
from bigdl.orca import init_orca_context
from bigdl.orca.data import XShards
from bigdl.orca.data.pandas import read_csv, read_json, read_parquet
from bigdl.orca.data.reading import File, Read

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

READERS = {
    "csv": (read_csv, lambda frame, path: frame.to_csv(path, index=False)),
    "json": (read_json, lambda frame, path: frame.to_json(path)),
    "parquet": (read_parquet, lambda frame, path: frame.to_parquet(path)),
}


@pytest.fixture(scope="module", autouse=True)
def context():
    with init_orca_context(cores=2) as context:
        yield context


@pytest.fixture(params=list(READERS))
def kind(request):
    return request.param


def numbered(first, last):
    rows = np.arange(first, last)
    return pd.DataFrame({"id": rows, "half": rows / 2, "name": [f"n{i}" for i in rows]})


def write(kind, path, first, last):
    path.parent.mkdir(parents=True, exist_ok=True)
    READERS[kind][1](numbered(first, last), path)


def ids(shards):
    return [frame["id"].tolist() for frame in shards.collect()]


# --- which files, in which order --------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, kind):
    """Three files in two folders, beside others' notes."""
    root = tmp_path / "table"
    write(kind, root / f"b-2.{kind}", 4, 6)
    write(kind, root / f"b-10.{kind}", 2, 4)
    write(kind, root / "a" / f"z.{kind}", 0, 2)
    for note in ("_SUCCESS", ".part.crc", "_temporary/0.x", ".hidden/1.x"):
        (root / note).parent.mkdir(exist_ok=True)
        (root / note).write_text("no table")
    return root


def test_a_folder_in_the_order_of_names(kind, folder):
    read, _ = READERS[kind]
    for path in (folder, str(folder), f"{folder}/", f"file://{folder}"):
        shards = read(path)
        assert ids(shards) == [[0, 1], [2, 3], [4, 5]]
        assert len(shards) == 6
        assert shards.num_partitions() == 3
    wanted = pd.concat([numbered(0, 2), numbered(2, 4), numbered(4, 6)])
    pd.testing.assert_frame_equal(pd.concat(read(folder).collect()), wanted)


def test_a_file_a_glob_and_a_list(kind, folder, monkeypatch):
    read, _ = READERS[kind]
    two, ten = folder / f"b-2.{kind}", folder / f"b-10.{kind}"
    assert ids(read(two)) == [[4, 5]]
    assert ids(read(f"{folder}/b-*.{kind}")) == [[2, 3], [4, 5]]
    assert ids(read(f"{folder}/**/*.{kind}")) == [[0, 1], [2, 3], [4, 5]]
    assert ids(read([two, str(ten), two])) == [[4, 5], [2, 3], [4, 5]]
    assert ids(read((f"{folder}/b-2*", folder / "a"))) == [[4, 5], [0, 1]]
    monkeypatch.chdir(folder)
    assert ids(read(f"b-2.{kind}")) == [[4, 5]]
    assert ids(read(file_path=f"b-2.{kind}")) == [[4, 5]]  # as in BigDL 2.x


def test_a_name_with_signs_of_a_glob_is_found(kind, tmp_path):
    write(kind, tmp_path / f"[1] a?.{kind}", 0, 2)
    assert ids(READERS[kind][0](tmp_path / f"[1] a?.{kind}")) == [[0, 1]]


def test_folders_that_name_columns(kind, tmp_path):
    """As pyarrow reads them: whole numbers if all are, missing values, escaped names."""
    read, _ = READERS[kind]
    write(kind, tmp_path / "year=2021" / "city=A%20B" / f"x.{kind}", 2, 4)
    write(kind, tmp_path / "year=2020" / "city=__HIVE_DEFAULT_PARTITION__" / f"x.{kind}", 0, 2)
    found = pd.concat(read(tmp_path).collect(), ignore_index=True)
    assert found["id"].tolist() == [0, 1, 2, 3]
    assert found["year"].tolist() == [2020, 2020, 2021, 2021]
    assert found["year"].dtype == np.int64
    assert found["city"].tolist() == [None, None, "A B", "A B"]
    assert list(found) == ["id", "half", "name", "year", "city"]
    (one,) = read(f"{tmp_path}/year=2021").collect()  # from there on
    assert list(one) == ["id", "half", "name", "city"]
    write(kind, tmp_path / f"x.{kind}", 0, 2)
    with pytest.raises(DataError, match=r"name year, city.*name nothing|name nothing.*year, city"):
        read(tmp_path)


# --- compressed, and elsewhere ----------------------------------------------------------------


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zip", "tar", "tar.gz"])
@pytest.mark.parametrize("kind", ["csv", "json"], indirect=True)
def test_compressed_files(kind, tmp_path, ending):
    write(kind, tmp_path / f"a.{kind}.{ending}", 0, 3)
    write(kind, tmp_path / f"b.{kind}", 3, 5)
    assert ids(READERS[kind][0](tmp_path)) == [[0, 1, 2], [3, 4]]


def test_a_compression_that_is_named(tmp_path):
    (tmp_path / "plain.csv").write_bytes(gzip.compress(b"id\n1\n"))
    assert ids(read_csv(tmp_path, compression="gzip")) == [[1]]
    assert ids(read_csv(tmp_path, compression={"method": "gzip"})) == [[1]]


def test_other_file_systems(kind, tmp_path):
    """An archive, which fsspec opens as one, and a cache in front of files."""
    write(kind, tmp_path / f"a.{kind}", 0, 2)
    write(kind, tmp_path / f"b.{kind}", 2, 4)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in "ba":
            archive.write(tmp_path / f"{name}.{kind}", f"in/{name}.{kind}")
    read, _ = READERS[kind]
    assert ids(read(f"zip://in/*.{kind}::file://{tmp_path}/all.zip")) == [[0, 1], [2, 3]]
    assert ids(read(f"zip://in::{tmp_path}/all.zip")) == [[0, 1], [2, 3]]
    url = f"simplecache::file://{tmp_path}/b.{kind}"
    options = {"simplecache": {"cache_storage": str(tmp_path / "cache")}}
    assert ids(read(url, storage_options=options)) == [[2, 3]]


# --- as pandas --------------------------------------------------------------------------------


def test_options_are_pandas(tmp_path):
    (tmp_path / "a.txt").write_text("# note\n1;2,5;x\n3;4,5;-\n")
    options = {"sep": ";", "decimal": ",", "comment": "#", "names": ["a", "b", "c"],
               "na_values": "-", "dtype": {"a": "float32"}, "index_col": "c"}  # fmt: skip
    (found,) = read_csv(tmp_path, **options).collect()
    pd.testing.assert_frame_equal(found, pd.read_csv(tmp_path / "a.txt", **options))
    (tmp_path / "a.txt").write_text('{"a": 1, "b": [1, 2]}\n{"a": null, "b": []}\n')
    (found,) = read_json(tmp_path, lines=True).collect()
    pd.testing.assert_frame_equal(found, pd.read_json(tmp_path / "a.txt", lines=True))


def test_a_function_as_an_option(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,4\n")
    (found,) = read_csv(tmp_path, usecols=lambda name: name == "b").collect()
    assert found.to_dict("list") == {"b": [2, 4]}


def test_columns_and_filters_of_parquet(tmp_path):
    write("parquet", tmp_path / "year=2020" / "a.parquet", 0, 4)
    (found,) = read_parquet(tmp_path, columns=["year", "name"]).collect()
    assert found.to_dict("list") == {"year": [2020] * 4, "name": ["n0", "n1", "n2", "n3"]}
    (found,) = read_parquet(tmp_path, ["id"], filters=[("id", ">", 1)]).collect()
    assert found.to_dict("list") == {"id": [2, 3]}
    with pytest.raises(DataError, match=r"a\.parquet"):
        read_parquet(tmp_path, columns=["ids"]).collect()


def test_types_of_parquet_are_kept(tmp_path):
    frame = pd.DataFrame(
        {
            "whole": pd.array([1, None], dtype="Int64"),
            "when": pd.to_datetime(["2020-01-01 00:00:00.000001", None]).as_unit("us"),
            "list": [[1, 2], None],
            "bytes": [b"\0", None],
        },
        index=pd.Index([5, 3], name="key"),
    )
    frame.to_parquet(tmp_path / "a.parquet")
    (found,) = read_parquet(tmp_path).collect()
    wanted = pd.read_parquet(tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(found, wanted)
    assert found.dtypes.tolist()[:2] == frame.dtypes.tolist()[:2]


def test_a_header_alone_is_a_table_of_no_rows(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n")
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    shards = read_csv(tmp_path)
    assert [len(frame) for frame in shards.collect()] == [0, 1]
    (whole,) = shards.repartition(1).collect()
    assert whole.to_dict("list") == {"a": [1], "b": [2]}
    assert whole["a"].dtype == np.int64
    only = read_csv(tmp_path / "a.csv")
    assert len(only) == 0
    assert only["a"].unique().tolist() == []
    numbered(0, 0).to_parquet(tmp_path / "c.parquet")
    assert len(read_parquet(tmp_path / "c.parquet")) == 0


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    write("csv", tmp_path / "a.csv", 0, 2)
    shards = read_csv(tmp_path)
    write("csv", tmp_path / "a.csv", 5, 6)
    assert ids(shards) == [[5]]


# --- what cannot be read ----------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_named(kind, tmp_path):
    read, _ = READERS[kind]
    write(kind, tmp_path / f"a.{kind}", 0, 2)
    (tmp_path / f"b.{kind}").write_bytes(b'"a\n{\x00\xff\xfe,,,')
    shards = read(tmp_path)
    with pytest.raises(DataError, match=rf"read_{kind}\(\) cannot read .*b\.{kind}: ") as caught:
        shards.collect()
    assert "shard 2 of 2" in str(caught.value.__cause__)
    (tmp_path / f"b.{kind}").write_bytes(b"")
    with pytest.raises(DataError, match=rf"b\.{kind}: "):
        read(tmp_path).collect()


BROKEN = [
    (b"a,b\n1,2\n1,2,3,4\n", {}, "line 3"),
    (b"a,b\n1,x\n", {"dtype": {"b": int}}, "x"),
    (b"a,b\n1,2\n", {"usecols": ["c"]}, "c"),
    (b"a,b\n1,2\n", {"index_col": "c"}, "c"),
    ("a\nü\n".encode("latin-1"), {}, "utf-8"),
    (b'a\n"x\n', {}, "EOF"),
]


@pytest.mark.parametrize(("text", "options", "found"), BROKEN, ids=range(len(BROKEN)))
def test_a_row_that_cannot_be_read_names_its_file(tmp_path, text, options, found):
    (tmp_path / "broken.csv").write_bytes(text)
    with pytest.raises(DataError, match=rf"(?s)broken\.csv: .*{found}"):
        read_csv(tmp_path, **options).collect()


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zip", "tar", "zst"])
def test_a_compressed_file_that_is_cut_off(tmp_path, ending):
    if ending == "zst":
        pytest.importorskip("zstandard", reason="pandas needs it")
    pd.DataFrame({"a": np.random.default_rng(0).random(5000)}).to_csv(tmp_path / f"a.csv.{ending}")
    data = (tmp_path / f"a.csv.{ending}").read_bytes()
    (tmp_path / f"a.csv.{ending}").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"a\.csv\.{ending}: "):
        read_csv(tmp_path).collect()


def test_a_file_that_went_is_named(tmp_path):
    write("csv", tmp_path / "a.csv", 0, 2)
    shards = read_csv(tmp_path)
    (tmp_path / "a.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"worker sees no file .*a\.csv"):
        shards.collect()


class Refusing:
    """A file system whose files may not be read."""

    protocol = "file"

    def open(self, path, mode):
        raise PermissionError(13, "Permission denied", path)


def test_a_file_that_may_not_be_read_is_named():
    with pytest.raises(PermissionError, match=r"^a\.csv may not be read: "):
        Read("read_csv", {})(File(Refusing(), "a.csv", {}))


MISUSE = [
    (lambda p: read_csv(), ArgumentError, r"read_csv\(\) needs a path"),
    (lambda p: read_csv(3), ArgumentError, "not 3"),
    (lambda p: read_csv(""), ArgumentError, "needs a path"),
    (lambda p: read_csv([p, None]), ArgumentError, "needs a path"),
    (lambda p: read_csv([]), ConfigError, "empty list"),
    (lambda p: read_csv(f"{p}/none.csv"), FileNotFoundError, "no file.*none.csv"),
    (lambda p: read_csv(f"{p}/none*.csv"), FileNotFoundError, "No file matches.*none"),
    (lambda p: read_csv(p / "empty"), FileNotFoundError, "No file lies in.*empty"),
    (lambda p: read_csv([p / "a.csv", p / "b.csv"]), FileNotFoundError, "b.csv"),
    (lambda p: read_csv(p, seperator=";"), ArgumentError, "'seperator'"),
    (lambda p: read_csv(p, names_=["a"]), ArgumentError, "'names'"),
    (lambda p: read_csv(p, chunksize=3), ConfigError, r"repartition\(n\)"),
    (lambda p: read_csv(p, iterator=True), ConfigError, "a file is a shard"),
    (lambda p: read_csv(p, storage_options=3), ArgumentError, "storage_options"),
    (lambda p: read_json(p, line=True), ArgumentError, "'lines'"),
    (lambda p: read_parquet(p, columns="id"), ArgumentError, "list of names, not 'id'"),
    (lambda p: read_parquet(p, column=["id"]), ArgumentError, "'column'"),
    (lambda p: read_csv("nosuch://a"), ValueError, "nosuch"),
]


@pytest.mark.parametrize(("call", "kind_of_error", "text"), MISUSE, ids=range(len(MISUSE)))
def test_misuse(tmp_path, call, kind_of_error, text):
    write("csv", tmp_path / "a.csv", 0, 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(kind_of_error, match=text):
        call(tmp_path)


def test_it_gives_shards_like_others(tmp_path):
    write("csv", tmp_path / "a.csv", 0, 4)
    write("csv", tmp_path / "b.csv", 4, 7)
    shards = read_csv(tmp_path)
    assert isinstance(shards, XShards)
    assert ids(shards.sort_values("id", ascending=False)) == [[6, 5, 4, 3], [2, 1, 0]]
    pair = shards.zip(shards.transform_shard(len).transform_shard(lambda n: list(range(n))))
    assert [len(two) for _, two in pair.collect()] == [4, 3]
