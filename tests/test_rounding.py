"""Files in few bits, and training with the rounding that they have."""

import copy
import json
from contextlib import nullcontext

import pytest
import safetensors
import timm
import torch
from models import CRNN, Convolutions, UsedTwice, randomise, same
from safetensors.torch import load_file, save_file
from torch import nn

from hyperize import (
    ConfigError,
    FileError,
    ModelError,
    export_onnx,
    from_pretrained,
    hyperize,
    load,
    load_timm,
    quantized,
    save,
    save_pretrained,
    to_dense,
)
from hyperize.files import STEP, _digest, write_dense
from hyperize.parts import generated_layers
from hyperize.rounding import decode, encode, nearest, pack, unpack

MODELS = {
    "convolutions": (Convolutions, (2, 3, 16, 16), {}),
    "channels": (Convolutions, (2, 3, 16, 16), {"embeddings": "channel"}),
    "two layers": (Convolutions, (2, 3, 16, 16), {"hidden_dim": 8}),
    "crnn": (CRNN, (2, 1, 8, 16), {"exclude": "lstm"}),  # which stays dense
    "recurrent": (CRNN, (2, 1, 8, 16), {}),
    "used twice": (UsedTwice, (2, 3, 8, 8), {}),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, shape, options = MODELS[request.param]
    torch.manual_seed(0)
    model = randomise(make()).eval()
    return model, hyperize(model, compression=3, seed=0, **options), torch.randn(shape)


# ---------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("exponent", "dtype"), [(1, torch.float16), (6, torch.float32)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_value_is_off_by_half_a_step_at_most(bits, exponent, dtype):
    x = torch.randn(7, 3, 5) * torch.logspace(-exponent, exponent, 7)[:, None, None]
    numbers, step = encode(x, bits)
    assert step.dtype == dtype
    top = 2 ** (bits - 1) - 1
    assert numbers.abs().flatten(1).amax(1).eq(top).all()
    off = (decode(numbers, step, x.dtype) - x).abs().flatten(1).amax(1)
    assert (off <= 0.5001 * step).all()
    again, _ = encode(decode(numbers, step, x.dtype), bits)
    assert torch.equal(again, numbers)


def test_rows_of_zeros_stay_zeros():
    numbers, step = encode(torch.zeros(3, 4), 8)
    assert not decode(numbers, step, torch.float32).any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 2), (2, 3, 3)])
def test_four_bits_are_packed_two_to_a_byte(shape):
    numbers = torch.randint(-7, 8, shape, dtype=torch.int8)
    packed = pack(numbers)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-numbers.numel() // 2)
    assert torch.equal(unpack(packed, shape), numbers)


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("bits", [4, 8])
def test_a_file_holds_the_nearest_values(case, bits, tmp_path):
    model, hyper, _ = case
    written = save(hyper, tmp_path / "m", dtype=f"int{bits}")
    again = load(model, tmp_path / "m")
    assert again.state_dict().keys() == hyper.state_dict().keys()
    for (name, got), param in zip(again.named_parameters(), hyper.parameters(), strict=True):
        assert got.dtype == param.dtype
        assert torch.equal(got, nearest(param, bits)), name
    for (name, got), buffer in zip(again.named_buffers(), hyper.buffers(), strict=True):
        assert torch.equal(got, buffer), name
    # The errors told are those that there are
    for path, layer in generated_layers(hyper).items():
        for name in layer.generated:
            weight = layer.generate(name)
            rounded = again.get_submodule(path).generate(name)
            error = float((weight - rounded).norm() / weight.norm())
            title = f"{path}.{name}" if path else name
            assert written.errors[title] == pytest.approx(error, rel=1e-3)
            assert 0 < error < {8: 0.05, 4: 0.9}[bits]
    assert f"int{bits}" in str(written)


def test_the_outputs_are_near(case, tmp_path):
    model, hyper, x = case
    save(hyper, tmp_path / "m", dtype="int8")
    with torch.no_grad():
        got, wanted = load(model, tmp_path / "m")(x), hyper(x)
    assert (got - wanted).norm() < 0.1 * wanted.norm()


def test_the_length_of_a_file(tmp_path):
    model = timm.create_model("resnet18")
    hyper = hyperize(model, compression=10, targets=("conv2d", "linear"))
    sizes = {
        dtype: save(hyper, tmp_path / str(dtype), dtype=dtype).bytes
        for dtype in (None, torch.float16, "int8", "int4")
    }
    assert sizes["int8"] < sizes[None] / 3.5
    assert sizes["int4"] < sizes[None] / 6
    assert sizes["int4"] < sizes["int8"] < sizes[torch.float16] < sizes[None]


def test_everything_made_of_such_a_file(tmp_path):
    model = randomise(timm.create_model("test_resnet", num_classes=5)).eval()
    hyper = hyperize(model, compression=3, seed=0)
    x = torch.randn(2, 3, 64, 64)
    save(hyper, tmp_path / "m", dtype="int8")
    again = load_timm(tmp_path / "m").eval()
    dense = to_dense(again)
    with torch.no_grad():
        wanted = again(x)
        assert torch.equal(dense(x), wanted)
    write_dense(again, tmp_path / "dense")
    fresh = timm.create_model("test_resnet", num_classes=5).eval()
    fresh.load_state_dict(load_file(tmp_path / "dense"))
    with torch.no_grad():
        assert torch.equal(fresh(x), wanted)
    export_onnx(again, tmp_path / "m.onnx", x, dense=True)
    save_pretrained(hyper, tmp_path / "folder", dtype="int8")
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "folder").eval()(x), wanted)


