"""Figure 8: a plain model, optimizer, loss and DataLoader, trained by an Estimator."""

from __future__ import annotations

import pytest


def test_figure_8(digits):
    from bigdl.orca import init_orca_context, stop_orca_context
    from bigdl.orca.learn.pytorch import Estimator

    torch = pytest.importorskip("torch", reason="needs the [torch] extra")

    x, y = map(torch.from_numpy, digits)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    )
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss = torch.nn.CrossEntropyLoss()
    train_loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=32, shuffle=True
    )

    init_orca_context(cluster_mode="local", cores=2)
    try:
        est = Estimator.from_torch(model=model, optimizer=optimizer, loss=loss)
        (epoch,) = est.fit(data=train_loader)
    finally:
        stop_orca_context()

    assert epoch["rows"] == len(x)  # every row once
    assert epoch["steps"] == len(train_loader)
    assert est.get_model() is model  # the caller's own, with the trained weights
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (model(x).argmax(1) == y).float().mean() > 0.8
