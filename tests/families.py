"""Small architectures of every kind, and the data that go with them.

`ARCHITECTURES` maps names to `Architecture`; each net ends in a `Linear` called ``head``, so that
two of them can be linked. Layers that PyTorch has no module for are written out here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from oracles import draw
from torch import nn

import msif_lab as msif

SHAPES = {"flat": (5,), "steps": (4, 3), "line": (2, 6), "map": (2, 4, 4), "words": (5,)}
SHAPES |= {"picture": (3, 16, 16), "thumbnail": (3, 8, 8)}
VOCABULARY = 7


@dataclass
class Architecture:
    """A net of this kind for any number of outputs, and the kind of its inputs.

    Attributes:
        ready: whether its weights are used as they are made.
    """

    inputs: str
    make: Callable[[int], nn.Module]
    ready: bool = False


class Net(nn.Module):
    """A body that gives ``width`` features, and a head."""

    def __init__(self, body, width, outputs, bias=True):
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, outputs, bias)

    def forward(self, x):
        return self.head(self.body(x))


class Do(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def seq(*layers):
    return nn.Sequential(
        *(layer if isinstance(layer, nn.Module) else Do(layer) for layer in layers)
    )


class Sum(nn.Module):
    """Branches added to each other; with ``combine`` put together in another way."""

    def __init__(self, *branches, combine=None):
        super().__init__()
        self.branches = nn.ModuleList(b if isinstance(b, nn.Module) else Do(b) for b in branches)
        self.combine = combine or (lambda *z: sum(z))

    def forward(self, x):
        return self.combine(*(branch(x) for branch in self.branches))


class Twice(nn.Module):
    """A module called two times."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return torch.tanh(self.module(torch.tanh(self.module(x))))


class TiedWeights(nn.Module):
    """The second layer is the transpose of the first."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x):
        return torch.tanh(torch.tanh(self.a(x)) @ self.a.weight)


class SharedParameter(nn.Module):
    """Two modules that hold one and the same parameter."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight

    def forward(self, x):
        return torch.tanh(self.b(torch.tanh(self.a(x))))


class HandScaled(nn.Module):
    """Weights normalised by hand, as weight standardisation and equalised rates do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        weight = self.weight / self.weight.norm(dim=1, keepdim=True)
        return torch.tanh(self.scale * x @ weight.T)


class ZeroDim(nn.Module):
    def __init__(self, module, value=1.3):
        super().__init__()
        self.module, self.scale = module, nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return self.scale * self.module(x)


class Experts(nn.Module):
    """A mixture of experts: soft, or each example by its best expert alone."""

    def __init__(self, hard):
        super().__init__()
        self.gate, self.hard = nn.Linear(5, 2), hard
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

    def forward(self, x):
        share = self.gate(x).softmax(1)
        if not self.hard:
            parts = [torch.tanh(expert(x)) for expert in self.experts]
            return (torch.stack(parts, 2) * share[:, None]).sum(2)
        best = share.argmax(1)
        result = x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            rows = (best == i).nonzero().flatten()
            if len(rows):
                part = torch.tanh(expert(x[rows])) * share[rows, i : i + 1]
                result = result.index_add(0, rows, part)
        return result


class ItemMask(nn.Module):
    """Reads numbers out of tensors to decide what each example gets."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        rows = [self.a(row) if row[0].item() > 0 else self.b(row) for row in x]
        return torch.tanh(torch.stack(rows))


class SortedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 4)

    def forward(self, x):
        order = x[:, 0].argsort(descending=True)
        return torch.tanh(self.a(x[order]))[order.argsort()]


