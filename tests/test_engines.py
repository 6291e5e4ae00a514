"""What trains models: DDP, FSDP2, accelerate, Lightning, compilers, half precision, timm's tools.

Several processes are real ones, on the CPU with gloo. Each runs a function of this module by name,
and leaves what it returns in a file. All models are randomised, so that every parameter has a
gradient, and in evaluation mode, so that batches can be split.
"""

import copy
import gc
import os
from datetime import timedelta
from functools import partial
from unittest.mock import patch

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from accelerate import Accelerator
from models import CRNN, Stage, Tied, accelerate, randomise, same
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from hyperize import (
    ConditionError,
    ConfigError,
    HyperMuon,
    ModelError,
    condition,
    dense_state_dict,
    generated_l2,
    hyperize,
    param_groups,
    plan,
    shard,
    to_dense,
)
from hyperize.layers import Generated

SAME_SUMS = 1e-5
"""Relative error, in norm, of sums in another order in float32; 1e-6 was measured."""
SAME_STEPS = 2e-3
"""The same of weights after steps of Adam, which divides each gradient by its own size and so makes
whole steps of rounding where a gradient is near zero; 2e-4 was measured."""
HALF_SUMS = {torch.half: 0.15, torch.bfloat16: 0.4}
"""The same of gradients through a network in fewer bits; 0.06 and 0.22 were measured."""
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
TIMEOUT = 120
"""Seconds after which processes hang rather than compute; they take 10."""


def image_model(name="test_resnet", **options):
    """A hyperized model of timm with 5 classes, the same at each call."""
    torch.manual_seed(0)
    options = {"compression": 3, "seed": 0} | options
    return hyperize(randomise(timm.create_model(name, num_classes=5)).eval(), **options)


def convnext():
    return image_model("test_convnext", targets=("conv2d", "linear"))


def factorized():
    """Factors wherever tiles line up, though the layers of small models are faster without."""
    with patch.object(plan, "BALANCE", -(10**9)):
        model = image_model(factorized=True)
    assert any(isinstance(m, Generated) and m.factoring for m in model.modules())
    return model


def crnn():
    torch.manual_seed(0)
    return hyperize(randomise(CRNN()).eval(), compression=3, seed=0)


def stage():
    torch.manual_seed(0)
    return hyperize(randomise(Stage()).eval(), compression=3, seed=0)


def batch(model="resnet", size=4):
    """Inputs and labels, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, 16, 24) if model == "crnn" else (3, 64, 64)
    inputs = torch.randn(size, *shape, generator=generator)
    return inputs, torch.randint(5, (size,), generator=generator)


def loss_of(model, inputs, labels):
    outputs = model(inputs)
    return F.cross_entropy(outputs if outputs.ndim == 2 else outputs.mean(1), labels)


def gradients(model):
    """Gradients by the names that parameters have in the model itself, whole, as copies."""
    names = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    assert all(p.grad is not None for p in names.values())
    return {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for name, p in names.items()
    }


def error(found, expected):
    """The largest relative error, in norm, of any tensor; each has to be there and not zero."""
    assert found.keys() == expected.keys()
    assert all(t.float().norm() > 0 for t in expected.values())
    return max(
        ((found[name].float() - t.float()).norm() / t.float().norm()).item()
        for name, t in expected.items()
    )


def adamw(model):
    # A large eps: where a gradient is zero but for rounding, Adam would follow the rounding
    return torch.optim.AdamW(param_groups(model, 0.05), lr=1e-3, eps=1e-4)


def train(model, optimizer, inputs, labels, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, inputs, labels).backward()
        optimizer.step()


# ------------------------------------------------------------------------------- several processes
def in_processes(worker, folder, *args, world=2):
    """What `worker(rank, *args)` returns in each of the processes of one gloo group."""
    folder.mkdir()
    context = mp.spawn(_process, (world, folder, worker, args), nprocs=world, join=False)
    try:
        assert context.join(TIMEOUT) or context.join(TIMEOUT), "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _process(rank, world, folder, worker, args):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", rendezvous, timeout, world_size=world, rank=rank)
    torch.save(worker(rank, *args), folder / f"{rank}.pt")
    gc.collect()
    dist.destroy_process_group()
    # Without the interpreter's end, in which a thread of torch's now and then aborts the process
    os._exit(0)


@pytest.fixture
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


def half(rank, model="resnet"):
    """One process's share of the batch."""
    return [t[2 * rank : 2 * rank + 2] for t in batch(model)]


