"""Models as sources: which axes vary, what is exported, what is refused."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from bigdl.errors import ArgumentError, ConfigError, DataError
from bigdl.nano.accelerators.base import Source
from bigdl.nano.pytorch.export.source import TorchSource, split_batch
from bigdl.nano.pytorch.inference.accelerated import build

FORMS = ("eager", "onnxruntime", "openvino")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads that wait for each other take ages on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigdl._base.machine.cores", lambda: 1)
        yield
    torch.set_num_threads(threads)


def make(model, sample, accelerator, **more):
    return build(
        model, name="fast", accelerator=accelerator, precision="fp32", sample=sample, **more
    )


def shapes(source):
    return [spec.shape for spec in source.inputs], [spec.shape for spec in source.outputs]


def fn(forward):
    """A module without weights whose forward is ``forward``."""
    return type("Fn", (nn.Module,), {"forward": lambda self, *args: forward(*args)})()


class Two(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self._forward = forward

    def forward(self, x, y):
        return self._forward(x, y)


# --- axes -------------------------------------------------------------------------------------


def test_axis_0_varies_by_default_whatever_the_sample_s_batch():
    for rows in (1, 2, 8):
        source = TorchSource(nn.Linear(4, 3), torch.randn(rows, 4))
        assert shapes(source) == ([(None, 4)], [(None, 3)])
    assert isinstance(source, Source)


def test_a_batch_that_the_model_fixes_stays_fixed():
    source = TorchSource(fn(lambda x: x.reshape(4, -1)), torch.randn(4, 6))
    assert shapes(source) == ([(4, 6)], [(4, 6)])


def test_inputs_of_one_batch_vary_together():
    source = TorchSource(Two(torch.add), (torch.randn(4, 3), torch.randn(4, 3)))
    assert [tie.members for tie in source.interface.ties] == [((0, 0), (1, 0))]


def test_inputs_that_only_happen_to_be_as_long_vary_alone():
    source = TorchSource(Two(lambda x, y: x @ y.T), (torch.randn(4, 3), torch.randn(4, 3)))
    assert sorted(tie.members for tie in source.interface.ties) == [((0, 0),), ((1, 0),)]
    assert source.outputs[0].shape == (None, None)


def test_a_mask_for_all_rows_stays_fixed():
    source = TorchSource(Two(torch.mul), (torch.randn(4, 3), torch.ones(1, 3)))
    assert shapes(source) == ([(None, 3), (1, 3)], [(None, 3)])


def test_a_batch_of_one_row_that_loses_its_axis_is_an_error():
    fast = make(fn(lambda x: (x * 2).squeeze()), torch.randn(4, 3), "onnxruntime")
    assert fast(torch.randn(2, 3)).shape == (2, 3)
    with pytest.raises(DataError, match="at least 2"):
        fast(torch.randn(1, 3))


def test_numbers_without_axes():
    source = TorchSource(Two(torch.mul), (torch.randn(4, 3), torch.tensor(2.0)))
    assert shapes(source) == ([(None, 3), ()], [(None, 3)])


@pytest.mark.parametrize("form", FORMS)
def test_named_axes_vary(form):
    model = nn.Conv1d(2, 3, 3, padding=1)
    fast = make(model, torch.randn(2, 2, 16), form, dynamic_axes={"input": [0, 2]})
    for rows, length in ((1, 16), (3, 5), (2, 40)):
        x = torch.randn(rows, 2, length)
        torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="axis 1"):
        fast(torch.randn(2, 3, 16))


@pytest.mark.parametrize("form", FORMS)
def test_named_axes_alone_vary(form):
    fast = make(nn.Linear(4, 2), torch.randn(2, 5, 4), form, dynamic_axes={"input": [-2]})
    assert fast(torch.randn(2, 9, 4)).shape == (2, 9, 2)
    with pytest.raises(DataError, match="axis 0"):
        fast(torch.randn(3, 5, 4))


@pytest.mark.parametrize("form", FORMS)
def test_no_axis_varies(form):
    fast = make(nn.Linear(4, 2), torch.randn(2, 4), form, dynamic_axes=False)
    assert fast(torch.randn(2, 4)).shape == (2, 2)
    with pytest.raises(DataError, match="axis 0"):
        fast(torch.randn(3, 4))


def test_both_sides_of_a_square_vary_together():
    model = fn(lambda x: x + x.transpose(1, 2))
    source = TorchSource(model, torch.randn(2, 5, 5), {"args": [1, 2]})
    assert [tie.members for tie in source.interface.ties] == [((0, 1), (0, 2))]
    fast = make(model, torch.randn(2, 5, 5), "onnxruntime", dynamic_axes={"args": [1, 2]})
    assert fast(torch.randn(2, 9, 9)).shape == (2, 9, 9)
    with pytest.raises(DataError, match="must agree"):
        fast(torch.randn(2, 9, 8))


def test_lengths_of_one_batch_must_agree():
    for form in FORMS:
        fast = make(Two(torch.add), (torch.randn(4, 3), torch.randn(4, 3)), form)
        with pytest.raises(DataError, match="must agree"):
            fast(torch.randn(4, 3), torch.randn(2, 3))


@pytest.mark.parametrize("form", FORMS)
def test_a_recurrent_layer_with_free_length(form):
    model = nn.LSTM(4, 6, batch_first=True, bidirectional=True)
    fast = make(model, torch.randn(2, 7, 4), form, dynamic_axes={"input": [0, 1]})
    for rows, length in ((1, 7), (3, 2), (2, 15)):
        x = torch.randn(rows, length, 4)
        wanted, (h, c) = model(x)
        found, (fh, fc) = fast(x)
        for a, b in ((found, wanted), (fh, h), (fc, c)):
            torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


# --- refused ----------------------------------------------------------------------------------


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_a_branch_on_data_is_refused():
    with pytest.raises(ConfigError, match="cannot be exported"):
        make(Branches(), torch.randn(2, 3), "onnxruntime")
    fast = make(Branches(), torch.randn(2, 3), "eager")
    for sign in (1.0, -1.0):  # its own code runs there
        assert torch.equal(fast(torch.full((2, 3), sign)), torch.full((2, 3), 2 * sign))


def test_a_batch_size_baked_in_by_the_exporter_is_refused():
    model = fn(lambda x: x * float(x.shape[0]) if int(x.shape[0]) < 4 else x)
    with pytest.raises(ConfigError):
        make(model, torch.randn(2, 3), "onnxruntime")


def test_random_numbers_and_counted_calls_are_refused():
    for model in (fn(lambda x: x + torch.rand(1)), nn.Sequential(_Counting())):
        with pytest.raises(ConfigError, match="another result when called again"):
            TorchSource(model, torch.randn(2, 3))


class _Counting(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


def test_no_result_and_odd_results():
    with pytest.raises(ConfigError, match="no tensor"):
        TorchSource(fn(lambda x: None), torch.randn(2, 3))
    odd = fn(lambda x: (x, object()))
    with pytest.raises(ConfigError, match="object"):
        make(odd, torch.randn(2, 3), "onnxruntime")
    assert isinstance(make(odd, torch.randn(2, 3), "eager")(torch.randn(2, 3)), tuple)


def test_a_wrong_export_is_refused(monkeypatch):
    """The export is of another model than the one that it is compared with."""
    source = TorchSource(nn.Linear(3, 3), torch.randn(2, 3))
    other = TorchSource(nn.Linear(3, 3), torch.randn(2, 3))
    monkeypatch.setattr(type(source), "flat", property(lambda self: _flat_of(other)))
    with pytest.raises(ConfigError, match="other results for 'output'"):
        source.onnx()


def _flat_of(source):
    from bigdl.nano.pytorch.export.flat import Flat

    return Flat(source._module, source.interface)


# --- kinds of models --------------------------------------------------------------------------


def same(found, wanted):
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_models_that_are_exported_or_wrapped_already(form):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).eval()
    x, y = torch.randn(2, 4), torch.randn(5, 4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for wrapped in (
        program,
        program.module(),
        torch.fx.symbolic_trace(model),
        nn.DataParallel(model),
        torch.compile(model, backend="eager"),
    ):
        same(make(wrapped, x, form)(y), model(y))


@pytest.mark.parametrize("form", FORMS)
def test_a_program_of_one_batch_size_keeps_it(form):
    model = nn.Linear(4, 3)
    x = torch.randn(2, 4)
    fast = make(torch.export.export(model, (x,)), x, form)
    same(fast(x), model(x))
    with pytest.raises(DataError, match="axis 0"):
        fast(torch.randn(3, 4))


def test_torchscript_runs_and_says_what_it_cannot():
    model = nn.Linear(4, 3)
    with pytest.warns(FutureWarning):
        scripted = torch.jit.script(model)
    x = torch.randn(2, 4)
    same(make(scripted, x, "eager")(x), model(x))
    with pytest.raises(ConfigError, match=r"is TorchScript.*Give the torch\.nn\.Module"):
        make(scripted, x, "onnxruntime")


def lightning():
    pl = pytest.importorskip("pytorch_lightning")

    class Lit(pl.LightningModule):
        def __init__(self, width=3):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Linear(4, width)
            self.loss = nn.MSELoss()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            x, y = batch
            loss = self.loss(self(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    return pl, Lit


@pytest.mark.parametrize("form", FORMS)
def test_lightning_modules(form):
    _pl, kind = lightning()
    model = kind()
    x = torch.randn(2, 4)
    fast = make(model, x, form)
    same(fast(x), model(x))
    assert fast.hparams.width == 3


@pytest.mark.filterwarnings("ignore")  # Lightning's, about small runs and its own code
def test_a_lightning_module_that_was_trained(tmp_path):
    pl, kind = lightning()
    model = kind()
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randn(8, 3))
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    x = torch.randn(2, 4)
    for form in FORMS:
        same(make(model, x, form)(x), model(x))
    assert model.trainer is trainer


def tiny_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def words(rows, length):
    ids = torch.randint(1, 60, (rows, length))
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("form", FORMS)
def test_hugging_face_models(form):
    model = tiny_bert()
    axes = {"input_ids": [0, 1], "attention_mask": [0, 1]}
    fast = make(model, words(2, 8), form, dynamic_axes=axes)
    for rows, length in ((1, 8), (3, 5), (2, 20)):
        batch = words(rows, length)
        with torch.no_grad():
            wanted = copy.deepcopy(model).eval()(**batch)
        found = fast(**batch)
        assert type(found) is type(wanted)
        same(found.logits, wanted.logits)
        same(found[0], wanted[0])
    assert model.training is True or model.training is False
    assert fast.config is model.config
    if form != "eager":  # its own code takes any keyword
        with pytest.raises(TypeError, match="Did you mean 'attention_mask'"):
            fast(**words(2, 8), attention_msk=None)
        with pytest.raises(DataError, match="attention_mask"):
            fast(input_ids=words(2, 8)["input_ids"])
        with pytest.raises(ArgumentError, match="labels"):
            fast(**words(2, 8), labels=torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_of_ones_in_the_sample(form):
    """The model does not look at such a mask, and must still look at others later."""
    model = tiny_bert().eval()
    sample = words(2, 8)
    sample["attention_mask"] = torch.ones_like(sample["attention_mask"])
    fast = make(model, sample, form)
    for mask in (sample["attention_mask"], words(2, 8)["attention_mask"]):
        batch = {"input_ids": sample["input_ids"], "attention_mask": mask}
        with torch.no_grad():
            same(fast(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("form", FORMS)
def test_a_decoder_without_and_with_its_cache(form):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(1, 60, (2, 6))
    fast = make(model, {"input_ids": ids, "use_cache": False}, form)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    same(fast(input_ids=ids, use_cache=False).logits, wanted)
    if form == "eager":
        same(make(model, {"input_ids": ids}, form)(input_ids=ids).logits, wanted)
    else:
        with pytest.raises(ConfigError, match="use_cache=False"):
            make(model, {"input_ids": ids}, form)


def test_pooling_of_any_size():
    for pool, shape in (
        (nn.AdaptiveMaxPool2d((2, 3)), (2, 3, 7, 8)),
        (nn.AdaptiveMaxPool3d(2), (2, 3, 5, 6, 7)),
        (nn.AdaptiveAvgPool3d((3, 1, 2)), (2, 3, 5, 6, 7)),
        (nn.AdaptiveAvgPool2d(3), (2, 3, 7, 8)),
    ):
        x = torch.randn(shape)
        same(make(pool, x, "onnxruntime")(x), pool(x))
    indices = nn.AdaptiveMaxPool2d(2, return_indices=True)
    with pytest.raises(ConfigError, match=r"other results|cannot be exported"):
        make(indices, torch.randn(2, 3, 7, 8), "onnxruntime")


@pytest.mark.parametrize("form", FORMS)
def test_padding_with_the_other_end(form):
    model = nn.Sequential(
        nn.Conv2d(2, 3, (3, 5), padding=(1, 2), padding_mode="circular"),
        nn.CircularPad2d((1, 0, 2, 3)),
    )
    fast = make(model, torch.randn(2, 2, 7, 8), form)
    x = torch.randn(3, 2, 7, 8)
    same(fast(x), model(x))


def test_weights_beside_a_large_file(monkeypatch):
    monkeypatch.setattr("bigdl.nano.pytorch.export.source._ONE_FILE_BYTES", 1000)
    model = nn.Linear(64, 64)
    x = torch.randn(2, 64)
    for form in ("onnxruntime", "openvino"):
        same(make(model, x, form)(x), model(x))


def test_an_input_that_the_model_does_not_use():
    for form in FORMS:
        fast = make(Two(lambda x, y: x * 2), (torch.randn(2, 3), torch.randn(2, 3)), form)
        x = torch.randn(4, 3)
        same(fast(x, torch.randn(4, 3)), x * 2)


def test_names_of_an_exported_file():
    class Named(nn.Module):
        def forward(self, x, more):
            return {"x": x + more["a"][0], "0 odd": x * 2}

    onnx = pytest.importorskip("onnx")
    source = TorchSource(Named(), (torch.randn(2, 3), {"a": [torch.randn(2, 3)]}))
    graph = onnx.load(source.onnx()).graph
    assert [each.name for each in graph.input] == ["x", "more_a_0"]
    assert [each.name for each in graph.output] == [spec.name for spec in source.outputs]
    assert len({spec.name for spec in (*source.inputs, *source.outputs)}) == 4


def test_flat_views():
    source = TorchSource(Two(lambda x, y: {"sum": x + y}), (torch.randn(2, 3), torch.randn(2, 3)))
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    arrays = source.flatten((x, y))
    assert all(isinstance(array, np.ndarray) for array in arrays)
    assert torch.equal(source.unflatten(source.reference(*arrays))["sum"], x + y)
    with pytest.raises(DataError):
        source.flatten((x.double(), y))


# --- batches ----------------------------------------------------------------------------------


class Takes(nn.Module):
    def forward(self, a, b, c=None):
        return a


def test_leading_items_are_inputs():
    a, b, c, d = (torch.randn(2) for _ in range(4))
    model = Takes()
    assert split_batch((a, b), model) == ((a, b), None)
    assert split_batch([a, b, c], model) == ((a, b), c)
    assert split_batch((a, b, c, d), model) == ((a, b), (c, d))
    assert split_batch((a, b, c, d), model, sample=(a, b, c)) == ((a, b, c), d)
    assert split_batch((a, b), model, sample=a) == ((a,), b)
    assert split_batch(a, model) == ((a,), None)
    with pytest.raises(DataError, match=r"1 items.*needs 2 inputs"):
        split_batch((a,), model)
    with pytest.raises(ArgumentError, match="int"):
        split_batch(3, model)


def test_entries_of_a_dict_are_inputs():
    a, b, c = (torch.randn(2) for _ in range(3))
    model = Takes()
    assert split_batch({"a": a, "b": b, "y": c}, model) == ({"a": a, "b": b}, c)
    assert split_batch({"a": a, "b": b}, model) == ({"a": a, "b": b}, None)
    assert split_batch({"a": a, "b": b, "c": c}, model, {"a": a, "b": b}) == ({"a": a, "b": b}, c)
    assert split_batch(({"a": a, "b": b}, c), model) == ({"a": a, "b": b}, c)
    both = split_batch({"a": a, "b": b, "y": c, "z": a}, model)
    assert both == ({"a": a, "b": b}, {"y": c, "z": a})
    with pytest.raises(DataError, match="none of them"):
        split_batch({"q": a}, model)
    with pytest.raises(DataError, match="no 'b'"):
        split_batch({"a": a}, model, {"a": a, "b": b})


def test_labels_of_hugging_face_batches_are_labels():
    batch = {**words(2, 5), "labels": torch.zeros(2)}
    inputs, labels = split_batch(batch, tiny_bert())
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert labels is batch["labels"]


def test_a_model_that_takes_the_batch_itself():
    batch = {"q": torch.randn(2)}
    assert split_batch(batch, fn(lambda x: x)) == ((batch,), None)


# --- structures -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checked:
    value: torch.Tensor

    def __post_init__(self):
        if not isinstance(self.value, torch.Tensor):
            raise TypeError("not a tensor")


def test_structures_through_json():
    from bigdl.nano.pytorch.export.structure import Record, Structure, flatten

    value = {"a": [torch.zeros(1), (torch.ones(2), None, 3, "text")], 5: Checked(torch.ones(3))}
    tensors, structure = flatten(value)
    again = Structure.from_json(structure.to_json())
    assert again == structure
    built = again.build(tensors)
    assert isinstance(built[5], Checked)
    assert built["a"][1][1:] == (None, 3, "text")
    unknown = structure.to_json()
    unknown["children"][1]["home"] = "no.such.module:Thing"
    record = Structure.from_json(unknown).build(tensors)[5]
    assert isinstance(record, Record)
    assert record.value is record["value"] is record[0]
    unknown["children"][1]["home"] = "os:system"  # loaded, but no container
    assert isinstance(Structure.from_json(unknown).build(tensors)[5], Record)
