"""Pictures for the tests: real photos where there are some, else scikit-learn's two."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigdl.nano.pytorch.vision import decoding

_REPOSITORY = Path(__file__).parents[4]


def _photos() -> list[Image.Image]:
    data = Path(os.environ.get("BIGDL_TEST_DATA", _REPOSITORY.parent / "shared" / "data"))
    files = sorted(data.glob("cats_dogs/val/*/*.jpg"))[::100]
    if files:
        return [Image.open(file).convert("RGB") for file in files]
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return [image.resize((500, 375)).convert("RGB") for image in whole]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small pictures gain nothing from threads, and other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """A few photos, about 500 x 375."""
    return _photos()


@pytest.fixture(scope="session")
def photo(photos) -> Image.Image:
    return photos[0]


@pytest.fixture(scope="session")
def noise() -> Image.Image:
    """The worst picture to resample."""
    pixels = np.random.default_rng(0).integers(0, 256, (211, 307, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(params=["opencv", "pillow"])
def decoder(request, monkeypatch) -> str:
    """Both ways to decode: with OpenCV, and as if it were not installed."""
    if request.param == "opencv":
        assert decoding.opencv() is not None, "the tests need the extra 'vision'"
    else:
        for module in ("decoding", "resampling"):
            monkeypatch.setattr(f"bigdl.nano.pytorch.vision.{module}.opencv", lambda: None)
    return request.param


@pytest.fixture
def folder(tmp_path, photos) -> Path:
    """Two classes of JPEGs: ``a`` with three, ``b`` with two."""
    for at in range(5):
        path = tmp_path / ("a" if at < 3 else "b") / f"{at}.jpg"
        path.parent.mkdir(exist_ok=True)
        photos[at % len(photos)].save(path, quality=90)
    return tmp_path