# --------------------------------------------------------------------------------------------- DDP
DDP = {
    "default": (image_model, {}),
    "static_graph": (image_model, {"static_graph": True}),
    "channel": (partial(image_model, embeddings="channel"), {}),
    "separable": (partial(image_model, embeddings="separable"), {}),
    "bucket_view": (convnext, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1}),
    "factorized": (factorized, {}),
    "crnn": (crnn, {}),
}


def ddp(rank):
    found = {}
    for name, (make, options) in DDP.items():
        model = make()
        if rank:  # DDP starts all from rank 0's weights
            randomise(model, seed=rank)
            layer = next(m for m in model.modules() if isinstance(m, Generated))
            nn.init.normal_(layer.embedding(layer.generated[0]))
        wrapped = DistributedDataParallel(model, **options)
        loss_of(wrapped, *half(rank, name)).backward()
        found[name] = gradients(wrapped)

    wrapped = DistributedDataParallel(image_model())
    inputs, labels = half(rank)
    with wrapped.no_sync():
        loss_of(wrapped, inputs[:1], labels[:1]).backward()
    loss_of(wrapped, inputs[1:], labels[1:]).backward()
    found["accumulated"] = gradients(wrapped)

    wrapped = DistributedDataParallel(image_model())
    with generated_l2(wrapped) as l2:
        loss = loss_of(wrapped, inputs, labels)
    (loss + l2()).backward()
    found["penalty"] = gradients(wrapped)

    model = image_model()
    train(DistributedDataParallel(model), adamw(model), inputs, labels, 3)
    found["trained"] = model.state_dict()
    return found


def ddp_muon(rank):
    model = image_model()
    wrapped = DistributedDataParallel(model)
    train(wrapped, HyperMuon(wrapped, 1e-2), *half(rank), 3)
    return model.state_dict()


def test_ddp_takes_equal_steps_of_hyper_muon_everywhere(tmp_path):
    one, other = in_processes(ddp_muon, tmp_path / "processes")
    assert same(one, other)
    assert not same(one, image_model().state_dict())


def ddp_accelerated(rank):
    accelerate()
    return ddp(rank)


@pytest.mark.parametrize("function", [ddp, ddp_accelerated])
def test_ddp_gives_the_gradients_of_one_process(function, tmp_path):
    first, second = in_processes(function, tmp_path / "ddp")
    for name, found in first.items():
        assert same(found, second[name]), name  # bit for bit, as all reduce alike
    for name, (make, _) in DDP.items():
        model = make()
        loss_of(model, *batch(name)).backward()
        assert error(first[name], gradients(model)) < SAME_SUMS, name

    model = image_model()
    loss_of(model, *batch()).backward()
    expected = gradients(model)
    assert error({n: g / 2 for n, g in first["accumulated"].items()}, expected) < SAME_SUMS

    model.zero_grad()
    with generated_l2(model) as l2:
        loss = loss_of(model, *batch())
    (loss + l2()).backward()
    assert error(first["penalty"], gradients(model)) < SAME_SUMS
    assert error(first["penalty"], expected) > 0.1

    model = image_model()
    train(model, adamw(model), *batch(), 3)
    assert error(floats(first["trained"]), floats(model.state_dict())) < SAME_STEPS


def floats(state):
    return {name: t for name, t in state.items() if t.is_floating_point() and t.any()}


# ------------------------------------------------------------------------------------------- FSDP2
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
FSDP = {
    "default": (image_model, {}),
    "resharded": (image_model, {"reshard_after_forward": True}),
    "channel": (partial(image_model, embeddings="channel"), {}),
    "separable": (partial(image_model, embeddings="separable"), {}),
    "convnext": (convnext, {}),
    "bfloat16": (convnext, {"mp_policy": BF16}),
    "factorized": (factorized, {"reshard_after_forward": True}),
    "crnn": (crnn, {}),
    "paper": (partial(image_model, hidden_dim=16, embedding_dim=16), {}),
}


