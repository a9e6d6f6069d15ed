"""``ImageFolder``: torchvision's rows and pictures, corrupt files, loader workers."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import os
import pickle
import struct
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Subset,
    WeightedRandomSampler,
    default_collate,
)
from torchvision import datasets as theirs
from torchvision import transforms as their_transforms

from bigdl.errors import ImageError
from bigdl.nano.pytorch.vision import decoding, transforms
from bigdl.nano.pytorch.vision.datasets import ImageFolder

TOLERANCE = 2 / 255


def figure_2(module):
    return module.Compose(
        [
            module.Resize(256),
            module.ColorJitter(),
            module.RandomCrop(224),
            module.RandomHorizontalFlip(),
            module.Resize(128),
            module.ToTensor(),
        ]
    )


def difference(mine, other) -> float:
    mine, other = np.asarray(mine, dtype=np.float64), np.asarray(other, dtype=np.float64)
    assert mine.shape == other.shape
    return float(np.abs(mine - other).mean() / (255 if other.max() > 1 else 1))


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def write(root: Path, name: str, data: bytes) -> str:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


# --- rows -------------------------------------------------------------------------------------


def test_rows_are_torchvisions(folder):
    write(folder, "b/notes.txt", b"no picture")
    write(folder, "a/deep/er.PNG", (folder / "a/0.jpg").read_bytes())
    mine, other = ImageFolder(folder), theirs.ImageFolder(folder)
    for name in ("classes", "class_to_idx", "samples", "imgs", "targets", "root", "extensions"):
        assert getattr(mine, name) == getattr(other, name)
    assert len(mine) == len(other) == 6
    assert mine.imgs is mine.samples
    assert mine.skipped == []
    assert isinstance(mine, theirs.ImageFolder)


def test_arguments_are_torchvisions_and_one_more():
    mine = list(inspect.signature(ImageFolder).parameters.values())
    other = list(inspect.signature(theirs.ImageFolder).parameters.values())
    assert [(one.name, one.default) for one in mine[:-1]] == [
        (one.name, one.default) for one in other
    ]
    assert (mine[-1].name, mine[-1].default) == ("on_error", "raise")
    assert mine[-1].kind is inspect.Parameter.KEYWORD_ONLY


def test_other_arguments_of_torchvision(folder):
    (folder / "empty").mkdir()
    options = {
        "target_transform": lambda target: target * 10,
        "is_valid_file": lambda path: not path.endswith("0.jpg"),
        "allow_empty": True,
    }
    mine, other = ImageFolder(folder, **options), theirs.ImageFolder(folder, **options)
    assert mine.samples == other.samples
    assert [target for _, target in (mine[at] for at in range(len(mine)))] == [0, 0, 10, 10]
    with pytest.raises(FileNotFoundError, match="empty"):
        ImageFolder(folder)


# --- pictures ---------------------------------------------------------------------------------


def test_items_without_a_transform_are_rgb_images(folder):
    mine, other = ImageFolder(folder), theirs.ImageFolder(folder)
    for at in range(len(other)):
        assert type(mine[at][0]) is type(other[at][0]) is Image.Image
        assert mine[at][0].info == other[at][0].info
        assert (mine[at][0].tobytes(), mine[at][1]) == (other[at][0].tobytes(), other[at][1])


def test_figure_2(folder, decoder):
    mine = ImageFolder(folder, transform=figure_2(transforms))
    other = theirs.ImageFolder(folder, transform=figure_2(their_transforms))
    for at in range(len(other)):
        torch.manual_seed(at)
        (one, label) = mine[at]
        drawn = torch.get_rng_state()
        torch.manual_seed(at)
        (two, other_label) = other[at]
        assert torch.equal(drawn, torch.get_rng_state())
        assert label == other_label
        assert (one.dtype, one.shape, one.is_contiguous()) == (two.dtype, two.shape, True)
        assert difference(one, two) <= TOLERANCE


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.Compose([m.CenterCrop(90), m.RandomHorizontalFlip(1), m.ToTensor()]),
        lambda m: m.ToTensor(),
        lambda m: m.PILToTensor(),
        lambda m: m.RandomCrop(80),
        lambda m: m.Compose([m.ColorJitter(0.5, 0.5, 0.5, 0.5), m.ToTensor()]),
        lambda m: m.Compose([]),
    ],
)
def test_what_does_not_resample_is_exact(folder, decoder, make):
    mine = ImageFolder(folder, transform=make(transforms))
    other = theirs.ImageFolder(folder, transform=make(their_transforms))
    for at in range(len(other)):
        torch.manual_seed(at)
        one = mine[at][0]
        torch.manual_seed(at)
        two = other[at][0]
        assert type(one) is type(two)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def test_resized_images_keep_their_information(folder):
    image = ImageFolder(folder, transform=transforms.Resize(64))[0][0]
    assert image.info == theirs.ImageFolder(folder)[0][0].info
    assert image.mode == "RGB"


@pytest.mark.parametrize("module", [transforms, their_transforms], ids=["ours", "theirs"])
def test_functions_of_the_user_see_rgb_images(folder, module):
    seen = []

    def look(image):
        seen.append(image)
        return ImageOps.exif_transpose(image)

    items = ImageFolder(folder, transform=module.Compose([look, transforms.Resize(50), look]))
    assert isinstance(items[0][0], Image.Image)
    assert [type(one) for one in seen] == [Image.Image] * 2
    assert seen[0].tobytes() == theirs.ImageFolder(folder)[0][0].tobytes()


def test_only_a_leading_transform_of_ours_changes_how_files_are_read(folder, monkeypatch):
    read = []
    monkeypatch.setattr(
        decoding,
        "_decode_opencv",
        lambda data, scale: read.append(scale),  # and give up
    )
    plain = [transforms.Resize(50), their_transforms.Resize(50), their_transforms.ToTensor()]
    for transform, fast in [
        (None, False),
        (transforms.Compose(plain), True),
        (their_transforms.Compose(plain), True),
        (plain[0], True),
        (their_transforms.Compose(plain[1:]), False),
        (lambda image: image, False),
        (transforms.Compose(plain[1:]), False),
    ]:
        read.clear()
        ImageFolder(folder, transform=transform)[0]
        assert bool(read) == fast


# --- scaled decoding --------------------------------------------------------------------------

_LARGE = {"photo": (2000, 1500), "wide": (3001, 777), "odd": (1031, 1027)}


@pytest.mark.parametrize("size", _LARGE.values(), ids=_LARGE)
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("target", [100, (64, 180), 256])
def test_large_files_are_decoded_small_and_sizes_follow_the_true_size(
    tmp_path, photo, decoder, size, gray, target
):
    image = photo.resize(size, Image.Resampling.BICUBIC)
    write(tmp_path, "a/0.jpg", jpeg(image.convert("L") if gray else image, quality=92))
    for kind in ("BILINEAR", "BICUBIC"):
        results = [
            data(tmp_path, transform=module.Resize(target, module.InterpolationMode[kind]))[0][0]
            for data, module in ((ImageFolder, transforms), (theirs.ImageFolder, their_transforms))
        ]
        assert difference(*results) <= TOLERANCE
        gap = np.abs(np.asarray(results[0], int) - np.asarray(results[1], int)).max()
        assert gap <= 0.1 * 255


@pytest.mark.parametrize(
    ("size", "target", "scale"),
    [
        ((2000, 1500), 256, 2),
        ((2048, 2048), 256, 4),
        ((2047, 2047), 256, 4),  # rounded up, a quarter is 512
        ((2044, 2044), 256, 2),
        ((4096, 4096), 256, 8),
        ((9000, 9000), 256, 8),
        ((1024, 400), (200, 128), 1),
        ((1024, 1024), (256, 1024), 1),
        ((500, 375), 256, 1),
        ((500, 375), 600, 1),
    ],
)
def test_the_smallest_scale_that_is_at_least_twice_the_target(
    tmp_path, monkeypatch, size, target, scale
):
    write(tmp_path, "a/0.jpg", jpeg(Image.new("RGB", size, (10, 200, 90))))
    scales = []
    decode = decoding._decode_opencv
    monkeypatch.setattr(
        decoding,
        "_decode_opencv",
        lambda data, scale: scales.append(scale) or decode(data, scale),
    )
    image = ImageFolder(tmp_path, transform=transforms.Resize(target))[0][0]
    assert scales == [scale]
    assert image.size == their_transforms.Resize(target)(Image.new("RGB", size)).size


@pytest.mark.parametrize("seed", range(6))
def test_random_resized_crops_of_large_files(tmp_path, photo, decoder, seed):
    image = photo.resize((1601, 1203), Image.Resampling.BICUBIC)
    write(tmp_path, "a/0.jpg", jpeg(image, quality=92))
    results = []
    for data, module in ((ImageFolder, transforms), (theirs.ImageFolder, their_transforms)):
        torch.manual_seed(seed)
        steps = module.Compose(
            [module.RandomResizedCrop(96, (0.3, 1)), module.RandomHorizontalFlip()]
        )
        results.append(data(tmp_path, transform=steps)[0][0])
    assert difference(*results) <= TOLERANCE


# --- formats ----------------------------------------------------------------------------------


def _formats(photo: Image.Image) -> dict[str, bytes]:
    def save(image: Image.Image, kind: str, **options) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    small = photo.resize((211, 160))
    turned = small.getexif()
    turned[0x0112] = 6
    alpha = small.convert("RGBA")
    alpha.putalpha(small.convert("L"))
    deep = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    palette = small.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = 3
    return {
        "plain.jpg": save(small, "JPEG"),
        "progressive.jpg": save(small, "JPEG", progressive=True),
        "444.jpg": save(small, "JPEG", subsampling=0, quality=95),
        "422.jpg": save(small, "JPEG", subsampling=1),
        "restarts.jpg": save(small, "JPEG", restart_marker_blocks=3),
        "rgb.jpg": save(small, "JPEG", keep_rgb=True),
        "grey.jpg": save(small.convert("L"), "JPEG"),
        "cmyk.jpg": save(small.convert("CMYK"), "JPEG"),
        "turned.jpg": save(small, "JPEG", exif=turned.tobytes()),
        "trailing.jpg": save(small, "JPEG") + b"\0\xff\xd8 left over",
        "comment.jpg": save(small, "JPEG", comment=b"\xff\xd9\xff\xda"),
        "mpo.jpg": save(small, "MPO", save_all=True, append_images=[small.rotate(9)]),
        "actually_png.jpg": save(small, "PNG"),
        "plain.png": save(small, "PNG"),
        "grey.png": save(small.convert("L"), "PNG"),
        "alpha.png": save(alpha, "PNG"),
        "grey_alpha.png": save(alpha.convert("LA"), "PNG"),
        "palette.png": save(palette, "PNG", transparency=3),
        "bits.png": save(small.convert("1"), "PNG"),
        "deep.png": save(deep, "PNG"),
        "turned.png": save(small, "PNG", exif=turned.tobytes()),
        "plain.webp": save(small, "WEBP"),
        "alpha.webp": save(alpha, "WEBP", lossless=True),
        "plain.tif": save(small, "TIFF"),
        "lzw.tiff": save(small, "TIFF", compression="tiff_lzw"),
        "deep.tif": save(deep, "TIFF"),
        "cmyk.tif": save(small.convert("CMYK"), "TIFF"),
        "pages.tif": save(small, "TIFF", save_all=True, append_images=[small.rotate(9)]),
        "float.tif": save(small.convert("F"), "TIFF"),
        "plain.bmp": save(small, "BMP"),
        "plain.ppm": save(small, "PPM"),
        "grey.pgm": save(small.convert("L"), "PPM"),
        "one_pixel.jpg": save(small.resize((1, 1)), "JPEG"),
        "thin.jpg": save(small.resize((3, 150)), "JPEG"),
    }


FORMATS = list(_formats(Image.new("RGB", (8, 8))))


@pytest.fixture(scope="session")
def formats(photo) -> dict[str, bytes]:
    return _formats(photo)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, formats, decoder, name):
    write(tmp_path, f"a/{name}", formats[name])
    for make, limit in (
        (lambda m: None, 0),
        (lambda m: m.Compose([m.ToTensor()]), 0),
        (lambda m: m.Compose([m.RandomHorizontalFlip(1), m.CenterCrop(60)]), 0),
        (lambda m: m.Compose([m.Resize((40, 50)), m.ToTensor()]), TOLERANCE),
    ):
        one = ImageFolder(tmp_path, transform=make(transforms), on_error="skip")
        two = theirs.ImageFolder(tmp_path, transform=make(their_transforms))
        assert one.samples == two.samples
        assert difference(one[0][0], two[0][0]) <= limit


# --- files that cannot be read ----------------------------------------------------------------


def _corrupt(good: dict[str, bytes]) -> dict[str, bytes]:
    plain, png = good["plain.jpg"], good["plain.png"]
    return {
        "empty.jpg": b"",
        "text.jpg": b"this is no picture",
        "half.jpg": plain[: len(plain) // 2],
        "no_end.jpg": plain[:-2],
        "head.jpg": plain[:200],
        "half_progressive.jpg": good["progressive.jpg"][:3000],
        "half.png": png[: len(png) // 2],
        "sum.png": png[:60] + b"\0\0\0\0" + png[64:],
        "half.webp": good["plain.webp"][:900],
        "half.tif": good["plain.tif"][:2000],
        "half.bmp": good["plain.bmp"][:2000],
        "frames.jpg": plain.replace(b"\xff\xc0", b"\xff\xc3", 1),
        "stray.jpg": plain[:-400] + b"\xff\xc0" + plain[-400:],
    }


CORRUPT = list(_corrupt(_formats(Image.new("RGB", (8, 8)))))


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_files(tmp_path, formats, decoder, capfd, name):
    path = write(tmp_path, f"a/{name}", _corrupt(formats)[name])
    with pytest.raises((OSError, SyntaxError)):
        theirs.ImageFolder(tmp_path)[0]
    for transform in (
        None,
        transforms.ToTensor(),
        figure_2(transforms),
        figure_2(their_transforms),
    ):
        items = ImageFolder(tmp_path, transform=transform)
        with pytest.raises(ImageError, match="Cannot read the picture") as caught:
            items[0]
        assert path in str(caught.value)
        assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["anywhere", "header"])
def test_accepts_what_pillow_accepts(tmp_path, photo, where):
    """Damage at random: refused or equal, as Pillow has it."""
    generator = np.random.default_rng(1 if where == "header" else 2)
    original = [
        data for name, data in _formats(photo.resize((60, 41))).items() if name.endswith(".jpg")
    ]
    judged: Counter[str] = Counter()
    for at in range(250):
        data = bytearray(original[at % len(original)])
        limit = min(600, len(data)) if where == "header" else len(data)
        for _ in range(generator.integers(1, 3)):
            data[generator.integers(2, limit)] = generator.integers(256)
        if at % 5 == 0:
            data = data[: generator.integers(20, len(data))]
        path = write(tmp_path, "a/0.jpg", bytes(data))
        items = ImageFolder(tmp_path, transform=transforms.ToTensor())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = np.asarray(theirs.folder.pil_loader(path))
                if expected.size > 10**7:
                    continue
        except (OSError, SyntaxError, ValueError):
            judged["refused"] += 1
            with pytest.raises(ImageError):
                items[0]
            continue
        except Image.DecompressionBombError:
            continue
        judged["accepted"] += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = (items[0][0] * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
        np.testing.assert_array_equal(pixels, expected)
    assert min(judged["refused"], judged["accepted"]) > 20


def test_truncated_files_where_the_user_lets_pillow_load_them(tmp_path, formats, monkeypatch):
    write(tmp_path, "a/0.jpg", _corrupt(formats)["half.jpg"])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    items = ImageFolder(tmp_path, transform=transforms.CenterCrop(100), on_error="skip")
    other = theirs.ImageFolder(tmp_path, transform=their_transforms.CenterCrop(100))
    assert items[0][0].tobytes() == other[0][0].tobytes()


def test_bombs_are_pillows_to_judge(tmp_path, photo, monkeypatch):
    write(tmp_path, "a/0.jpg", jpeg(photo))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="decompression bomb"):
        ImageFolder(tmp_path, transform=transforms.Resize(20))[0]


def test_a_missing_file_is_missing(folder):
    items = ImageFolder(folder, transform=transforms.Resize(20))
    (folder / "a/0.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.jpg"):
        items[0]


def test_errors_of_a_transform_are_the_transforms(folder):
    def fail(image):
        raise OSError("mine")

    for on_error in ("raise", "skip"):
        items = ImageFolder(folder, transform=fail, on_error=on_error)
        with pytest.raises(OSError, match=r"^mine$") as caught:
            next(iter(DataLoader(items, batch_size=2)))
        assert not isinstance(caught.value, ImageError)
        assert items.skipped == []


# --- leaving rows out -------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path, photo) -> tuple[Path, list[str]]:
    """20 pictures of one colour each (the row's number), four of them damaged."""
    bad = []
    for row in range(20):
        data = jpeg(Image.new("RGB", (64, 48), (row * 12,) * 3), quality=95)
        name = f"{'a' if row < 11 else 'b'}/{row:02}.jpg"
        if row in (0, 7, 8, 19):
            bad.append(write(tmp_path, name, data[: len(data) // 2]))
        else:
            write(tmp_path, name, data)
    return tmp_path, bad


SMALL = transforms.Compose([transforms.Resize((24, 32)), transforms.ToTensor()])


def rows_of(batches) -> list[int]:
    found = []
    for pictures, labels in batches:
        pictures = pictures.reshape(-1, *pictures.shape[-3:])
        rows = (pictures.mean(dim=(1, 2, 3)) * 255 / 12).round().int().tolist()
        assert [int(row >= 11) for row in rows] == torch.as_tensor(labels).reshape(-1).tolist()
        found += rows
    return found


READABLE = [row for row in range(20) if row not in (0, 7, 8, 19)]


@pytest.mark.parametrize("batch_size", [None, 1, 3, 64])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_readable_row_comes_once(damaged, batch_size, shuffle):
    root, bad = damaged
    items = ImageFolder(root, transform=SMALL, on_error="skip")
    assert len(items) == len(READABLE) == len(items.targets) == len(items.imgs)
    loader = DataLoader(items, batch_size=batch_size, shuffle=shuffle)
    for _ in range(2):
        assert sorted(rows_of(loader)) == READABLE
    assert items.skipped == bad
    assert items.classes == ["a", "b"]
    assert "Left out: 4" in repr(items)


def test_through_wrappers_and_samplers(damaged):
    root, bad = damaged
    items = ImageFolder(root, transform=SMALL, on_error="skip")
    assert rows_of(default_collate([items[at]]) for at in range(len(items))) == READABLE
    halves = ConcatDataset([Subset(items, range(8)), Subset(items, range(8, len(items)))])
    assert rows_of(DataLoader(halves, batch_size=5)) == READABLE
    drawn = WeightedRandomSampler([1.0] * len(items), 50)
    assert set(rows_of(DataLoader(items, batch_size=5, sampler=drawn))) <= set(READABLE)
    assert items.skipped == bad


@pytest.mark.parametrize(
    ("context", "persistent"),
    [
        ("fork", False),
        ("fork", True),
        ("spawn", True),
        pytest.param("spawn", False, marks=pytest.mark.slow),
        pytest.param("forkserver", True, marks=pytest.mark.slow),
    ],
)
def test_workers_tell_what_they_left_out(damaged, context, persistent):
    root, bad = damaged
    items = ImageFolder(root, transform=SMALL, on_error="skip")
    for row in (3, 15):  # go bad after the check
        late = root / ("a" if row < 11 else "b") / f"{row:02}.jpg"
        late.write_bytes(late.read_bytes()[:-100])
        bad.append(str(late))
    loader = DataLoader(
        items,
        batch_size=4,
        num_workers=2,
        multiprocessing_context=context,
        persistent_workers=persistent,
    )
    for _ in range(2):
        assert sorted(rows_of(loader)) == [row for row in READABLE if row not in (3, 15)]
        assert items.skipped == bad


def test_late_damage_without_workers(damaged, caplog):
    root, bad = damaged
    items = ImageFolder(root, transform=SMALL, on_error="skip")
    late = root / "a/03.jpg"
    late.write_bytes(b"")
    assert sorted(rows_of(DataLoader(items, batch_size=4))) == [r for r in READABLE if r != 3]
    assert items.skipped == [*bad, str(late)]
    assert str(late) in caplog.text
    with pytest.raises(ImageError, match=r"03\.jpg"):
        items[READABLE.index(3)]
    with pytest.raises(ImageError, match="Not one of the 1 pictures of a batch"):
        rows_of(DataLoader(items, batch_size=1))
    twin = pickle.loads(pickle.dumps(items))
    assert twin.skipped == items.skipped
    assert copy.deepcopy(items).skipped == items.skipped


def test_a_file_that_goes_missing_is_left_out(damaged):
    root, bad = damaged
    items = ImageFolder(root, transform=SMALL, on_error="skip")
    (root / "b/12.jpg").unlink()
    assert sorted(rows_of(DataLoader(items, batch_size=4))) == [r for r in READABLE if r != 12]
    assert items.skipped == [*bad, str(root / "b/12.jpg")]


def test_nothing_readable(tmp_path):
    write(tmp_path, "a/0.jpg", b"")
    with pytest.raises(ImageError, match=r"None of the 1 pictures can be read.*0\.jpg"):
        ImageFolder(tmp_path, on_error="skip")


def test_raise_reads_nothing_before_it_is_asked(damaged):
    root, _ = damaged
    items = ImageFolder(root, transform=SMALL)
    assert len(items) == 20
    with pytest.raises(ImageError, match=r"00\.jpg"):
        rows_of(DataLoader(items, batch_size=4))
    with pytest.raises(ImageError, match=r"00\.jpg"):
        rows_of(DataLoader(items, batch_size=4, num_workers=1))
    assert items.skipped == []


# --- the user's own ways ----------------------------------------------------------------------


def _halved(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("L").reduce(2)


def test_a_loader_of_the_users_own(folder):
    items = ImageFolder(folder, transform=transforms.Resize(20), loader=_halved)
    other = theirs.ImageFolder(folder, transform=their_transforms.Resize(20), loader=_halved)
    assert items[0][0].tobytes() == other[0][0].tobytes()


def test_a_loader_of_the_users_own_and_damaged_files(damaged):
    root, bad = damaged
    (root / "a/00.jpg").write_bytes(b"")
    assert ImageFolder(root, loader=_halved, on_error="skip").skipped == bad
    with pytest.raises(OSError, match=r"(?i)truncated") as caught:
        ImageFolder(root, loader=_halved)[7]
    assert not isinstance(caught.value, ImageError)  # its own errors too


class OddRows(ImageFolder):
    def make_dataset(self, directory, class_to_idx, **options):
        return super().make_dataset(directory, class_to_idx, **options)[1::2]

    def find_classes(self, directory):
        return ["b", "a"], {"b": 0, "a": 1}


class ReadsKeys(ImageFolder):
    """Its paths are keys of its own; only it can read them."""

    def make_dataset(self, directory, class_to_idx, **options):
        return [(f"key {at}", at % 2) for at in range(6)]

    def __getitem__(self, index):
        key, target = self.samples[index]
        if key == "key 4":
            raise OSError("gone")
        return torch.full((3,), float(index)), target


def test_methods_of_a_subclass_are_honoured(folder):
    items = OddRows(folder, transform=transforms.Resize(20))
    assert items.classes == ["b", "a"]
    assert [Path(path).name for path, _ in items.samples] == ["1.jpg", "3.jpg"]
    own = ReadsKeys(folder, on_error="skip")
    assert len(own) == 6
    rows = [int(one[0]) for batch, _ in DataLoader(own, batch_size=3) for one in batch]
    assert rows == [0, 1, 2, 3, 5]
    assert own.skipped == ["key 4"]
    with pytest.raises(OSError, match=r"^gone$"):
        list(DataLoader(ReadsKeys(folder), batch_size=3))


# --- nothing is left behind -------------------------------------------------------------------


def _open_files() -> list[str]:
    gc.collect()
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return sorted(name for name in found if "/proc/" not in name)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
def test_no_file_is_left_open(damaged, decoder):
    root, _ = damaged
    write(root, "a/20.png", _formats(Image.new("RGB", (40, 40)))["plain.png"])
    before = _open_files()
    for on_error in ("raise", "skip"):
        items = ImageFolder(root, transform=SMALL, on_error=on_error)
        other = ImageFolder(root, on_error=on_error)
        for at in range(len(items)):
            for one in (items, other):
                try:
                    one[at]
                except ImageError:
                    assert on_error == "raise"
        assert _open_files() == before
    shared = set(os.listdir("/dev/shm"))
    assert len(rows_of(DataLoader(items, batch_size=4, num_workers=2))) == 17
    assert _open_files() == before
    assert set(os.listdir("/dev/shm")) <= shared


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_give_what_torchvisions_give(folder, context):
    items = ImageFolder(folder, transform=figure_2(transforms))
    other = theirs.ImageFolder(folder, transform=figure_2(their_transforms))
    batches = []
    for data in (items, other):
        loader = DataLoader(
            data,
            batch_size=2,
            shuffle=True,
            num_workers=2,
            multiprocessing_context=context,
            generator=torch.Generator().manual_seed(3),
        )
        batches.append([*loader])
    for (mine, labels), (expected, expected_labels) in zip(*batches, strict=True):
        assert torch.equal(labels, expected_labels)
        assert difference(mine, expected) <= TOLERANCE


def test_forked_workers_after_opencv_used_its_threads(folder):
    cv2 = pytest.importorskip("cv2")
    threads = cv2.getNumThreads()
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 5)
    items = ImageFolder(folder, transform=figure_2(transforms))
    loader = DataLoader(items, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert len([*loader]) == 5
    assert cv2.getNumThreads() == threads


def test_pickles(folder):
    items = ImageFolder(folder, transform=figure_2(transforms), on_error="skip")
    twin = pickle.loads(pickle.dumps(items))
    torch.manual_seed(0)
    one = items[1][0]
    torch.manual_seed(0)
    assert torch.equal(one, twin[1][0])
    assert twin.samples == items.samples


def test_header_of_a_jpeg_with_a_comment_that_looks_like_markers():
    from bigdl.nano.pytorch.vision.jpeg import read_header

    data = _formats(Image.new("RGB", (30, 20)))["comment.jpg"]
    assert read_header(data) == (160, 211, 3)
    at = data.index(b"\xff\xda")
    assert read_header(data[:at] + struct.pack(">HH", 0xFFD9, 0) + data[at:]) is None
