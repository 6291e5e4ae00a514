"""Models that the tests share: small, each with a habit that a rewrite can trip over."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from hyperize import caching, calls, layers
from hyperize.parts import generated_layers


def accelerate(replace=setattr):
    """Has hyperize take the CPU for an accelerator, on which a call makes its weights together.

    Args:
        replace: `setattr`, or `monkeypatch.setattr`, which undoes it.
    """
    for module in (caching, calls, layers):
        replace(module, "pays", lambda tensor: True)


class CRNN(nn.Module):
    """Convolutions, then a bidirectional LSTM over the columns, as for reading text lines."""

    def __init__(self, channels=32, hidden=24):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.lstm = nn.LSTM(channels, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, 11)

    def forward(self, x):
        columns = self.trunk(x).mean(2).transpose(1, 2)  # (N, C, H, W) -> (N, W, C)
        return self.head(self.lstm(columns)[0])


class Convolutions(nn.Module):
    """Every shape of convolution: depthwise, grouped, dilated, strided, 1x7, 7x1, 1x1, padded."""

    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False)
        self.grouped = nn.Conv2d(width, 2 * width, 3, padding="same", groups=4)
        self.dilated = nn.Conv2d(2 * width, width, 3, padding=2, dilation=2)
        self.row = nn.Conv2d(width, width, (1, 7), padding=(0, 3), bias=False)
        self.column = nn.Conv2d(width, width, (7, 1), padding=(3, 0), bias=False)
        self.reflect = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")
        self.pointwise = nn.Conv2d(width, 3 * width, 1)
        self.head = nn.Linear(3 * width, 10)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        x = x + self.depthwise(x)
        x = self.dilated(F.gelu(self.grouped(x)))
        x = self.reflect(self.column(self.row(x)))
        return self.head(self.pointwise(x).mean((2, 3)))


class Untraceable(nn.Module):
    """Python control flow over the input's values, which torch.fx cannot trace."""

    def __init__(self, channels=32):
        super().__init__()
        self.a = nn.Conv2d(3, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.c = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        x = self.a(x)
        x = self.b(x) if x.mean() > 0 else self.c(x).flip(0)
        for _ in range(int(x.abs().max() > 1e-6) + 1):
            x = x + self.c(x)
        return x.mean((2, 3))


class OverChildren(nn.Module):
    """The forward runs whatever children there are, so a further child would be run too."""

    def __init__(self, channels=32):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.third = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        for child in self.children():
            x = torch.relu(child(x))
        return x


class UsedTwice(nn.Module):
    """One module instance under two names, called at both, and a third call of it by hand."""

    def __init__(self, channels=32):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 1)
        self.block = nn.Conv2d(channels, channels, 3, padding=1)
        self.same = self.block
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.last(self.block(torch.tanh(self.same(torch.tanh(self.block(self.stem(x)))))))


class Tied(nn.Module):
    """Two convolutions that hold one and the same parameter, and one of their own."""

    def __init__(self, channels=32):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.encoder = nn.Conv2d(channels, channels, 3, padding=1)
        self.decoder = nn.Conv2d(channels, channels, 3, padding=1)
        self.decoder.weight = self.encoder.weight
        self.middle = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.decoder(torch.tanh(self.middle(self.encoder(self.stem(x)))))


class Transposed(nn.Module):
    """An autoencoder of the three dimensions: Conv{1,2,3}d and ConvTranspose{1,2,3}d."""

    def __init__(self, channels=24, dims=2):
        super().__init__()
        conv = getattr(nn, f"Conv{dims}d")
        back = getattr(nn, f"ConvTranspose{dims}d")
        self.down = conv(2, channels, 3, stride=2, padding=1)
        self.mid = conv(channels, 2 * channels, 3, padding=1, groups=2)
        self.up = back(2 * channels, channels, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.out = back(channels, 2, 3, padding=1, bias=False)

    def forward(self, x):
        return self.out(torch.relu(self.up(torch.relu(self.mid(torch.relu(self.down(x)))))))


class Cells(nn.Module):
    """The three cells in a Python loop over time."""

    def __init__(self, size=24):
        super().__init__()
        self.rnn = nn.RNNCell(size, size)
        self.gru = nn.GRUCell(size, size, bias=False)
        self.lstm = nn.LSTMCell(size, size)

    def forward(self, x):
        a = b = h = c = x.new_zeros(x.shape[1:])
        for step in x:
            a = self.rnn(step, a)
            b = self.gru(a, b)
            h, c = self.lstm(b, (h, c))
        return h


class Uncopyable(nn.Module):
    """Holds something that cannot be copied, as an open file or a lock."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)

    def __deepcopy__(self, memo):
        raise RuntimeError("holds an open file")

    def forward(self, x):
        return self.conv(x)


class Stage(nn.Module):
    """A trainable model in the small: normalisation, residual, dropout, several kernel sizes."""

    def __init__(self, channels=32):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(channels, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.conv2(torch.relu(self.conv1(x)))
        return self.head(self.drop(x.mean((2, 3))))


def meta(name, **kwargs):
    """A timm model on the meta device."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def count(module):
    """Parameters of a module, shared ones counted once."""
    return sum(p.numel() for p in module.parameters())


def signature(state):
    """What has to agree between two state dicts: keys in their order, shapes, dtypes."""
    return [(name, tuple(t.shape), t.dtype) for name, t in state.items()]


def tensors(output):
    """The tensors of any nesting of lists, tuples and dicts, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    return [t for part in output for t in tensors(part)] if output is not None else []


def same(a, b):
    """Whether two outputs are equal bit for bit, dtypes and shapes included."""
    a, b = tensors(a), tensors(b)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


@torch.no_grad()
def randomise(model, seed=0):
    """Makes every part of a model matter to its output; in place, returns the model.

    timm zero-initialises the last norm of residual blocks, layer scales and gains of skip
    connections, so that whole branches add nothing at the start and parity would hold vacuously.
    Gains, biases, running statistics and other constant parameters get random values here.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(t, low, high):
        t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)

    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            uniform(buffer, -0.1, 0.1)
        elif name.endswith("running_var"):
            uniform(buffer, 0.5, 1.5)
    for name, param in model.named_parameters():
        vector = param.numel() == max(param.shape, default=1)  # also (C, 1, 1), and scalars
        constant = bool((param == param.flatten()[0]).all())
        if vector and name.endswith("bias"):
            uniform(param, -0.1, 0.1)
        elif vector and (constant or param.ndim <= 1):
            uniform(param, 0.5, 1.0)
        elif constant:
            uniform(param, -0.05, 0.05)
    return model


def over(cases):
    """Parametrizes a test over pairs of a layer's class and its flags, with readable ids."""
    return pytest.mark.parametrize(("cls", "flags"), cases, ids=_id_of)


def _id_of(value):
    if isinstance(value, type):
        return value.__name__
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


def embeddings_of(hyper):
    """The embeddings of a hyperized model by identity, one for each generated weight."""
    layers = generated_layers(hyper).values()
    return [id(layer.embedding(name)) for layer in layers for name in layer.generated]


def calls_of(hyper):
    """A list of the embeddings, by identity, that the hypernetwork is called with from now on."""
    calls = []
    hyper.hypernet.register_forward_hook(lambda module, args, output: calls.append(id(args[0])))
    return calls