class Gathers(TorchDispatchMode):
    """Counts how often parameters are gathered."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket == torch.ops.c10d._allgather_base_
        return function(*args, **kwargs or {})


def groups(model):
    return sum(isinstance(module, FSDPModule) for module in model.modules())


def fsdp(rank):
    found = {}
    for name, (make, options) in FSDP.items():
        model = shard(make(), **options)
        with Gathers() as gathers:
            loss_of(model, *half(rank, name)).backward()
        found[name] = gradients(model)
        found[name, "gathers"] = gathers.count, groups(model)

    inputs, labels = half(rank)
    for name, make, options in (
        ("penalty", image_model, {}),
        ("penalty, factorized", factorized, {"reshard_after_forward": True}),
    ):
        model = shard(make(), **options)
        with generated_l2(model) as l2:
            loss = loss_of(model, inputs, labels)
        (loss + l2()).backward()
        found[name] = gradients(model)

    # Made on meta, filled by rank 0
    with torch.device("meta"):
        model = hyperize(timm.create_model("test_resnet", num_classes=5), compression=3).eval()
    shard(model).to_empty(device="cpu")
    state = image_model().state_dict() if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    with torch.no_grad():
        found["meta"] = model(batch()[0]), image_model()(batch()[0])
    return found


def fsdp_accelerated(rank):
    accelerate()
    return fsdp(rank)


@pytest.mark.parametrize("function", [fsdp, fsdp_accelerated])
def test_fsdp2_gives_the_gradients_of_one_process(function, tmp_path):
    first, second = in_processes(function, tmp_path / "fsdp")
    assert same([*first.values()][:1], [*second.values()][:1])
    for name, (make, _) in FSDP.items():
        model = make()
        loss_of(model, *batch(name)).backward()
        bound = HALF_SUMS[torch.bfloat16] if name == "bfloat16" else SAME_SUMS
        assert error(first[name], gradients(model)) < bound, name
        assert all(g.dtype == torch.float32 for g in first[name].values())
        # Once in the forward pass and, after resharding, once in the backward pass: the root's
        # group, of which the hypernetwork is a part, no more often than any other
        count, parts = first[name, "gathers"]
        root = 2 if FSDP[name][1].get("reshard_after_forward") else 1
        assert count == 2 * (parts - 1) + root, name
        assert parts == {"crnn": 1}.get(name, 5), name
    assert error(first["bfloat16"], first["convnext"]) > 1e-3

    for name, make in (("penalty", image_model), ("penalty, factorized", factorized)):
        model = make()
        with generated_l2(model) as l2:
            loss = loss_of(model, *batch())
        (loss + l2()).backward()
        assert error(first[name], gradients(model)) < SAME_SUMS
    assert torch.equal(*first["meta"])


def checkpoint_of(model, optimizer):
    state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": state, "optimizer": optimizer_state}


def equal(a, b):
    """Whether two states are equal, tensors of them bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return same(a, b) if isinstance(a, torch.Tensor) else a == b


def whole(model, optimizer):
    """The full state of both, as copies."""
    return list(copy.deepcopy(get_state_dict(model, optimizer, options=FULL)))


def resume(model, optimizer, folder):
    state = checkpoint_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def fsdp_checkpoint(rank, of_two, of_one):
    inputs, labels = half(rank)
    model = shard(image_model())
    optimizer = adamw(model)
    train(model, optimizer, inputs, labels, 2)
    dcp.save(checkpoint_of(model, optimizer), checkpoint_id=of_two)
    saved = whole(model, optimizer)
    train(model, optimizer, inputs, labels, 1)
    went_on = whole(model, optimizer)

    model = shard(image_model(seed=1))
    optimizer = adamw(model)
    resume(model, optimizer, of_one)
    return {
        "saved": saved,
        "went on": went_on,
        "resumed": whole(model, optimizer),
    }