class TimeFirst(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        z = self.layer(x.transpose(0, 1))
        return torch.tanh(z[0] if isinstance(z, tuple) else z).mean(0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 2, batch_first=True)
        self.into = nn.Linear(3, 2)

    def forward(self, x):
        x = self.into(x)
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


class OwnAttention(nn.Module):
    """One causal head without a fused kernel."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 3, bias=False) for _ in range(3))

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 3**0.5
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return (scores.masked_fill(mask, -torch.inf).softmax(-1) @ self.v(x)).mean(1)


class FusedAttention(OwnAttention):
    def forward(self, x):
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(1)


class Last(nn.Module):
    """The last step of a recurrent net."""

    def __init__(self, cells):
        super().__init__()
        self.cells = cells

    def forward(self, x):
        return self.cells(x)[0][:, -1]


class Recurrence(nn.Module):
    """A cell called at each step."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(3 + 3, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(torch.cat([x[:, t], h], 1)))
        return h


class Cosine(nn.Module):
    """Similarities to learned directions."""

    def __init__(self):
        super().__init__()
        self.directions = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return 2 * F.cosine_similarity(x[:, None] + 0.1, self.directions[None], dim=2)


class Radial(nn.Module):
    def __init__(self, distance):
        super().__init__()
        self.centres, self.distance = nn.Parameter(torch.randn(4, 5)), distance

    def forward(self, x):
        return torch.exp(-self.distance(x, self.centres) / 5)


class Positions(nn.Module):
    """Learned positions added to the steps."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(0.5 * torch.randn(4, 3))
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.layer(x + self.positions)).mean(1)


class Hooked(nn.Module):
    """A hook that changes what a layer gives."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 4)
        self.a.register_forward_hook(lambda module, given, z: z * 1.5)

    def forward(self, x):
        return torch.tanh(self.a(x))


class LowRankProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 5))

    def forward(self, x):
        return torch.tanh(x @ (self.u @ self.v).T)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Bilinear(2, 3, 3)

    def forward(self, x):
        return self.both(x[:, :2], x[:, 2:])


class Buffered(nn.Module):
    """Constants in buffers, one of them an integer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 4)
        self.register_buffer("shift", torch.linspace(-1, 1, 5))
        self.register_buffer("order", torch.tensor([3, 0, 1, 2]))

    def forward(self, x):
        return torch.tanh(self.a(x + self.shift))[:, self.order]


class Pooled(nn.Module):
    """Steps weighted by learned attention."""

    def __init__(self):
        super().__init__()
        self.score, self.layer = nn.Linear(3, 1), nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh((self.score(x).softmax(1) * self.layer(x)).sum(1))


class Parametrised(nn.Module):
    """A weight that is computed from another by `torch.nn.utils.parametrize`."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        nn.utils.parametrize.register_parametrization(self.a, "weight", Do(lambda w: w.triu()))

    def forward(self, x):
        return torch.tanh(self.a(x[:, :4]))


class Loop(nn.Module):
    """Parameters in a list."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(0.6 * torch.randn(5, 5) for _ in range(2))

    def forward(self, x):
        for weight in self.weights:
            x = torch.sin(x @ weight)
        return x


class Functional(nn.Module):
    """Weights used by functions, never by a module's own call."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 4)

    def forward(self, x):
        return torch.tanh(F.linear(x, self.a.weight, self.a.bias))


class SoftmaxOnly(nn.Linear):
    """Nothing but a head; a linear model."""

    def __init__(self, outputs):
        super().__init__(5, outputs)
        self.head = nn.Identity()

    def forward(self, x):
        return super().forward(self.head(x))


ACTIVATIONS = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "relu, a module in place": lambda: nn.ReLU(inplace=True),
    "relu, a function in place": lambda: Do(lambda x: F.relu(x, inplace=True)),
    "elu, a function in place": lambda: Do(lambda x: F.elu(x, inplace=True)),
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "silu, in place": lambda: nn.SiLU(inplace=True),
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "sigmoid": nn.Sigmoid,
    "log-sigmoid": nn.LogSigmoid,
    "leaky relu": lambda: nn.LeakyReLU(0.1),
    "leaky relu in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "softshrink": lambda: nn.Softshrink(0.1),
    "tanhshrink": nn.Tanhshrink,
    "threshold": lambda: nn.Threshold(0.1, 0.0),
    "rrelu": nn.RReLU,
    "prelu": nn.PReLU,
    "prelu, one per channel": lambda: nn.PReLU(4),
    "sine": lambda: Do(torch.sin),
    "square": lambda: Do(torch.square),
    "softmax": lambda: nn.Softmax(1),
    "swish by hand": lambda: Do(lambda x: x * torch.sigmoid(1.5 * x)),
    "tanh in place": lambda: Do(lambda x: x.tanh_()),
    "gaussian": lambda: Do(lambda x: torch.exp(-x.square())),
}


def mean(x):
    """The mean over all but examples and channels."""
    return x.flatten(2).mean(2)


def mean_of_steps(x):
    return x.mean(1)


def conv(kind=nn.Conv2d, into=2, out=4, kernel=2, **settings):
    return kind(into, out, kernel, **settings)


def words(*layers, **settings):
    return seq(nn.Embedding(VOCABULARY, 3, **settings), *layers)


def frozen(body, part):
    """A body of which one part is not trained."""
    for parameter in body.get_submodule(part).parameters():
        parameter.requires_grad_(False)
    return body


