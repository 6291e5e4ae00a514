"""Layers whose forward writes their weight are found, and those that only read it are not."""

import types

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

from hyperize.source import written_parameter

PARAMS = ("weight", "bias")
WRITES, READS = [], []


def writes(cls):
    """A class for the table of those that write."""
    WRITES.append(cls)
    return cls


def reads(cls):
    """A class for the table of those that only read."""
    READS.append(cls)
    return cls


def layer_of(cls):
    if issubclass(cls, nn.Linear):
        return cls(3, 3)
    if issubclass(cls, nn.RNNBase):
        return cls(3, 3)
    return cls(3, 3, 3)


class Masked(nn.Conv2d):
    """With what the tables below use; itself it only reads."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones(3, 3, 3, 3))
        self.register_buffer("running_mean", torch.zeros(3))
        with torch.no_grad():
            self.weight.mul_(self.mask)

    def initialize(self):
        nn.init.zeros_(self.weight)


def clamp(module):
    module.weight.data.clamp_(-1, 1)


def scale(tensor, by):
    tensor *= by


def doubled(tensor):
    return tensor.mul_(2)


def copied(tensor):
    return tensor * 2


def contiguous(tensor):
    return tensor * 2


# Those that write


@writes
class DataInPlace(Masked):
    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


@writes
class DataAssigned(Masked):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1)
        return super().forward(x)


@writes
class Copied(Masked):
    def forward(self, x):
        with torch.no_grad():
            self.weight.copy_(self.weight * self.mask)
        return super().forward(x)


@writes
class PartAssigned(Masked):
    def forward(self, x):
        self.weight[:, :, 1, 1:] = 0
        return super().forward(x)


@writes
class PartOfDataAssigned(Masked):
    def forward(self, x):
        self.weight.data[:, :, 1, 1:] = 0
        return super().forward(x)


@writes
class Clamped(Masked):
    def forward(self, x):
        self.weight.data.clamp_(-1, 1)
        return super().forward(x)


@writes
class Local(Masked):
    def forward(self, x):
        w = self.weight
        w.mul_(self.mask)
        return super().forward(x)


@writes
class LocalOfLocal(Masked):
    def forward(self, x):
        w = self.weight
        v, other = w.detach().view(-1), x
        v += 1
        return super().forward(other)


@writes
class Slice(Masked):
    def forward(self, x):
        first = self.weight.data[0]
        first.zero_()
        return super().forward(x)


@writes
class Initialized(Masked):
    def forward(self, x):
        nn.init.zeros_(self.weight)
        return super().forward(x)


@writes
class Out(Masked):
    def forward(self, x):
        torch.mul(self.weight, self.mask, out=self.weight)
        return super().forward(x)


@writes
class Normalized(Masked):
    def forward(self, x):
        F.normalize(self.weight, out=self.weight)
        return super().forward(x)


@writes
class Replaced(Masked):
    def forward(self, x):
        self.weight = nn.Parameter(self.weight * self.mask)
        return super().forward(x)


@writes
class ReplacedAmongOthers(Masked):
    def forward(self, x):
        y, self.bias = x, nn.Parameter(self.bias * 2)
        return super().forward(y)


@writes
class Setattr(Masked):
    def forward(self, x):
        setattr(self, "weight", nn.Parameter(self.weight * self.mask))  # noqa: B010
        return super().forward(x)


@writes
class ObjectSetattr(Masked):
    def forward(self, x):
        super().__setattr__("weight", nn.Parameter(self.weight * 2))
        return super().forward(x)


@writes
class InParameters(Masked):
    def forward(self, x):
        self._parameters["weight"] = self.weight * self.mask
        return super().forward(x)


@writes
class Deleted(Masked):
    def forward(self, x):
        w = self.weight
        del self.weight
        return F.conv2d(x, w)


@writes
class AllParameters(Masked):
    def forward(self, x):
        for p in self.parameters():
            p.data.clamp_(-1, 1)
        return super().forward(x)


@writes
class NamedParameters(Masked):
    def forward(self, x):
        for name, p in self.named_parameters():
            if name == "weight":
                p.data = p.data * 2
        return super().forward(x)


@writes
class Comprehension(Masked):
    def forward(self, x):
        [p.data.clamp_(-1, 1) for p in self.parameters()]
        return super().forward(x)


@writes
class Foreach(Masked):
    def forward(self, x):
        torch._foreach_mul_(list(self.parameters()), 0.5)
        return super().forward(x)


@writes
class Helper(Masked):
    def forward(self, x):
        self.prepare()
        return super().forward(x)

    def prepare(self):
        self.prepare_further(2)

    def prepare_further(self, by):
        self.weight.data.mul_(by)


@writes
class HelperOfParent(Masked):
    def forward(self, x):
        self.initialize()
        return super().forward(x)


@writes
class HelperWithWeight(Masked):
    def forward(self, x):
        self.halve(tensor=self.weight)
        return super().forward(x)

    @staticmethod
    def halve(by=2, tensor=None):
        tensor.div_(by)


@writes
class TorchsHelper(Masked):
    def forward(self, x):
        self.reset_parameters()
        return super().forward(x)


@writes
class InParent(DataInPlace):
    def forward(self, x):
        return super().forward(x) + 1


@writes
class InParentByName(DataInPlace):
    def forward(self, x):
        return DataInPlace.forward(self, x) + 1


@writes
class InParentBySuperOfTwo(DataInPlace):
    def forward(self, x):
        return super(InParentBySuperOfTwo, self).forward(x) + 1  # noqa: UP008


@writes
class ConvForward(Masked):
    def _conv_forward(self, input, weight, bias):
        self.weight.data.mul_(self.mask)
        return super()._conv_forward(input, weight, bias)


@writes
class ConvForwardsArgument(Masked):
    def _conv_forward(self, input, weight, bias):
        weight.data.mul_(self.mask)
        return super()._conv_forward(input, weight, bias)


@writes
class FunctionWithSelf(Masked):
    def forward(self, x):
        clamp(self)
        return super().forward(x)


@writes
class FunctionWithWeight(Masked):
    def forward(self, x):
        scale(self.weight.data, by=self.mask)
        return super().forward(x)


@writes
class Decorated(Masked):
    @torch.no_grad()
    def forward(self, x):
        self.weight.mul_(self.mask)
        return super().forward(x)


@writes
class OneBranch(Masked):
    def forward(self, x):
        w = self.weight if self.training else self.weight * 2
        w *= self.mask
        return F.conv2d(x, w)


@writes
class Getattr(Masked):
    def forward(self, x):
        w = getattr(self, "weight", None)
        w.mul_(self.mask)
        return super().forward(x)


@writes
class SetattrByNames(Masked):
    def forward(self, x):
        for name in ("running_mean", "weight"):
            setattr(self, name, getattr(self, name) * 2)
        return super().forward(x)


@writes
class Delattr(Masked):
    def forward(self, x):
        w = self.weight
        delattr(self, "weight")
        return F.conv2d(x, w)


@writes
class BothInALoop(Masked):
    def forward(self, x):
        for p, by in [(x, 1), (self.weight, 2)]:
            p.data.mul_(by)
        return super().forward(x)


@writes
class ForeachOfBoth(Masked):
    def forward(self, x):
        torch._foreach_mul_([self.weight, self.bias], 0.5)
        return super().forward(x)


@writes
class UnboundMethod(Masked):
    def forward(self, x):
        torch.Tensor.mul_(self.weight.data, self.mask)
        return super().forward(x)


@writes
class DeletedFromParameters(Masked):
    def forward(self, x):
        del self._parameters["weight"]
        return super().forward(x)


@writes
class MaybeShared(Masked):
    def forward(self, x):
        w = self.weight.contiguous()
        w *= self.mask
        return F.conv2d(x, w)


@writes
class Cast(Masked):
    def forward(self, x):
        w = self.weight.to(x.dtype).reshape(-1).float()
        w.add_(1)
        return super().forward(x)


@writes
class Text(Masked):
    def forward(self, x):
        """A string of
        several lines.
        """
        self.weight.data *= 2
        return super().forward(x)


@writes
class LinearBias(nn.Linear):
    def forward(self, input):
        self.bias.data.zero_()
        return super().forward(input)


@pytest.mark.parametrize("cls", WRITES, ids=lambda cls: cls.__name__)
def test_a_layer_that_writes_is_found(cls):
    assert written_parameter(layer_of(cls), PARAMS).startswith("its ")


# Those that only read


@reads
class Product(Masked):
    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask)


@reads
class Clone(Masked):
    def forward(self, x):
        w = self.weight.clone()
        w *= 2
        w[0] = 0
        return F.conv2d(x, w)


@reads
class Sum(Masked):
    def forward(self, x):
        weight = self.weight + 0
        weight += 1
        weight.mul_(2)
        return F.conv2d(x, weight)


@reads
class Rebound(Masked):
    def forward(self, x):
        w = self.weight
        w = w / w.norm()
        w *= 2
        return F.conv2d(x, w)


@reads
class Buffer(Masked):
    def forward(self, x):
        self.running_mean.copy_(self.weight.mean((1, 2, 3)))
        self.mask[0] = 1
        self.mask = self.mask * 2
        return super().forward(x)


@reads
class BufferByName(Masked):
    def forward(self, x):
        for name in ("mask", "running_mean"):
            setattr(self, name, getattr(self, name).mul_(2))
        return super().forward(x)


@reads
class OtherWrittenFromIt(Masked):
    def forward(self, x):
        y = super().forward(x)
        y.add_(self.bias.view(-1, 1, 1))
        y += self.weight.sum()
        y[0] = self.bias[0]
        torch.add(y, 1, out=y)
        return y


@reads
class Zipped(Masked):
    def forward(self, x):
        for p, buffer in zip(self.parameters(), self.buffers(), strict=False):
            buffer.copy_(p)
        for i, p in enumerate(self.parameters()):
            i += p.numel()
        return super().forward(x)


@reads
class Listed(Masked):
    def forward(self, x):
        params = [self.weight, self.bias]
        params[0] = params[0] * 2
        params.pop()
        params += [x]
        return F.conv2d(x, params[0])


@reads
class OtherParameter(Masked):
    def forward(self, x):
        self._parameters["scale"] = None
        self._buffers["mask"].mul_(2)
        return super().forward(x)


@reads
class Shape(Masked):
    def forward(self, x):
        count = self.weight.numel()
        count += self.weight.shape[0]
        size = list(self.weight.shape)
        size[0] = 1
        return super().forward(x) * count


@reads
class NotReached(Masked):
    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    def clamp(self):
        self.weight.data.clamp_(-1, 1)

    def train(self, mode=True):
        self.clamp()
        return super().train(mode)


@reads
class HelperReads(Masked):
    def forward(self, x):
        w = self.product()
        w *= 2
        v = copied(self.weight)
        v *= 2
        return F.conv2d(x, w + v)

    def product(self):
        return self.weight * self.mask


@reads
class ParentsForwardIsReplaced(DataInPlace):
    def forward(self, x):
        return F.conv2d(x, self.weight)


@reads
class SkipsAParent(DataInPlace):
    def forward(self, x):
        return super(DataInPlace, self).forward(x)


@reads
class ConvForwardReads(Masked):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * self.mask, bias)


@reads
class OtherNameInside(Masked):
    def forward(self, x):
        w = self.weight

        def half(w):
            w /= 2
            return w

        return half(F.conv2d(x, w)) + sum(w.add_(1) for w in [x])


@reads
class NamedLikeAViewButCopies(Masked):
    def forward(self, x):
        w = contiguous(self.weight)
        w *= 2
        return F.conv2d(x, w)


@reads
class Recursive(Masked):
    def forward(self, x, depth=2):
        return super().forward(x) if depth == 0 else self.forward(x, depth - 1)


@reads
class LoopOverOthers(Masked):
    def forward(self, x):
        for tensor, by in [(x, self.weight), (self.mask, self.bias)]:
            tensor.mul_(by.mean())
        return super().forward(x)


@reads
class GradientsOnly(Masked):
    def forward(self, x):
        self.weight.grad = None
        for p in self.parameters():
            p.grad.zero_()
        return super().forward(x)


@reads
class WeightOfAnother(Masked):
    def __init__(self, *args):
        super().__init__(*args)
        self.inner = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        self.inner.weight.data.mul_(self.weight)
        self.inner.weight = self.weight
        setattr(self.inner, "bias", self.bias)  # noqa: B010
        return self.inner(x)


@reads
class BufferRegistered(Masked):
    def forward(self, x):
        self.register_buffer("last", self.weight)
        self.register_parameter("extra", None)
        return super().forward(x)


@reads
class EndlessCalls(Masked):
    def forward(self, x):
        return self.even(x, self.weight)

    def even(self, x, w):
        return self.odd(x, w.view(-1))

    def odd(self, x, w):
        return self.even(x, w)


@reads
class FromExec(Masked):
    exec("def forward(self, x):\n    self.weight.data *= 2")


@reads
class Lambda(Masked):
    forward = lambda self, x: self.weight.data.mul_(2)  # noqa: E731


@reads
class BuiltIn(Masked):
    forward = torch.relu


READS += [nn.Conv2d, nn.Conv1d, nn.ConvTranspose2d, nn.Linear, nn.LSTM, nn.GRU, Masked]
READS += [
    getattr(timm.layers, name)
    for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
]
READS += [timm.layers.Conv2dSame, timm.layers.CondConv2d, timm.layers.MixedConv2d]
READS += [timm.layers.GroupLinear] if hasattr(timm.layers, "GroupLinear") else []


@pytest.mark.parametrize("cls", READS, ids=lambda cls: cls.__name__)
def test_a_layer_that_only_reads_is_not_found(cls):
    layer = layer_of(cls)
    params = [name for name, _ in layer.named_parameters(recurse=False)] or ["weight"]
    assert written_parameter(layer, params) is None


# What the class does not tell


def hook(module, args, output=None):
    module.weight.data.clamp_(-1, 1)


def reading_hook(module, args, output=None):
    module.mask = module.weight * 2
    args[0].add_(1)


class Hook:
    def method(self, module, args, output=None):
        module.weight.data.mul_(2)


@pytest.mark.parametrize("written", [hook, Hook().method], ids=["function", "method"])
def test_a_hook_that_writes_is_found(written):
    conv = nn.Conv2d(3, 3, 3)
    handle = conv.register_forward_pre_hook(written)
    assert written_parameter(conv, PARAMS).startswith("its forward hook writes weight")
    handle.remove()
    assert written_parameter(conv, PARAMS) is None
    conv.register_forward_hook(written)
    assert written_parameter(conv, PARAMS).startswith("its forward hook writes weight")


def test_a_hook_that_reads_is_not_found():
    conv = Masked(3, 3, 3)
    conv.register_forward_pre_hook(reading_hook)
    conv.register_forward_hook(lambda module, args, output: output * 2)
    assert written_parameter(conv, PARAMS) is None


def test_a_forward_of_the_instance_is_read():
    conv, other = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    conv.forward = types.MethodType(DataInPlace.forward, conv)
    assert "DataInPlace.forward" in written_parameter(conv, PARAMS)
    assert written_parameter(other, PARAMS) is None
    conv.forward = types.MethodType(Product.forward, conv)
    assert written_parameter(conv, PARAMS) is None
    conv.forward = lambda x: conv.weight.data.mul_(2)
    assert written_parameter(conv, PARAMS) is None


def test_a_forward_of_the_instance_replaces_the_class():
    conv = DataInPlace(3, 3, 3)
    conv.forward = types.MethodType(Product.forward, conv)
    assert written_parameter(conv, PARAMS) is None


def test_a_function_of_the_instance_is_read():
    class CallsField(Masked):
        def forward(self, x):
            return F.conv2d(x, self.change(self.weight))

    conv = CallsField(3, 3, 3)
    conv.change = copied
    assert written_parameter(conv, PARAMS) is None
    conv.change = torch.relu
    assert written_parameter(conv, PARAMS) is None
    conv.change = doubled
    assert "(doubled, line" in written_parameter(conv, PARAMS)


# Reasons


def test_the_reason_says_where():
    line = DataInPlace.forward.__code__.co_firstlineno + 1
    assert written_parameter(DataInPlace(3, 3, 3), PARAMS) == (
        f"its forward writes weight (DataInPlace.forward, line {line}: "
        "self.weight.data *= self.mask)"
    )


def test_the_reason_names_the_function_that_writes():
    line = clamp.__code__.co_firstlineno + 1
    assert written_parameter(FunctionWithSelf(3, 3, 3), PARAMS) == (
        f"its forward writes weight (clamp, line {line}: module.weight.data.clamp_(-1, 1))"
    )


def test_the_reason_names_what_is_written():
    assert "writes bias and weight (" in written_parameter(AllParameters(3, 3, 3), PARAMS)
    many = written_parameter(AllParameters(3, 3, 3), (*PARAMS, "scale"))
    assert "writes its parameters (" in many


@pytest.mark.parametrize("cls", [Text, Decorated])
def test_the_line_is_that_of_the_file(cls):
    where = written_parameter(cls(3, 3, 3), PARAMS).partition("line ")[2]
    number, _, code = where.rstrip(")").partition(": ")
    with open(__file__) as file:
        assert code.rstrip(")") in file.readlines()[int(number) - 1]


def test_only_the_parameters_asked_for_count():
    assert written_parameter(LinearBias(3, 3), ["weight"]) is None
    assert "writes bias" in written_parameter(LinearBias(3, 3), ["bias"])
    assert written_parameter(DataInPlace(3, 3, 3), []) is None


def test_recurrent_weights_by_name():
    class Dropped(nn.LSTM):
        def forward(self, x):
            for name in ("weight_hh_l0", "bias_hh_l0"):
                getattr(self, name).data.mul_(0.5)
            return super().forward(x)

    assert "writes weight_hh_l0 (" in written_parameter(
        Dropped(3, 3), ["weight_ih_l0", "weight_hh_l0"]
    )
    assert written_parameter(Dropped(3, 3), ["weight_ih_l0"]) is None


def test_nothing_is_run_and_nothing_changes():
    conv = DataAssigned(3, 3, 3)
    before = {name: (value, value.clone()) for name, value in conv.state_dict().items()}
    fields = dict(vars(conv))
    written_parameter(conv, PARAMS)
    assert vars(conv) == fields
    for name, value in conv.state_dict().items():
        assert value.data_ptr() == before[name][0].data_ptr()
        assert torch.equal(value, before[name][1])