@pytest.mark.usefixtures("_one_process")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_fsdp2_checkpoint_resumes_with_another_number_of_processes(tmp_path):
    of_two, of_one = tmp_path / "of_two", tmp_path / "of_one"
    model = shard(image_model())
    optimizer = adamw(model)
    train(model, optimizer, *batch(), 2)
    dcp.save(checkpoint_of(model, optimizer), checkpoint_id=of_one)
    saved = whole(model, optimizer)

    two = in_processes(fsdp_checkpoint, tmp_path / "two", of_two, of_one)[0]
    assert equal(two["resumed"], saved)  # one process to two
    assert error(floats(two["saved"][0]), floats(saved[0])) < SAME_STEPS

    model = shard(image_model(seed=1))
    optimizer = adamw(model)
    resume(model, optimizer, of_two)
    assert equal(whole(model, optimizer), two["saved"])  # two processes to one
    train(model, optimizer, *batch(), 1)
    state, _ = whole(model, optimizer)
    assert error(floats(state), floats(two["went on"][0])) < SAME_STEPS
    assert not equal(state, two["saved"][0])

    # The way to the small file and to dense weights
    with pytest.raises(ModelError, match=r"FSDP2.*gather a full state dict"):
        to_dense(model)
    copied = hyperize(timm.create_model("test_resnet", num_classes=5), model.hypernet.plan).eval()
    copied.load_state_dict(get_model_state_dict(model, options=FULL))
    with torch.no_grad():
        assert same(copied(batch()[0]), model(batch()[0]))
    dense_state_dict(copied)