def squared_distances(x, centres):
    return (x[:, None] - centres).square().sum(2)


def encoder():
    layer = nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=True, norm_first=True)
    return seq(nn.Linear(3, 2), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


# By the kind of inputs: name -> (body, features); functions, since each net needs its own body.
BODIES = {
    "flat": {
        "nothing": (nn.Identity, 5),
        "two layers": (lambda: seq(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softplus()), 3),
        "three layers": (
            lambda: seq(
                nn.Linear(5, 3), *(m for _ in range(2) for m in (nn.Linear(3, 3), nn.Tanh()))
            ),
            3,
        ),
        "linear layers only": (lambda: seq(nn.Linear(5, 3), nn.Linear(3, 4)), 4),
        "wide": (lambda: seq(nn.Linear(5, 9), nn.GELU()), 9),
        "no bias": (lambda: seq(nn.Linear(5, 4, bias=False), nn.Tanh()), 4),
        "layer norm": (lambda: seq(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh()), 4),
        "layer norm without weights": (
            lambda: seq(nn.Linear(5, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Tanh()),
            4,
        ),
        "rms norm": (lambda: seq(nn.Linear(5, 4), nn.RMSNorm(4), nn.Tanh()), 4),
        "batch norm": (lambda: seq(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()), 4),
        "batch norm, in place": (
            lambda: seq(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True)),
            4,
        ),
        "batch norm without weights": (
            lambda: seq(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh()),
            4,
        ),
        "group norm": (lambda: seq(nn.Linear(5, 4), nn.GroupNorm(2, 4), nn.Tanh()), 4),
        "dropout off": (lambda: seq(nn.Linear(5, 4), nn.Dropout(0.5), nn.Tanh()), 4),
        "residual": (lambda: seq(Sum(nn.Identity(), seq(nn.Linear(5, 5), nn.Tanh()))), 5),
        "residual, in place": (
            lambda: Sum(nn.Identity(), seq(nn.Linear(5, 5), lambda x: F.relu(x, inplace=True))),
            5,
        ),
        "dense connections": (
            lambda: Sum(
                nn.Identity(),
                seq(nn.Linear(5, 3), nn.Tanh()),
                combine=lambda a, b: torch.cat([a, b], 1),
            ),
            8,
        ),
        "gating": (
            lambda: Sum(
                nn.Linear(5, 4),
                seq(nn.Linear(5, 4), nn.Sigmoid()),
                combine=lambda a, b: a * b,
            ),
            4,
        ),
        "glu": (lambda: seq(nn.Linear(5, 8), nn.GLU()), 4),
        "highway": (
            lambda: Sum(
                seq(nn.Linear(5, 5), nn.Tanh()),
                seq(nn.Linear(5, 5), nn.Sigmoid()),
                nn.Identity(),
                combine=lambda h, t, x: t * h + (1 - t) * x,
            ),
            5,
        ),
        "maxout": (lambda: seq(nn.Linear(5, 8), lambda x: x.unflatten(1, (4, 2)).amax(2)), 4),
        "squeeze and excite": (
            lambda: seq(
                nn.Linear(5, 4),
                Sum(
                    nn.Identity(),
                    seq(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4), nn.Sigmoid()),
                    combine=torch.mul,
                ),
            ),
            4,
        ),
        "soft experts": (lambda: Experts(hard=False), 3),
        "routed experts": (lambda: Experts(hard=True), 3),
        "masked by item": (ItemMask, 3),
        "sorted batch": (SortedBatch, 4),
        "no dimensions": (lambda: ZeroDim(seq(nn.Linear(5, 4), nn.Tanh())), 4),
        "tied weights": (TiedWeights, 5),
        "shared parameter": (SharedParameter, 5),
        "module used twice": (lambda: Twice(nn.Linear(5, 5)), 5),
        "scaled by hand": (HandScaled, 4),
        "cosine": (Cosine, 4),
        "radial": (lambda: Radial(squared_distances), 4),
        "hook": (Hooked, 4),
        "low rank": (LowRankProduct, 4),
        "bilinear": (Bilinear, 3),
        "buffers": (Buffered, 4),
        "parametrised": (Parametrised, 4),
        "parameter list": (Loop, 5),
        "functional weights": (Functional, 4),
        "frozen layer": (
            lambda: frozen(seq(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()), "0"),
            4,
        ),
        "fourier": (lambda: seq(nn.Linear(5, 4), lambda x: torch.fft.rfft(x).abs()), 3),
        "products": (lambda: seq(nn.Linear(5, 4), lambda x: x.cumprod(1)), 4),
        "log-sum-exp": (lambda: seq(nn.Linear(5, 8), lambda x: x.view(-1, 4, 2).logsumexp(2)), 4),
    },
    "steps": {
        "one layer at each step": (lambda: seq(nn.Linear(3, 4), nn.Tanh(), mean_of_steps), 4),
        "time first": (lambda: TimeFirst(nn.Linear(3, 4)), 4),
        "own recurrence": (Recurrence, 3),
        "recurrent": (lambda: Last(nn.RNN(3, 3, batch_first=True)), 3),
        "gru": (lambda: Last(nn.GRU(3, 2, batch_first=True)), 2),
        "lstm": (lambda: Last(nn.LSTM(3, 2, batch_first=True)), 2),
        "gru, time first": (lambda: TimeFirst(nn.GRU(3, 2)), 2),
        "attention": (Attention, 2),
        "own attention": (OwnAttention, 3),
        "fused attention": (FusedAttention, 3),
        "transformer": (lambda: seq(encoder(), mean_of_steps), 2),
        "positions": (Positions, 3),
        "pooled by attention": (Pooled, 3),
        "layer norm over steps": (lambda: seq(nn.LayerNorm([4, 3]), nn.Flatten()), 12),
    },
    "line": {
        "conv1d": (lambda: seq(conv(nn.Conv1d), nn.Tanh(), mean), 4),
        "conv1d, dilated": (lambda: seq(conv(nn.Conv1d, dilation=2), nn.Tanh(), mean), 4),
        "conv1d, groups": (lambda: seq(conv(nn.Conv1d, groups=2), nn.Tanh(), mean), 4),
        "conv1d, circular": (
            lambda: seq(conv(nn.Conv1d, padding=1, padding_mode="circular"), nn.Tanh(), mean),
            4,
        ),
        "conv1d, pooled": (
            lambda: seq(conv(nn.Conv1d, out=3), nn.MaxPool1d(2), nn.Tanh(), nn.Flatten()),
            6,
        ),
        "transposed conv1d": (lambda: seq(conv(nn.ConvTranspose1d), nn.Tanh(), mean), 4),
        "norms on a line": (
            lambda: seq(conv(nn.Conv1d), nn.BatchNorm1d(4), nn.Tanh(), nn.GroupNorm(1, 4), mean),
            4,
        ),
    },
    "map": {
        "conv2d": (lambda: seq(conv(), nn.Tanh(), mean), 4),
        "conv2d, in place": (lambda: seq(conv(), nn.ReLU(inplace=True), mean), 4),
        "conv2d, strides": (lambda: seq(conv(out=3, stride=2, padding=1), nn.Tanh(), mean), 3),
        "conv2d, dilated": (lambda: seq(conv(dilation=2), nn.Tanh(), mean), 4),
        "conv2d, same": (lambda: seq(conv(padding="same"), nn.Tanh(), mean), 4),
        "conv2d, groups": (lambda: seq(conv(groups=2), nn.Tanh(), mean), 4),
        "conv2d, separable": (
            lambda: seq(conv(out=2, groups=2), nn.Tanh(), conv(out=4, kernel=1), nn.Tanh(), mean),
            4,
        ),
        "conv2d, circular": (
            lambda: seq(conv(out=3, padding=1, padding_mode="circular"), nn.Tanh(), mean),
            3,
        ),
        "conv2d, reflect": (
            lambda: seq(conv(out=3, padding=1, padding_mode="reflect"), nn.Tanh(), mean),
            3,
        ),
        "conv2d, replicate": (
            lambda: seq(conv(out=3, padding=1, padding_mode="replicate"), nn.Tanh(), mean),
            3,
        ),
        "conv2d, no bias": (lambda: seq(conv(bias=False), nn.Tanh(), mean), 4),
        "conv2d, pooled": (
            lambda: seq(conv(out=2, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
            8,
        ),
        "conv2d, norms": (
            lambda: seq(conv(out=4), nn.BatchNorm2d(4), nn.Tanh(), nn.GroupNorm(2, 4), mean),
            4,
        ),
        "conv2d, instance norm": (
            lambda: seq(conv(), nn.InstanceNorm2d(4, affine=True), nn.SiLU(), mean),
            4,
        ),
        "conv2d, frozen": (
            lambda: frozen(seq(conv(out=3), nn.Tanh(), conv(into=3), mean), "0"),
            4,
        ),
        "conv2d, residual": (
            lambda: seq(
                Sum(nn.Identity(), seq(conv(out=2, padding="same"), nn.ReLU(inplace=True))), mean
            ),
            2,
        ),
        "transposed conv2d": (
            lambda: seq(conv(nn.ConvTranspose2d), nn.Tanh(), mean),
            4,
        ),
        "pixel shuffle": (
            lambda: seq(conv(out=4), nn.PixelShuffle(2), nn.Tanh(), nn.AvgPool2d(3), nn.Flatten()),
            4,
        ),
    },
    "words": {
        "embedding": (lambda: words(nn.Tanh(), mean_of_steps), 3),
        "padding": (lambda: words(mean_of_steps, nn.Tanh(), padding_idx=0), 3),
        "padding and a layer": (
            lambda: words(nn.Linear(3, 3), nn.Tanh(), mean_of_steps, padding_idx=0),
            3,
        ),
        "text convolution": (
            lambda: words(
                nn.Tanh(),
                lambda x: x.transpose(1, 2),
                conv(nn.Conv1d, 3, 3, padding=1),
                mean,
                padding_idx=0,
            ),
            3,
        ),
        "frozen words": (lambda: frozen(words(nn.Linear(3, 4), nn.Tanh(), mean_of_steps), "0"), 4),
        "words and attention": (lambda: words(OwnAttention(), padding_idx=0), 3),
        "words and gru": (lambda: words(Last(nn.GRU(3, 2, batch_first=True))), 2),
    },
}


def _architectures():
    found = {}
    for inputs, bodies in BODIES.items():
        for name, (body, width) in bodies.items():
            found[name] = Architecture(inputs, lambda n, b=body, w=width: Net(b(), w, n))
    for name, activation in ACTIVATIONS.items():
        found[name] = Architecture(
            "flat", lambda n, a=activation: Net(seq(nn.Linear(5, 4), a()), 4, n)
        )
    found["softmax regression"] = Architecture("flat", SoftmaxOnly)
    found["no bias at all"] = Architecture(
        "flat", lambda n: Net(seq(nn.Linear(5, 4, bias=False), nn.Tanh()), 4, n, bias=False)
    )
    return found


ARCHITECTURES = _architectures()


def _block(kind, activation, bias, width):
    """One block from features to as many features."""
    layer = nn.Linear(width, width, bias)
    act = ACTIVATIONS[activation]() if "channel" not in activation else nn.PReLU(width)
    if kind == "norm":
        return seq(layer, nn.LayerNorm(width), act)
    if kind == "residual":
        return Sum(nn.Identity(), seq(layer, act))
    if kind == "gate":
        gate = seq(nn.Linear(width, width), nn.Sigmoid())
        return Sum(seq(layer, act), gate, combine=torch.mul)
    if kind == "scaled":
        return ZeroDim(seq(layer, act))
    if kind == "tied":
        return Twice(layer)
    return seq(layer, act)


def assembled(description):
    """The architecture of a description that hypothesis drew."""
    width = 3
    into = {
        "flat": lambda: seq(nn.Linear(5, width), nn.Tanh()),
        "steps": lambda: seq(nn.Linear(3, width), mean_of_steps),
        "map": lambda: seq(conv(out=width, stride=2), nn.Softplus(), mean),
        "words": lambda: words(mean_of_steps, padding_idx=0),
    }[description["inputs"]]

    def make_net(outputs):
        first = into()
        if description["frozen"]:
            for parameter in first.parameters():
                parameter.requires_grad_(False)
        blocks = [_block(*block, width) for block in description["blocks"]]
        return Net(seq(first, *blocks), width, outputs)

    return Architecture(description["inputs"], make_net)


def random_weights(model, seed):
    """Move all weights and running statistics off the special values they start at."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.15 * noise)
        for name, buffer in model.named_buffers():
            if "running" in name:
                noise = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.copy_(0.5 + noise)
    return model.double().eval()


def make(name, outputs, seed):
    torch.manual_seed(seed)
    kind = (ARCHITECTURES | OUTSIDE)[name]
    model = kind.make(outputs)
    return model.double().eval() if kind.ready else random_weights(model, seed)


# ---- Models of others, of which so little is trained that every derivative can be differenced ----


def partly(body, width, outputs, inputs, trained):
    """A model of others as the body of a `Net`; only parameters with these endings are trained."""
    net = Net(body, width, outputs).double()
    with torch.no_grad():
        for parameter in net.parameters():  # off the special values that they start at
            parameter.add_(0.02 * torch.randn_like(parameter))
        if inputs != "words":
            for seed in range(5):  # running statistics as after training
                net.train()(draw(8, *SHAPES[inputs], seed=100 + seed))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
    return net


def resnet18(outputs):
    body = torchvision.models.resnet18()
    body.fc = nn.Identity()
    return partly(body, 512, outputs, "picture", ("body.bn1.bias", "head.bias"))


def mobilenet_v2(outputs):
    body = torchvision.models.mobilenet_v2(width_mult=0.1)
    body.classifier = nn.Identity()
    trained = ("features.0.1.weight", "features.2.conv.1.1.bias", "head.bias")
    return partly(body, 1280, outputs, "picture", trained)


def vision_transformer(outputs):
    body = torchvision.models.VisionTransformer(8, 4, 2, 2, 4, 6)
    body.heads = nn.Identity()
    trained = ("layer_0.self_attention.in_proj_weight", "layer_1.mlp.0.weight", "class_token")
    return partly(body, 4, outputs, "thumbnail", (*trained, "head.weight", "head.bias"))


class Language(nn.Module):
    """The mean feature over words that are not padding."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        kept = ids != 0
        features = self.model(ids, attention_mask=kept.long()).last_hidden_state
        return (features * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)


def hugging_face(name, settings, trained):
    def build(outputs):
        import transformers

        kind = getattr(transformers, name)
        config = kind.config_class(vocab_size=VOCABULARY, pad_token_id=0, **settings)
        config.use_cache = False
        body = Language(kind(config))
        return partly(body, 4, outputs, "words", (*trained, "head.weight", "head.bias"))

    return Architecture("words", build, ready=True)


OUTSIDE = {
    "resnet18": Architecture("picture", resnet18, ready=True),
    "mobilenet_v2": Architecture("picture", mobilenet_v2, ready=True),
    "VisionTransformer": Architecture("thumbnail", vision_transformer, ready=True),
    "GPT-2": hugging_face(
        "GPT2Model",
        {"n_positions": 8, "n_embd": 4, "n_layer": 2, "n_head": 2, "bos_token_id": 1},
        ("h.0.attn.c_attn.weight", "h.1.mlp.c_fc.bias", "wpe.weight"),
    ),
    "DistilBERT": hugging_face(
        "DistilBertModel",
        {"max_position_embeddings": 8, "dim": 4, "n_layers": 2, "n_heads": 2, "hidden_dim": 6},
        ("layer.0.attention.q_lin.weight", "layer.1.ffn.lin1.weight", "word_embeddings.weight"),
    ),
}


# ---- Losses ----


def smoothed(z, y):
    """Cross-entropy with smoothed labels."""
    log_p = z.log_softmax(1)
    return -0.9 * log_p.gather(1, y[:, None])[:, 0] - 0.1 * log_p.mean(1)


def focal(z, y):
    log_p = z.log_softmax(1).gather(1, y[:, None])[:, 0]
    return -((1 - log_p.exp()) ** 2) * log_p


def log_cosh(z, y):
    return torch.log(torch.cosh(z - y)).sum(1)


def poisson(z, y):
    return (z.exp() - y * z).sum(1)


LOSSES = {
    "cross-entropy": (msif.cross_entropy, 3, True),
    "squared error": (msif.mean_squared_error, 2, False),
    "squared error of one output": (msif.mean_squared_error, 1, False),
    "smoothed": (smoothed, 3, True),
    "focal": (focal, 3, True),
    "log-cosh": (log_cosh, 2, False),
    "poisson": (poisson, 2, False),
}

# ---- Data ----

VARIANTS = ("plain", "duplicates", "blank rows", "few classes")


def examples(inputs, n, loss, seed, variant="plain"):
    """Random examples of a kind; ``variant`` is what is odd about them."""
    _, outputs, classes = LOSSES[loss]
    if inputs == "words":
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(1, VOCABULARY, (n, *SHAPES[inputs]), generator=generator)
        for i in range(n):
            x[i, 5 - i % 4 :] = 0
    else:
        x = draw(n, *SHAPES[inputs], seed=seed)
    y = torch.arange(n) % outputs if classes else draw(n, outputs, seed=seed + 1).abs()
    if variant == "duplicates":
        x[1], y[1] = x[0], y[0]
    elif variant == "blank rows":
        x[:2] = 0
    elif variant == "few classes" and classes:
        y = y.clamp(max=1)
    return msif.Examples(x, y)
