"""Transform by transform: what torchvision gives, from the same random numbers."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import types

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision import transforms as theirs
from torchvision.transforms import v2

from bigdl.nano.pytorch.vision import transforms as ours

TOLERANCE = 2 / 255  # mean over a picture, of what resamples
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)


def state() -> tuple[bytes, object]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


def array(value) -> np.ndarray:
    return np.asarray(value, dtype=np.float64) / (
        255 if not isinstance(value, torch.Tensor) else 1
    )


def assert_same(mine, other, *, exact: bool) -> None:
    assert type(mine) is type(other)
    if isinstance(other, (tuple, list)):
        assert len(mine) == len(other)
        for one, two in zip(mine, other, strict=True):
            assert_same(one, two, exact=exact)
        return
    if isinstance(other, torch.Tensor):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        scale = 255.0 if other.dtype == torch.uint8 else 1.0
        mine, other = mine.double().numpy() / scale, other.double().numpy() / scale
    else:
        assert (mine.mode, mine.size) == (other.mode, other.size)
        mine, other = array(mine), array(other)
    if exact:
        np.testing.assert_array_equal(mine, other)
    else:
        assert np.abs(mine - other).mean() <= TOLERANCE
        assert np.abs(mine - other).max() <= 0.1


def compare(make, image, *, exact: bool, seeds=range(3)) -> None:
    """``make(transforms module)`` gives the same from both modules, and draws the same."""
    for value in seeds:
        seed(value)
        mine = make(ours)(image)
        drawn = state()
        seed(value)
        other = make(theirs)(image)
        assert drawn == state()
        assert_same(mine, other, exact=exact)


def _last(module):
    return [module.ToTensor(), module.Normalize(*IMAGENET)]


# name: (make, whether it is exact)
TRANSFORMS = {
    "Resize": (lambda m: m.Resize(96), False),
    "Resize up": (lambda m: m.Resize(700), False),
    "Resize to both": (lambda m: m.Resize((77, 133)), False),
    "Resize of one": (lambda m: m.Resize([90]), False),
    "Resize within": (lambda m: m.Resize(96, max_size=110), False),
    "Resize bicubic": (lambda m: m.Resize(96, m.InterpolationMode.BICUBIC), False),
    "Resize by number": (lambda m: m.Resize(96, 3), False),
    "Resize nearest": (lambda m: m.Resize(96, m.InterpolationMode.NEAREST), True),
    "Resize lanczos": (lambda m: m.Resize(96, m.InterpolationMode.LANCZOS), True),
    "Resize box": (lambda m: m.Resize(96, m.InterpolationMode.BOX), True),
    "CenterCrop": (lambda m: m.CenterCrop(101), True),
    "CenterCrop too large": (lambda m: m.CenterCrop((900, 100)), True),
    "RandomCrop": (lambda m: m.RandomCrop((99, 100)), True),
    "RandomCrop padded": (lambda m: m.RandomCrop(99, padding=4), True),
    "RandomCrop edge": (lambda m: m.RandomCrop(400, pad_if_needed=True, fill=3), True),
    "RandomResizedCrop": (lambda m: m.RandomResizedCrop(64), False),
    "RandomResizedCrop bicubic": (
        lambda m: m.RandomResizedCrop((60, 80), (0.2, 0.9), (0.5, 2), 3),
        False,
    ),
    "RandomHorizontalFlip": (lambda m: m.RandomHorizontalFlip(), True),
    "RandomHorizontalFlip .3": (lambda m: m.RandomHorizontalFlip(0.3), True),
    "RandomVerticalFlip": (lambda m: m.RandomVerticalFlip(), True),
    "Pad": (lambda m: m.Pad((1, 2, 3, 4), fill=(1, 2, 3)), True),
    "Pad reflect": (lambda m: m.Pad(5, padding_mode="reflect"), True),
    "FiveCrop": (lambda m: m.FiveCrop(50), True),
    "TenCrop": (lambda m: m.TenCrop(50), True),
    "RandomRotation": (lambda m: m.RandomRotation(30), True),
    "RandomAffine": (lambda m: m.RandomAffine(20, (0.1, 0.2), (0.8, 1.2), 5), True),
    "RandomPerspective": (lambda m: m.RandomPerspective(p=1.0), True),
    "ElasticTransform": (lambda m: m.ElasticTransform(), True),
    "ColorJitter nothing": (lambda m: m.ColorJitter(), True),
    "ColorJitter": (lambda m: m.ColorJitter(0.4, 0.4, 0.4, 0.1), True),
    "ColorJitter some": (lambda m: m.ColorJitter(contrast=(0.5, 2)), True),
    "Grayscale": (lambda m: m.Grayscale(), True),
    "Grayscale 3": (lambda m: m.Grayscale(3), True),
    "RandomGrayscale": (lambda m: m.RandomGrayscale(0.5), True),
    "GaussianBlur": (lambda m: m.GaussianBlur(5), True),
    "RandomInvert": (lambda m: m.RandomInvert(), True),
    "RandomPosterize": (lambda m: m.RandomPosterize(3), True),
    "RandomSolarize": (lambda m: m.RandomSolarize(100), True),
    "RandomAdjustSharpness": (lambda m: m.RandomAdjustSharpness(2), True),
    "RandomAutocontrast": (lambda m: m.RandomAutocontrast(), True),
    "RandomEqualize": (lambda m: m.RandomEqualize(), True),
    "Lambda": (lambda m: m.Lambda(ImageOps.mirror), True),
    "AutoAugment": (lambda m: m.AutoAugment(), True),
    "RandAugment": (lambda m: m.RandAugment(), True),
    "TrivialAugmentWide": (lambda m: m.TrivialAugmentWide(), True),
    "AugMix": (lambda m: m.AugMix(), True),
    "ToTensor": (lambda m: m.ToTensor(), True),
    "PILToTensor": (lambda m: m.PILToTensor(), True),
    "RandomApply": (lambda m: m.RandomApply([m.CenterCrop(50), m.RandomCrop(40)]), True),
    "RandomOrder": (lambda m: m.RandomOrder([m.RandomCrop(150), m.CenterCrop(170)]), True),
    "RandomChoice": (
        lambda m: m.RandomChoice([m.RandomCrop(80), m.RandomVerticalFlip(1)], p=[1, 2]),
        True,
    ),
}

TENSOR_TRANSFORMS = {
    "Normalize": lambda m: m.Normalize(*IMAGENET),
    "ConvertImageDtype": lambda m: m.ConvertImageDtype(torch.float64),
    "RandomErasing": lambda m: m.RandomErasing(1.0, value="random"),
    "LinearTransformation": lambda m: m.LinearTransformation(
        torch.eye(3 * 20 * 30) * 2, torch.ones(3 * 20 * 30)
    ),
    "ToPILImage": lambda m: m.ToPILImage(),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_one_on_an_image(name, photo, noise):
    make, exact = TRANSFORMS[name]
    for image in (noise,) if exact else (photo, noise):
        before = image.tobytes()
        compare(make, image, exact=exact, seeds=range(2))
        assert image.tobytes() == before


@pytest.mark.parametrize("name", TRANSFORMS)
def test_one_in_a_pipeline(name, photo, noise):
    make, exact = TRANSFORMS[name]
    for image in (noise,) if exact else (photo, noise):
        compare(lambda m: m.Compose([make(m)]), image, exact=exact)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1", "F", "LA"])
def test_other_modes_are_torchvisions_alone(name, mode, noise):
    make, _ = TRANSFORMS[name]
    image = (
        Image.fromarray(np.arange(300, dtype=np.uint16).reshape(15, 20))
        if mode == "I;16"
        else (noise.convert(mode))
    )
    image = image.resize((64, 53), Image.Resampling.NEAREST)
    outcomes: list[object] = []
    for module in (ours, theirs):
        seed(0)
        try:
            outcomes.append(module.Compose([make(module)])(image))
        except Exception as exc:  # noqa: BLE001 - torchvision's refusals are of every kind
            outcomes.append((type(exc), str(exc)))
    mine, other = outcomes
    if isinstance(other, tuple) and isinstance(other[0], type):
        assert mine == other
    else:
        assert_same(mine, other, exact=True)


@pytest.mark.parametrize("name", [*TRANSFORMS, *TENSOR_TRANSFORMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_one_on_a_tensor(name, dtype, noise):
    make = TENSOR_TRANSFORMS.get(name) or TRANSFORMS[name][0]
    tensor = torch.from_numpy(np.array(noise)).permute(2, 0, 1).contiguous()
    if name == "LinearTransformation":
        tensor = tensor[:, :20, :30].contiguous()
    tensor = tensor[:, :120, :130].contiguous()
    tensor = tensor[:, :120, :130].contiguous()
    if dtype == torch.float32:
        tensor = tensor / 255
    before = tensor.clone()
    for value in range(2):
        outcomes = []
        for module in (ours, theirs):
            seed(value)
            try:
                outcomes.append(make(module)(tensor))
            except (
                TypeError,
                ValueError,
                RuntimeError,
                AttributeError,
                NotImplementedError,
            ) as exc:
                outcomes.append((type(exc), str(exc)))
        mine, other = outcomes
        if isinstance(other, tuple) and isinstance(other[0], type):
            assert mine == other
        else:
            assert_same(mine, other, exact=True)
        assert torch.equal(tensor, before)


PIPELINES = {
    "figure 2": lambda m: [
        m.Resize(256),
        m.ColorJitter(),
        m.RandomCrop(224),
        m.RandomHorizontalFlip(),
        m.Resize(128),
        m.ToTensor(),
    ],
    "evaluation": lambda m: [m.Resize(256), m.CenterCrop(224), *_last(m)],
    "training": lambda m: [m.RandomResizedCrop(160), m.RandomHorizontalFlip(), *_last(m)],
    "contrastive": lambda m: [
        m.RandomResizedCrop(96),
        m.RandomApply([m.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        m.RandomGrayscale(p=0.5),
        m.RandomHorizontalFlip(),
        m.ToTensor(),
        m.RandomErasing(p=0.5),
    ],
    "nested": lambda m: [
        m.Compose([m.Resize(200), m.RandomVerticalFlip()]),
        m.RandomOrder([m.RandomCrop(180), m.RandomHorizontalFlip(1.0)]),
        m.RandomRotation(10),
        m.CenterCrop(128),
        m.ToTensor(),
    ],
    "one axis at a time": lambda m: [
        m.Resize((100, 500)),
        m.CenterCrop((90, 350)),
        m.Resize((90, 120), 3),
        m.RandomCrop((64, 64)),
        m.Resize((200, 64)),
        m.ToTensor(),
    ],
    "flips": lambda m: [
        m.RandomHorizontalFlip(),
        m.RandomVerticalFlip(),
        m.RandomCrop(150),
        m.RandomHorizontalFlip(),
        m.Resize(100),
        m.RandomVerticalFlip(),
        m.RandomCrop((70, 60)),
        m.Resize((30, 90)),
    ],
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(name, photos):
    for image in photos:
        for value in range(4):
            results = []
            for module in (ours, theirs):
                seed(value)
                results.append(module.Compose(PIPELINES[name](module))(image))
            mine, other = (np.asarray(one, dtype=np.float64) for one in results)
            assert mine.shape == other.shape
            spread = other.max() - other.min()
            assert np.abs(mine - other).mean() <= TOLERANCE * spread


def test_what_does_not_resample_is_exact(photo):
    compare(
        lambda m: m.Compose(
            [
                m.RandomCrop(200),
                m.RandomHorizontalFlip(),
                m.ColorJitter(0.3, 0.3, 0.3, 0.2),
                m.RandomVerticalFlip(),
                m.CenterCrop(150),
                *_last(m),
            ]
        ),
        photo,
        exact=True,
        seeds=range(6),
    )


@pytest.mark.parametrize("outer", [ours, theirs], ids=["ours", "theirs"])
def test_mixed_with_torchvision(outer, photo):
    def make(m, other):
        return outer.Compose(
            [
                m.Resize(200),
                other.RandomCrop(150),
                m.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                m.CenterCrop(140),
                other.ToTensor(),
                m.Normalize(*IMAGENET),
            ]
        )

    for value in range(3):
        seed(value)
        mine = make(ours, theirs)(photo)
        seed(value)
        other = make(theirs, theirs)(photo)
        assert (mine - other).abs().mean() <= TOLERANCE / 0.225


def test_functions_of_the_user_see_rgb_images_with_their_information(photo):
    seen = []
    image = photo.copy()
    image.info["comment"] = b"kept"
    pipeline = ours.Compose(
        [
            lambda one: seen.append(one) or one,
            ours.Resize(100),
            lambda one: seen.append(one) or one,
            ours.CenterCrop(50),
        ]
    )
    result = pipeline(image)
    assert seen[0] is image
    for one in (*seen, result):
        assert isinstance(one, Image.Image)
        assert one.mode == "RGB"
        assert one.info == image.info
    assert (seen[1].size, result.size) == (theirs.Resize(100)(image).size, (50, 50))


def test_images_that_come_out_share_nothing_with_what_went_in(photo):
    before = photo.tobytes()
    for pipeline in ([ours.CenterCrop(50)], [ours.Resize(90)], [ours.RandomHorizontalFlip(1)]):
        ours.Compose(pipeline)(photo).paste((1, 2, 3), (0, 0, 40, 40))
    tensor = ours.Compose([ours.ToTensor()])(photo)
    tensor.zero_()
    ours.Compose([ours.PILToTensor()])(photo).zero_()
    assert photo.tobytes() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_tensors_have_the_default_type(photo, dtype):
    torch.set_default_dtype(dtype)
    try:
        compare(lambda m: m.Compose([m.CenterCrop(9), m.ToTensor()]), photo, exact=True)
        compare(lambda m: m.Compose([m.CenterCrop(9), *_last(m)]), photo, exact=True)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [9, 520])  # from 512 x 512 on OpenCV would use threads
@pytest.mark.parametrize(
    "normalize",
    [
        lambda m: [],
        lambda m: [m.Normalize(*IMAGENET)],
        lambda m: [m.Normalize(0.5, 0.25)],
        lambda m: [m.Normalize([0.5], (0.25,))],
        lambda m: [m.Normalize(torch.tensor(IMAGENET[0]), np.array(IMAGENET[1]))],
        lambda m: [m.Normalize([0, 0, 0], [1, 1, 1]), m.Normalize(*IMAGENET)],
        lambda m: [m.Normalize(*IMAGENET), m.ConvertImageDtype(torch.float64)],
    ],
)
def test_looked_up_values_are_the_computed_ones(noise, decoder, size, normalize):
    image = noise.resize((530, 530))
    compare(
        lambda m: m.Compose([m.CenterCrop(size), m.ToTensor(), *normalize(m)]),
        image,
        exact=True,
        seeds=range(1),
    )


def test_normalizing_uses_the_numbers_of_the_moment(photo):
    normalize = ours.Normalize([0.1, 0.2, 0.3], [1.0, 1.0, 1.0])
    pipeline = ours.Compose([ours.ToTensor(), normalize])
    before = pipeline(photo)
    normalize.mean = [0.2, 0.3, 0.4]
    torch.testing.assert_close(pipeline(photo), before - 0.1)
    pipeline(photo).zero_()  # what comes out is the caller's
    torch.testing.assert_close(pipeline(photo), before - 0.1)


def test_a_normalize_that_does_not_fit_is_refused_as_by_torchvision(photo):
    for numbers in (([0.5] * 4, [1] * 4), ([0.5] * 2, [1] * 2)):
        texts = []
        for module in (ours, theirs):
            with pytest.raises(RuntimeError) as caught:
                module.Compose([module.ToTensor(), module.Normalize(*numbers)])(photo)
            texts.append(type(caught.value))
        assert texts[0] is texts[1]


def test_a_subclass_is_called_as_it_is(photo):
    class Marked(ours.Resize):
        def forward(self, img):
            assert isinstance(img, Image.Image)
            return super().forward(img).convert("L")

    class Middle(ours.RandomCrop):
        @staticmethod
        def get_params(img, output_size):
            assert isinstance(img, Image.Image)
            return 0, 0, 5, 7

    class Loud(ours.Compose):
        def __call__(self, img):
            return super().__call__(img), "loud"

    assert ours.Compose([ours.CenterCrop(90), Marked(30)])(photo).mode == "L"
    assert ours.Compose([ours.Resize(90), Middle(30)])(photo).size == (7, 5)
    assert ours.Compose([Loud([ours.CenterCrop(10)])])(photo)[1] == "loud"


def test_hooks_are_heard(photo):
    resize = ours.Resize(50)
    heard = []
    with resize.register_forward_hook(lambda module, args, out: heard.append(out.size)):
        ours.Compose([resize])(photo)
    ours.Compose([resize])(photo)
    assert heard == [theirs.Resize(50)(photo).size]


def test_antialias_false_warns_as_torchvision_does(photo):
    with pytest.warns(UserWarning, match="Anti-alias option is always applied"):
        mine = ours.Compose([ours.Resize(50, antialias=False)])(photo)
    with pytest.warns(UserWarning, match="Anti-alias option is always applied"):
        other = theirs.Resize(50, antialias=False)(photo)
    assert_same(mine, other, exact=True)


def test_errors_in_a_pipeline_are_torchvisions(photo):
    for module in (ours, theirs):
        with pytest.raises(ValueError, match=r"Required crop size .* is larger than input"):
            module.Compose([module.Resize(50), module.RandomCrop(60)])(photo)
        with pytest.raises(ValueError, match="std evaluated to zero"):
            module.Compose([module.ToTensor(), module.Normalize([0], [0])])(photo)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_sizes(data):
    side = st.integers(1, 70)
    height, width = data.draw(side), data.draw(side)
    pixels = np.random.default_rng(height * 71 + width).integers(0, 256, (height, width, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    target = data.draw(st.one_of(side, st.tuples(side, side)))
    if isinstance(target, int) and target * max(height, width) // min(height, width) > 900:
        return
    kind = data.draw(st.sampled_from(["BILINEAR", "BICUBIC", "NEAREST"]))
    crop = data.draw(st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)))
    value = data.draw(st.integers(0, 9))
    results = []
    for module in (ours, theirs):
        resize = module.Resize(target, module.InterpolationMode[kind])
        out = resize(image)
        part = [max(1, int(out.height * crop[0])), max(1, int(out.width * crop[1]))]
        seed(value)
        results.append(
            module.Compose(
                [module.RandomHorizontalFlip(), resize, module.RandomCrop(part), module.ToTensor()]
            )(image)
        )
    mine, other = results
    assert mine.shape == other.shape
    assert (mine - other).abs().mean() <= TOLERANCE
    assert (mine - other).abs().max() <= 0.1


# --- the module ------------------------------------------------------------------------------


def test_all_names_are_there():
    public = [name for name in dir(theirs) if not name.startswith("_")]
    assert set(public) <= set(dir(ours))
    for name in public:
        assert getattr(ours, name) is not None
    star: dict[str, object] = {}
    exec("from bigdl.nano.pytorch.vision.transforms import *", star)
    other: dict[str, object] = {}
    exec("from torchvision.transforms import *", other)
    modules = {name for name, value in other.items() if isinstance(value, types.ModuleType)}
    assert {name for name in other if not name.startswith("_")} - modules <= set(star)


def test_all_functions_are_there(photo):
    from bigdl.nano.pytorch.vision.transforms import functional

    for name in dir(torchvision.transforms.functional):
        assert hasattr(functional, name)
    assert functional.hflip is torchvision.transforms.functional.hflip
    assert functional.InterpolationMode is theirs.InterpolationMode
    mine = functional.resized_crop(photo, 5, 6, 70, 80, [40, 50])
    assert_same(mine, theirs.functional.resized_crop(photo, 5, 6, 70, 80, [40, 50]), exact=False)
    tensor = theirs.functional.to_tensor(photo)
    assert torch.equal(functional.resize(tensor, 40), theirs.functional.resize(tensor, 40))


@pytest.mark.parametrize("name", [*theirs.transforms.__all__, *theirs.autoaugment.__all__])
def test_the_parameters_are_torchvisions(name):
    mine, other = getattr(ours, name), getattr(theirs, name)
    if mine is other:  # an enum
        return
    assert issubclass(mine, other)
    parameters = [
        [(one.name, one.kind, one.default) for one in inspect.signature(cls).parameters.values()]
        for cls in (mine, other)
    ]
    assert parameters[0] == parameters[1]
    assert mine.__doc__ != other.__doc__
    assert mine.__module__.startswith("bigdl.")


@pytest.mark.parametrize("name", TRANSFORMS)
def test_copies_and_pickles(name, noise):
    make, _ = TRANSFORMS[name]
    original = ours.Compose([make(ours)])
    assert repr(original.transforms[0]) == repr(make(theirs))
    for twin in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
        seed(1)
        one = original(noise)
        seed(1)
        assert_same(twin(noise), one, exact=True)