class Shared(nn.Module):
    """Two towers that share a layer of their first blocks."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleDict(
            {name: nn.ModuleList(Stage() for _ in range(2)) for name in ("left", "right")}
        )
        self.towers["right"][0].head = self.towers["left"][0].head

    def forward(self, x):
        return sum(stage(x) for tower in self.towers.values() for stage in tower)


@pytest.mark.usefixtures("_one_process")
def test_the_blocks_that_shard_finds():
    def found(model):
        shard(model)
        return [path for path, m in model.named_modules() if path and isinstance(m, FSDPModule)]

    assert found(image_model()) == [f"layer{i}.0" for i in (1, 2, 3, 4)]
    assert found(hyperize(Shared(), compression=2)) == ["towers.left.1", "towers.right.1"]
    assert found(hyperize(Stage(), compression=2)) == []
    # The hypernetwork is the first layer's, and yet in the group of the whole
    tied = nn.Sequential(Tied(), nn.Sequential(Tied(), nn.ReLU()), Tied())
    assert found(hyperize(tied, compression=2)) == ["0", "1.0", "2"]


@pytest.mark.usefixtures("_one_process")
def test_blocks_of_ones_own():
    model = image_model()
    blocks = (model.layer2, model.layer2[0], model.layer4)  # in any order
    assert shard(model, iter(blocks), reshard_after_forward=False) is model
    inside = {path for path, m in model.named_modules() if isinstance(m, FSDPModule)}
    assert inside == {"", "layer2", "layer2.0", "layer4"}
    with torch.no_grad():
        assert torch.equal(model(batch()[0]), image_model()(batch()[0]))


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("wrap", [DistributedDataParallel, shard])
def test_engines_pass_conditions_on(wrap):
    plain, wrapped = image_model(conditions=2), wrap(image_model(conditions=2))
    inputs, labels = batch()
    for model in (plain, wrapped):
        for k in (0, 1):
            with condition(model, k):
                loss = loss_of(model, inputs, labels)
            (loss * (1 + k)).backward()
    assert error(gradients(wrapped), gradients(plain)) < SAME_STEPS
    with pytest.raises(ConditionError):
        wrapped(inputs)


@pytest.mark.usefixtures("_one_process")
def test_what_cannot_be_sharded():
    model = image_model()
    model.head = nn.ModuleDict({"all": nn.Sequential(model.hypernet)})
    towers = hyperize(Shared(), compression=2)
    before = [(type(m), [*m._parameters.values()]) for m in (*model.modules(), *towers.modules())]
    for net, blocks, message in (
        (model, [model], "that is the model itself"),
        (model, [model.layer1, model.layer1[0].conv1.weight_embedding], "got a Parameter"),
        (model, [model.layer1, copy.deepcopy(model.layer2)], "Sequential that is none of them"),
        (model, [model.layer1, model.hypernet], "hypernet cannot be a block: it is the hypernet"),
        (model, [model.layer1, model.head["all"]], "it holds the hypernetwork"),
        (model, [model.layer1, model.head], r"head cannot be a block: .* container that is never"),
        (towers, [towers.towers["left"][0]], r"left.0 cannot be a block: it shares head.weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            shard(net, blocks)
    after = [(type(m), [*m._parameters.values()]) for m in (*model.modules(), *towers.modules())]
    assert all(a[0] is b[0] and same(a[1], b[1]) for a, b in zip(after, before, strict=True))

    with pytest.raises(ModelError, match="not hyperized"):
        shard(Stage())
    with pytest.raises(ModelError, match="DistributedDataParallel; pass the model inside"):
        shard(DistributedDataParallel(image_model()))
    scalar = image_model()
    scalar.layer1[0].gain = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ModelError, match=r"layer1.0.gain has no axes.*ignored_params"):
        shard(scalar)
    assert groups(scalar) == 0
    assert groups(shard(scalar, ignored_params={scalar.layer1[0].gain})) == 5
    with pytest.raises(ModelError, match="FSDP2"):
        shard(scalar)
    partly = image_model()
    fully_shard(partly.layer1[0])
    with pytest.raises(ModelError, match="sharded"):
        shard(partly)


# ------------------------------------------------------------------------ accelerate and Lightning
def one_of(i):
    """Batches 0, 1, 0, 1, ..."""
    return half(i % 2)


class Batches(torch.utils.data.Dataset):
    """The images of `one_of`, of 8 batches, one after the other."""

    def __len__(self):
        return 8 * 2

    def __getitem__(self, i):
        inputs, labels = batch()
        return inputs[i % 4], labels[i % 4]


def loader():
    return torch.utils.data.DataLoader(Batches(), batch_size=2)


def plain_loop(steps, dtype=None):
    """Losses of some steps of training, and the model."""
    model = image_model()
    optimizer = adamw(model)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            loss = loss_of(model, *one_of(i))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-2] < losses[0]  # the same batch
    return losses, model


@pytest.mark.usefixtures("forget_accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision, tmp_path):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = image_model()
    model, optimizer, batches = accelerator.prepare(model, adamw(model), loader())
    losses = []
    for inputs, labels in batches:
        with accelerator.autocast():
            loss = loss_of(model, inputs, labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == 6:
            accelerator.save_state(tmp_path)
    trained = accelerator.unwrap_model(model)
    if precision == "no":
        expected, plain = plain_loop(8)
        assert losses == expected
        assert same(trained.state_dict(), plain.state_dict())
    else:  # accelerate casts the model's output, so that the loss rounds otherwise
        assert losses == pytest.approx(plain_loop(8, torch.bfloat16)[0], rel=0.02)
        assert losses != plain_loop(8)[0]
    accelerator.load_state(tmp_path)
    assert not same(trained.state_dict(), image_model().state_dict())
    with accelerator.autocast():
        assert loss_of(model, *one_of(6)).item() == losses[6]
    assert type(to_dense(trained)) is type(timm.create_model("test_resnet"))


@pytest.mark.usefixtures("forget_accelerate")
def test_accelerate_steps_hyper_muon(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, plain = image_model(), image_model()
    model, optimizer = accelerator.prepare(model, HyperMuon(model, 1e-2))
    reference = HyperMuon(plain, 1e-2)
    for _ in range(2):
        accelerator.backward(loss_of(model, *batch()))
        loss_of(plain, *batch()).backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    accelerator.save_state(tmp_path)
    assert same(accelerator.unwrap_model(model).state_dict(), plain.state_dict())
    assert not same(plain.state_dict(), image_model().state_dict())
    accelerator.load_state(tmp_path)


@pytest.mark.filterwarnings("ignore")  # its advice on loaders and logging
def test_lightning(tmp_path):
    import lightning  # here, as the other processes do without

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = image_model()
            self.losses = []

        def training_step(self, pair, _):
            self.net.eval()  # as in the plain loop
            loss = loss_of(self.net, *pair)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return adamw(self)

    def trainer(steps):
        return lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    expected, plain = plain_loop(8)
    module = Classifier()
    first = trainer(6)
    first.fit(module, loader())
    assert module.losses == expected[:6]
    path = tmp_path / "six.ckpt"
    first.save_checkpoint(path)
    saved = copy.deepcopy(module.state_dict())

    module = Classifier()
    trainer(8).fit(module, loader(), ckpt_path=path)
    assert module.losses == expected[6:]
    assert same(module.net.state_dict(), plain.state_dict())
    assert same(Classifier.load_from_checkpoint(path).state_dict(), saved)


# -------------------------------------------------------------- compilation, precision and memory
def test_a_compiled_training_step():
    torch.compiler.reset()
    start, plain, model = (stage() for _ in range(3))
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1, momentum=0.9)

    @torch.compile(backend="aot_eager")
    def step(inputs, labels):
        loss = loss_of(model, inputs, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    reference = torch.optim.SGD(param_groups(plain), lr=0.1, momentum=0.9)
    for _ in range(3):
        loss = loss_of(plain, *batch())
        reference.zero_grad()
        loss.backward()
        reference.step()
        torch.testing.assert_close(step(*batch()), loss, rtol=SAME_SUMS, atol=0)
    assert error(floats(model.state_dict()), floats(plain.state_dict())) < SAME_STEPS
    assert not any(map(torch.equal, model.parameters(), start.parameters()))


@pytest.mark.parametrize("make", [image_model, crnn])
def test_a_gradient_scaler_under_bfloat16_autocast(make):
    model, plain = make(), make()
    inputs, labels = batch(make.__name__)
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for net in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net, inputs, labels)
        (scaler.scale(loss) if net is model else loss).backward()
    scaler.unscale_(optimizer)
    assert same(gradients(model), gradients(plain))  # a power of two, so bit for bit
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 0.1
    scaler.step(optimizer)
    scaler.update()
    assert not any(map(torch.equal, model.parameters(), plain.parameters()))

    # A step whose gradients overflow is skipped, and the scale is halved
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    scaler.scale(loss_of(model, inputs, labels) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(model.state_dict(), before)
    assert scaler.get_scale() == 2.0**7


def test_gradients_accumulate():
    model = image_model()
    loss_of(model, *batch()).backward()
    expected = gradients(model)
    model.zero_grad()
    for rank in (0, 1):
        (loss_of(model, *half(rank)) / 2).backward()
    assert error(gradients(model), expected) < SAME_SUMS


@pytest.mark.parametrize("make", [image_model, convnext])
def test_channels_last_trains_alike(make):
    model = make()
    loss_of(model, *batch()).backward()
    expected = gradients(model)
    model = make().to(memory_format=torch.channels_last)
    inputs, labels = batch()
    loss_of(model, inputs.contiguous(memory_format=torch.channels_last), labels).backward()
    assert error(gradients(model), expected) < SAME_SUMS


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("make", [image_model, convnext])
def test_half_models_train_alike(make, dtype):
    model = make()
    loss_of(model, *batch()).backward()
    expected = gradients(model)
    model = make().half() if dtype is torch.half else make().bfloat16()
    inputs, labels = batch()
    loss_of(model, inputs.to(dtype), labels).backward()
    found = gradients(model)
    assert all(g.dtype == dtype for g in found.values())
    assert error(found, expected) < HALF_SUMS[dtype]


def test_sync_batch_norm_takes_the_norms_only():
    hyper = image_model()
    layers = {path for path, m in hyper.named_modules() if isinstance(m, Generated)}
    norms = {path for path, m in hyper.named_modules() if isinstance(m, nn.BatchNorm2d)}
    state, expected = copy.deepcopy(hyper.state_dict()), hyper(batch()[0])
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm):
        model = convert(image_model())
        assert {p for p, m in model.named_modules() if isinstance(m, Generated)} == layers
        synced = {p for p, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)}
        assert synced == norms != set()
        assert same(model.state_dict(), state)
        for train in (False, True):  # one process alone has nothing to wait for
            assert same(model.train(train)(batch()[0]), hyper.train(train)(batch()[0]))
        hyper.load_state_dict(state)
        assert same(hyper.eval()(batch()[0]), expected)


# ------------------------------------------------------------------------------------ tools of timm
def generating(hyper):
    """The names of the parameters that generate weights: embeddings, and the hypernetwork's."""
    layers = [(path, m) for path, m in hyper.named_modules() if isinstance(m, Generated)]
    embeddings = {f"{path}.{name}" for path, m in layers for name in m.generated}
    names = {name for name, _ in hyper.named_parameters()}
    assert embeddings < names
    return embeddings | {name for name in names if "hypernet." in name}


