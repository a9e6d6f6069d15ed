"""Fig. 3: int8 inference on the model of one's own training loop, in two calls."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pytorch_lightning")
pytest.importorskip("onnxruntime")


def test_figure_3(digits):
    from bigdl.nano.pytorch import Trainer

    x, y = (torch.from_numpy(part) for part in digits)
    x = x.unsqueeze(1)  # (rows, 1, 8, 8)
    torch.manual_seed(0)
    train = torch.utils.data.TensorDataset(x[:1500], y[:1500])
    train_loader = torch.utils.data.DataLoader(train, batch_size=50, shuffle=True)
    data, target = x[1500:], y[1500:]

    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveMaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(6):
        for inputs, labels in train_loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    with torch.no_grad():
        expected = model(data)

    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    quantized = trainer.quantize(model, calib_data=train_loader, onnx=True)
    assert quantized is model
    assert torch.equal(model(data), expected)  # nothing runs otherwise until it is asked for

    model.eval_onnx(input_sample=data[:1], quantize=True)
    output = model(data)

    assert not torch.equal(output, expected)  # int8 ran
    assert (output.argmax(1) == expected.argmax(1)).float().mean() > 0.97
    assert (output.argmax(1) == target).float().mean() > 0.9

    model.exit_onnx()
    assert torch.equal(model(data), expected)
