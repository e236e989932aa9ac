"""Live bytes count what autograd holds, and nothing that is gone."""

import torch
from torch import nn

from setpoint.resources.tape import LiveBytes, taken


def test_peak_of_a_training_step_in_closed_form() -> None:
    """A linear layer: weight and input, then output, loss and gradients, each alive as long as needed."""
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(16, 64)
    with LiveBytes([layer.weight, x]) as live:
        layer(x).sum().backward()
    weight, inputs, output = 4 * 64 * 32, 4 * 16 * 64, 4 * 16 * 32
    # Backward: the incoming gradient is a scalar expanded over the output; the weight's gradient comes last.
    assert live.live_bytes == 2 * weight + inputs
    assert 2 * weight + inputs <= live.peak_bytes <= 2 * weight + inputs + output + 16


def test_saved_activations_count_until_backward() -> None:
    """What a function saves for backward stays alive after its caller has dropped it."""
    x = torch.randn(1000, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().sin().sum()
        assert live.live_bytes == 4000 + 4  # sin saves its input; exp its output, which is the same
        y.backward()
    assert live.live_bytes == 4000 + 4  # the gradient of x, and y


def test_a_storage_counts_once() -> None:
    """Views, in-place operations and tensors held twice add nothing."""
    x = torch.ones(100)
    with LiveBytes([x, x.view(10, 10)]) as live:
        x.add_(1)
        x.view(4, 25).t().mul_(2)
    assert (live.live_bytes, live.peak_bytes) == (400, 400)


def test_a_slice_counts_with_what_it_covers() -> None:
    """Claim: of a storage that was there before, what held slices or a first view of it cover counts, and no more."""
    data, table = torch.ones(100, 10), torch.ones(50, 10)
    with LiveBytes([data[:2], data[2:3]]) as live:
        batch = data[5:9]
        rows = table[5:9]
        assert live.live_bytes == 4 * (30 + 40)
        doubled = batch.view(-1) * 2
        assert live.live_bytes == 4 * (30 + 40 + 40)
        del doubled
        data.add_(1)
        table[9:30].add_(1)
    assert (live.live_bytes, live.peak_bytes) == (4 * 70, 4 * 110)
    del rows


def test_a_storage_that_is_resized_counts_anew() -> None:
    """Claim: an operation that makes a storage longer adds the difference, and one that gives it back takes it away."""
    x, out = torch.ones(10), torch.empty(0)
    with LiveBytes([x[:5]]) as live:
        x.resize_(20)
        assert live.live_bytes == 4 * 15
        torch.mm(torch.ones(3, 4), torch.ones(4, 5), out=out)
        assert live.live_bytes == 4 * (15 + 15)
        x.untyped_storage().resize_(0)
        x.resize_(0)
        assert live.live_bytes == 4 * 15


def test_events_come_in_order() -> None:
    """Storages are numbered as they are made and named when they go."""

    def step() -> None:
        a = torch.ones(3)
        b = a + 1
        del a
        b = b + 1

    assert taken(step, ()).events == [(0, True), (1, True), (0, False), (2, True), (1, False), (2, False)]