def settings(model, optimizer, key):
    """One setting of each parameter's group, by the parameter's name."""
    of = {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_weight_decay_by_create_optimizer_v2(name):
    hyper = image_model()
    by_function = create_optimizer_v2(
        hyper, name, lr=0.1, param_group_fn=partial(param_groups, weight_decay=0.05)
    )
    by_groups = create_optimizer_v2(param_groups(hyper, 0.05), name, lr=0.1)
    for optimizer in (by_function, by_groups):
        decays = settings(hyper, optimizer, "weight_decay")
        expected = {n for n, p in hyper.named_parameters() if p.ndim > 1} - generating(hyper)
        assert {name for name, decay in decays.items() if decay} == expected
        assert "fc.weight" in expected
        train(hyper, optimizer, *batch(), 1)
    # Left to itself, timm goes by the number of axes
    decays = settings(hyper, create_optimizer_v2(hyper, name, weight_decay=0.05), "weight_decay")
    assert any(decays[name] for name in generating(hyper))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_layer_decay(name):
    dense = timm.create_model(name, num_classes=5)
    hyper = hyperize(dense, compression=2, targets=("conv2d", "linear"))
    keep = getattr(hyper, "no_weight_decay", set)()
    grouping = partial(
        param_groups_layer_decay,
        weight_decay=0.05,
        layer_decay=0.5,
        no_weight_decay_list={*generating(hyper), *keep},
    )
    optimizer = create_optimizer_v2(hyper, "adamw", lr=0.1, param_group_fn=grouping)
    scales = settings(hyper, optimizer, "lr_scale")
    expected = settings(
        dense,
        create_optimizer_v2(dense, "adamw", layer_decay=0.5),
        "lr_scale",
    )
    # Each layer is scaled as it was; the generator as the first layer that it generates for
    found = {n: s for n, s in scales.items() if "hypernet." not in n}
    assert found == expected
    assert len(set(found.values())) > 4
    path, first = next((p, m) for p, m in hyper.named_modules() if isinstance(m, Generated))
    generator = {s for n, s in scales.items() if "hypernet." in n}
    assert generator == {expected[f"{path}.{first.generated[0]}"]}
    decays = settings(hyper, optimizer, "weight_decay")
    assert not any(decays[name] for name in generating(hyper))


def test_a_checkpoint_of_timm(tmp_path):
    inputs, labels = batch()
    model = image_model()
    optimizer = create_optimizer_v2(param_groups(model, 0.05), "adamw", lr=1e-3)
    average, scaler = ModelEmaV3(model, decay=0.5), NativeScaler("cpu")
    saver = CheckpointSaver(model, optimizer, None, average, scaler, checkpoint_dir=str(tmp_path))

    def step(model, optimizer, average, scaler):
        optimizer.zero_grad()
        loss = loss_of(model, inputs, labels)
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        average.update(model)
        return loss

    for epoch in range(3):
        step(model, optimizer, average, scaler)
        saver.save_checkpoint(epoch, metric=float(epoch))
    with torch.no_grad():
        expected, smooth = model(inputs), average.module(inputs)
    step(model, optimizer, average, scaler)
    path = str(tmp_path / "last.pth.tar")

    again = image_model(seed=1)
    optimizer = create_optimizer_v2(param_groups(again, 0.05), "adamw", lr=1e-3)
    scaler = NativeScaler("cpu")
    weights_only = False  # the file names the optimizer's class and the arguments
    assert resume_checkpoint(again, path, optimizer, scaler, weights_only=weights_only) == 3
    smoothed = image_model(seed=2)
    load_checkpoint(smoothed, path, use_ema=True)
    with torch.no_grad():
        assert same(again(inputs), expected)
        assert same(smoothed(inputs), smooth)
        assert not same(expected, smooth)
    step(again, optimizer, ModelEmaV3(again), scaler)
    assert same(again.state_dict(), model.state_dict())


def test_the_average_of_a_model_generates_by_itself():
    model = image_model()
    average = ModelEmaV3(model, decay=0.75)
    start = copy.deepcopy(model.state_dict())
    train(model, adamw(model), *batch(), 2)
    average.update(model)
    mixed = {
        name: torch.lerp(t, model.state_dict()[name], 0.25) if t.is_floating_point() else t
        for name, t in start.items()
    }
    expected = image_model()
    expected.load_state_dict(mixed)
    with torch.no_grad():
        torch.testing.assert_close(
            average.module(batch()[0]), expected(batch()[0]), rtol=SAME_SUMS, atol=SAME_SUMS
        )
    weights = [dense_state_dict(net)["layer1.0.conv1.weight"] for net in (average.module, model)]
    assert not torch.equal(*weights)
