"""On a GPU: a recorded step never waits for the device, and training stays bit-identical."""

import contextlib
import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ine_callback import GradientStore, Recorder
from ine_callback.capture.layers.normalization import batch_norm, norm_sums
from ine_callback.integrations.stored_products import products
from ine_callback.report.bands import Band
from ine_callback.report.stored_vectors import StoredVectors
from ine_callback.utilities import fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(8 * 36, 32),
        nn.LayerNorm(32),
        nn.GELU(),
        nn.Linear(32, 10),
    ).cuda()


def loss_of(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0].cuda()), batch[1].cuda())


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def precision(half: bool) -> contextlib.AbstractContextManager[None]:
    return torch.autocast("cuda", torch.bfloat16, enabled=half)


def train(record: bool, half: bool) -> tuple[nn.Module, Recorder | None]:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(256, 3, 8, 8, generator=g), torch.randint(0, 10, (256,), generator=g)
    recorder = None
    if record:
        queries = {"val": (x[:64], y[:64]), "self": "self"}
        options = {"rows": 256, "total_steps": 32, "refresh_every": 8, "on_error": "raise"}
        options |= {"context": lambda: precision(half)}
        recorder = Recorder(module, optimizer, queries=queries, loss=loss_of, **options)
        recorder.start()
    data = [(rows, x[rows].cuda(), y[rows].cuda()) for rows in torch.randperm(256, generator=g).repeat(2).split(16)]
    for step, (rows, xb, yb) in enumerate(data):
        # steps 0, 8, ... refresh the directions, which may wait; every other step must not
        guard = no_synchronisation if step % 8 else contextlib.nullcontext
        with guard(), recorder.batch(rows, (xb, yb)) if recorder else contextlib.nullcontext():
            with precision(half):
                loss = nn.functional.cross_entropy(module(xb), yb)
            if recorder:
                recorder.see(loss)
            loss.backward()
        with guard():
            optimizer.step()
            optimizer.zero_grad()
    if recorder:
        recorder.stop()
    return module, recorder


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_recorded_steps_do_not_synchronise_and_training_is_bit_identical(tmp_path, half: bool) -> None:
    torch.backends.cudnn.deterministic = True
    plain, _ = train(False, half)
    recorded, recorder = train(True, half)
    assert recorder is not None
    state = copy.deepcopy(plain.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in recorded.state_dict().items())
    report = recorder.report()
    assert (report.observations == 2).all()
    assert report.run.captured_share == 1.0
    assert not fused.failures()  # Triton is there, and has compiled what is small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_sums_are_those_of_the_processor(dtype: torch.dtype) -> None:
    near = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for rows in (6, 4):
        x, grads = torch.randn(2, rows, 40, 64).to(dtype)
        for found, expected in zip(
            norm_sums(x.cuda(), grads.cuda(), 1, 1e-5), norm_sums(x, grads, 1, 1e-5), strict=True
        ):
            torch.testing.assert_close(found.cpu(), expected, **near)
        layer = nn.BatchNorm1d(40)
        expected = batch_norm(layer, x.float(), grads.float(), rows)
        found = batch_norm(layer.cuda(), x.cuda(), grads.cuda(), rows)
        for name in expected:
            torch.testing.assert_close(found[name].g.cpu(), expected[name].g, **near)
    assert norm_sums._compiled is not None and not fused.failures()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_network_is_recorded_and_trains_the_same(mode: str | None) -> None:
    def trained(record: bool) -> tuple[list[Tensor], Recorder | None]:
        torch.compiler.reset()
        network = model()
        run = torch.compile(network, mode=mode)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
        g = torch.Generator().manual_seed(1)
        x, y = torch.randn(64, 3, 8, 8, generator=g), torch.randint(0, 10, (64,), generator=g)
        recorder = Recorder(run, optimizer, 64, queries={"val": (x[:16], y[:16])}, loss=loss_of, total_steps=8)
        if record:
            recorder.start()
        for step in range(8):
            rows = torch.arange(16) + 16 * (step % 4)
            batch = x[rows], y[rows]
            if record:
                recorder.start_batch(rows, batch)
            loss = loss_of(run, batch)
            if record:
                recorder.see(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        recorder.stop()
        return [p.detach().cpu() for p in network.parameters()], recorder if record else None

    plain, _ = trained(False)
    left, recorder = trained(True)
    assert recorder is not None and not recorder.report().run.uncaptured
    assert (recorder.report().observations == 2).all()
    torch.testing.assert_close(left, plain, rtol=1e-4, atol=1e-6)  # to the bit where the compiler fuses alike


def test_rows_vectors_beyond_the_bound_are_the_same_in_the_host_s_memory() -> None:
    found = []
    for size in (2**30, 0):
        module = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).cuda()
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p))
        g = torch.Generator().manual_seed(1)
        x, y = torch.randn(64, 12, generator=g), torch.randint(0, 3, (64,), generator=g)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        store = GradientStore(bytes_per_row=4 + 4 * 200, dtype="float32", device_bytes=size)
        options = {"total_steps": 16, "refresh_every": 4, "store": store, "on_error": "raise"}
        with Recorder(module, optimizer, 64, {"val": (x[:16], y[:16])}, loss_of, **options) as recorder:
            for rows in torch.arange(64).repeat(2).split(8):
                with recorder.batch(rows, (x[rows], y[rows])):
                    loss = loss_of(module, (x[rows], y[rows]))
                    recorder.see(loss)
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert recorder.store is not None
            assert recorder.store.vectors.vectors(64).is_cuda == (size > 0)
        one = recorder.report().store
        assert one is not None
        numbers = one.rows * one.scale[:, None]
        found.append(numbers @ numbers.T)
    assert abs(found[0] - found[1]).max() < 1e-4 * abs(found[0]).max()


def test_products_with_numbers_of_mixed_width_are_those_on_a_processor() -> None:
    rng, bands = np.random.default_rng(0), (Band(8, 5), Band(4, 6), Band(2, 12))
    rows, scale = rng.integers(-128, 128, (300, 11), dtype=np.int8), rng.random((300, 3), dtype=np.float32)
    one = np.ones(23, np.float32)
    store = StoredVectors(rows, scale, (), np.diag(one), one, np.ones(300, np.bool_), bands=bands)
    queries = rng.normal(size=(4, 23))
    found = products(store, queries, torch.device("cuda"))
    np.testing.assert_allclose(found, store.products(queries), atol=1e-4 * np.abs(found).max())