def test_what_cannot_be_written(tmp_path):
    hyper = hyperize(Convolutions(), compression=3)
    with pytest.raises(ConfigError, match="no bits"):
        write_dense(hyper, tmp_path / "m", dtype="int8")
    with pytest.raises(ConfigError, match="dtype must be"):
        save(hyper, tmp_path / "m", dtype="int5")
    with torch.no_grad():
        hyper.head.weight[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        save(hyper, tmp_path / "m", dtype="int8")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_files_that_are_not_what_they_say(bits, tmp_path):
    model = UsedTwice()
    save(hyperize(model, compression=2), tmp_path / "m", dtype=f"int{bits}")
    tensors = load_file(tmp_path / "m")
    with safetensors.safe_open(tmp_path / "m", "pt") as file:
        header = json.loads(file.metadata()["hyperize"])
    name = "block.weight"
    shape = header["bits"][name][1]

    def tensor(key, value):
        return header, tensors | {key: value}

    def layout(value):
        return header | {"bits": header["bits"] | {name: value}}, tensors

    wrong = [
        tensor(name, tensors[name][:-1].contiguous()),
        tensor(name, tensors[name].float()),
        tensor(name + STEP, tensors[name + STEP][:-1].contiguous()),
        tensor(name + STEP, tensors[name + STEP].double()),
        (header, {key: t for key, t in tensors.items() if key != name + STEP}),
        (header, {key: t for key, t in tensors.items() if key != name}),
        layout([5, shape]),
        layout([12 - bits, shape]),
        layout([bits, shape[:1]]),
        layout([bits, [shape[0], shape[1] + 1]]),
        layout([bits, [-1, -1]]),
        layout([bits, [2**40, 2**40]]),
        layout("int8"),
        (header | {"bits": 3}, tensors),
        (header | {"bits": {"foreign": [bits, shape]}}, tensors),
        (header | {"bits": {}}, tensors),
        (header | {"format": 4}, tensors),
    ]
    for header_, tensors_ in wrong:
        changed = dict(header_)
        changed.pop("sha256")
        changed["sha256"] = _digest(changed, tensors_)
        save_file(tensors_, tmp_path / "bad", {"hyperize": json.dumps(changed)})
        with pytest.raises(FileError):
            load(model, tmp_path / "bad")


# ------------------------------------------------------------------------- training with rounding


@pytest.mark.parametrize("bits", [4, 8])
def test_inside_the_block_a_model_is_that_of_the_file(case, bits, tmp_path):
    model, hyper, x = case
    save(hyper, tmp_path / "m", dtype=f"int{bits}")
    wanted = load(model, tmp_path / "m").eval()(x)
    before = hyper(x)
    params = list(hyper.named_parameters())
    with quantized(hyper, bits):
        assert torch.equal(hyper(x), wanted)
        assert not torch.equal(wanted, before)
    assert torch.equal(hyper(x), before)
    for (name, param), (same_name, other) in zip(params, hyper.named_parameters(), strict=True):
        assert name == same_name
        assert param is other


def test_gradients_are_those_at_the_rounded_values(case, tmp_path):
    model, hyper, x = case
    save(hyper, tmp_path / "m", dtype="int8")
    other = load(model, tmp_path / "m").eval()
    other(x).square().mean().backward()
    with quantized(hyper, 8):
        hyper(x).square().mean().backward()
    for (name, p), q in zip(hyper.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("options", [{"recompute": True}, {"factorized": True}], ids=str)
def test_options_do_the_same(options):
    torch.manual_seed(0)
    model = randomise(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)).eval()
    hyper = hyperize(model, compression=4, targets="linear", seed=0, **options)
    plain = copy.deepcopy(hyper)
    plain.hypernet.recompute = plain.hypernet.factorized = False
    x = torch.randn(2, 3, 32, 32)
    grads = []
    for each in (hyper, plain):
        with quantized(each, 8):
            each(x).square().mean().backward()
        grads.append([p.grad for p in each.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_training_with_rounding_lowers_the_loss_of_the_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8))
    x, y = torch.randn(256, 64), torch.randn(256, 8)

    def train(hyper, rounds, steps, lr):
        optimizer = torch.optim.Adam(hyper.parameters(), lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(steps):
            optimizer.zero_grad()
            with quantized(hyper, 4) if rounds else nullcontext():
                (hyper(x) - y).square().mean().backward()
            optimizer.step()
            schedule.step()

    start = hyperize(model, compression=3, targets="linear", seed=0)
    train(start, False, 400, 1e-2)
    losses = {}
    for rounds in (False, True):  # the same steps more, without and with rounding
        hyper = copy.deepcopy(start)
        train(hyper, rounds, 200, 1e-3)
        save(hyper, tmp_path / "m", dtype="int4")
        with torch.no_grad():
            losses[rounds] = float((load(model, tmp_path / "m")(x) - y).square().mean())
    assert losses[True] < 0.7 * losses[False]  # 0.52 was measured


def test_what_is_refused():
    hyper = hyperize(UsedTwice(), compression=2)
    params = list(hyper.parameters())
    for bits in (3, 16, True, "8"):
        with pytest.raises(ConfigError, match="bits must be"), quantized(hyper, bits):
            pass
    with pytest.raises(ModelError, match="not hyperized"), quantized(UsedTwice(), 8):
        pass
    with (
        quantized(hyper, 8),
        pytest.raises(ModelError, match="in such a block already"),
        quantized(hyper, 4),
    ):
        pass
    with pytest.raises(ValueError, match="on purpose"), quantized(hyper, 8):
        raise ValueError("on purpose")
    assert all(a is b for a, b in zip(params, hyper.parameters(), strict=True))
    assert same(hyper.state_dict(), hyper.state_dict())
