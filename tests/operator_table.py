"""A table of torch's layers, tensor operators and losses, each with what is known of it.

``RIGHT``: every derivative is right. ``FIRST``: PyTorch has no second derivative, so that those are
refused by name and all else is right. ``GRADIENTS``: the loss has none in the outputs either, so
that the Gauss-Newton matrix is refused too. ``REFUSED``: refused at construction.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from oracles import F64, draw
from torch import Tensor, nn
from torch.func import functional_call

import msif_lab as msif

RIGHT, FIRST, REFUSED = "right", "no second derivative", "refused"
GRADIENTS = "gradients alone"
COUNT = 6  # examples


@dataclass
class Entry:
    """One row of the table.

    Attributes:
        make: makes the model, or only the layer that stands between two trained ones.
        shape: of one example of the layer's input; None if ``make`` gives the whole model.
        call: how the layer is called.
        expected: one of the outcomes above.
        named: a pattern in the message of a refusal.
        x: inputs, instead of random numbers.
        y: targets, instead of random numbers.
        loss: ``(outputs, targets) -> (B,)``.
        outputs: number of outputs of the head.
    """

    make: Callable
    shape: tuple[int, ...] | None = (4,)
    call: Callable = lambda layer, z: layer(z)
    expected: str = RIGHT
    named: str = ""
    x: Tensor | None = None
    y: Tensor | None = None
    loss: Callable = msif.mean_squared_error
    outputs: int = 2

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        if self.shape is None:
            return self.make().double().eval()
        return Between(self.make(), self.shape, self.call, self.outputs).double().eval()

    def data(self) -> msif.Examples:
        x = draw(COUNT, 2, seed=4) if self.x is None else self.x
        y = draw(len(x), self.outputs, seed=5) if self.y is None else self.y
        return msif.Examples(x, y)


class Between(nn.Module):
    """A layer between two trained ones; tanh lets the second derivative of a linear one count."""

    def __init__(self, layer, shape, call, outputs):
        super().__init__()
        self.a = nn.Linear(2, math.prod(shape))
        self.layer, self.shape, self.call = layer, shape, call
        with torch.no_grad():
            self.double().eval()
            size = self.features(draw(2, 2)).shape[1]
        self.h = nn.Linear(size, outputs)

    def features(self, x):
        z = self.call(self.layer, self.a(x).unflatten(1, self.shape))
        return torch.tanh(z.flatten(1))

    def forward(self, x):
        return self.h(self.features(x))


class Function(nn.Module):
    """An operator as a layer, so that messages can name it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


# ---- Layers ----

words = torch.randint(1, 5, (COUNT, 3), generator=torch.Generator().manual_seed(6))


def lengths(layer, z):
    """A padded batch as a `PackedSequence`."""
    long = 1 + (z[:, 0, 0] > 0).long()
    packed = nn.utils.rnn.pack_padded_sequence(z, long.cpu(), True, False)
    return nn.utils.rnn.pad_packed_sequence(layer(packed)[0], True, total_length=2)[0]


class Words(nn.Module):
    """Words in, through an embedding layer of any kind."""

    def __init__(self, layer, size=6):
        super().__init__()
        self.layer, self.h = layer, nn.Linear(size, 2)

    def forward(self, x):
        return self.h(torch.tanh(self.layer(x).flatten(1)))


class Adaptive(nn.Module):
    """Its log-probabilities of all classes."""

    def __init__(self):
        super().__init__()
        self.a, self.layer = nn.Linear(2, 4), nn.AdaptiveLogSoftmaxWithLoss(4, 5, [2], div_value=2)

    def forward(self, x):
        return self.layer.log_prob(torch.tanh(self.a(x)))


def last(layer, z):
    return layer(z)[0]


def twice(layer, z):
    return layer(z, z.flip(1).sin())


def hidden(layer, z):
    return layer(z, torch.tanh(z[:, :2]))


def cell(layer, z):
    return layer(z, (z[:, :2].tanh(), z[:, 1:3]))[0]


def attention(layer, z):
    return layer(z, z.flip(1), z)[0]


def unpool(dimension):
    def call(layer, z):
        pool = getattr(F, f"max_pool{dimension}d")
        return layer(*pool(z, 2, return_indices=True))

    return call


def acts(kind, **settings):
    return Entry(lambda: kind(**settings))


LAYERS = {
    # linear
    "Identity": acts(nn.Identity),
    "Linear": Entry(lambda: nn.Linear(4, 3)),
    "Bilinear": Entry(lambda: nn.Bilinear(4, 4, 2), call=twice),
    # convolutions
    "Conv1d": Entry(lambda: nn.Conv1d(2, 2, 2), (2, 4)),
    "Conv2d": Entry(lambda: nn.Conv2d(1, 2, 2), (1, 3, 3)),
    "Conv2d grouped, reflected": Entry(
        lambda: nn.Conv2d(2, 2, 2, groups=2, padding=1, padding_mode="reflect"), (2, 2, 2)
    ),
    "Conv3d": Entry(lambda: nn.Conv3d(1, 2, 2), (1, 2, 2, 3)),
    "ConvTranspose1d": Entry(lambda: nn.ConvTranspose1d(2, 1, 2), (2, 3)),
    "ConvTranspose2d": Entry(lambda: nn.ConvTranspose2d(1, 2, 2), (1, 2, 2)),
    "ConvTranspose3d": Entry(lambda: nn.ConvTranspose3d(1, 1, 2), (1, 2, 2, 1)),
    "Unfold": Entry(lambda: nn.Unfold(2), (1, 2, 3)),
    "Fold": Entry(lambda: nn.Fold((2, 3), 2), (4, 2)),
    # pooling
    "MaxPool1d": Entry(lambda: nn.MaxPool1d(2), (2, 4)),
    "MaxPool2d": Entry(lambda: nn.MaxPool2d(2, 1), (1, 3, 3)),
    "MaxPool3d": Entry(lambda: nn.MaxPool3d(2, 1), (1, 2, 2, 3)),
    "MaxUnpool1d": Entry(lambda: nn.MaxUnpool1d(2), (1, 4), unpool(1)),
    "MaxUnpool2d": Entry(lambda: nn.MaxUnpool2d(2), (1, 2, 4), unpool(2)),
    "MaxUnpool3d": Entry(lambda: nn.MaxUnpool3d(2), (1, 2, 2, 4), unpool(3)),
    "AvgPool1d": Entry(lambda: nn.AvgPool1d(2), (2, 4)),
    "AvgPool2d": Entry(lambda: nn.AvgPool2d(2, 1), (1, 3, 3)),
    "AvgPool3d": Entry(lambda: nn.AvgPool3d(2, 1), (1, 2, 2, 3)),
    "FractionalMaxPool2d": Entry(
        lambda: nn.FractionalMaxPool2d(2, 3), (1, 5, 5), expected=REFUSED, named="deterministic"
    ),
    "FractionalMaxPool3d": Entry(
        lambda: nn.FractionalMaxPool3d(2, 3), (1, 5, 5, 5), expected=REFUSED, named="deterministic"
    ),
    "LPPool2d of odd power": Entry(
        lambda: nn.LPPool2d(3, 2), (1, 2, 4), expected=REFUSED, named="NaN"
    ),
    "LPPool1d": Entry(lambda: nn.LPPool1d(2, 2), (2, 4)),
    "LPPool2d": Entry(lambda: nn.LPPool2d(4, 2), (1, 2, 4)),
    "LPPool3d": Entry(lambda: nn.LPPool3d(2, 2), (1, 2, 2, 4)),
    "AdaptiveMaxPool1d": Entry(lambda: nn.AdaptiveMaxPool1d(2), (2, 3)),
    "AdaptiveMaxPool2d": Entry(lambda: nn.AdaptiveMaxPool2d(2), (1, 3, 3)),
    "AdaptiveMaxPool3d": Entry(lambda: nn.AdaptiveMaxPool3d((1, 2, 2)), (1, 2, 3, 2)),
    "AdaptiveAvgPool1d": Entry(lambda: nn.AdaptiveAvgPool1d(2), (2, 3)),
    "AdaptiveAvgPool2d": Entry(lambda: nn.AdaptiveAvgPool2d(2), (1, 3, 3)),
    "AdaptiveAvgPool3d": Entry(lambda: nn.AdaptiveAvgPool3d((1, 2, 2)), (1, 2, 3, 2)),
    # padding
    **{
        f"{kind}Pad{d}d": Entry(
            lambda kind=kind, d=d: getattr(nn, f"{kind}Pad{d}d")(
                1, *([0.5] if kind == "Constant" else [])
            ),
            (1, *shape),
        )
        for kind in ("Constant", "Zero", "Reflection", "Replication", "Circular")
        for d, shape in ((1, (4,)), (2, (2, 2)), (3, (2, 2, 2)))
    },
    # activations
    **{
        kind: acts(getattr(nn, kind))
        for kind in (
            "ReLU",
            "ReLU6",
            "LeakyReLU",
            "PReLU",
            "ELU",
            "SELU",
            "CELU",
            "GELU",
            "SiLU",
            "Mish",
            "Sigmoid",
            "Tanh",
            "Softplus",
            "Softsign",
            "Softshrink",
            "Hardshrink",
            "Hardtanh",
            "Hardswish",
            "Hardsigmoid",
            "LogSigmoid",
            "Tanhshrink",
            "GLU",
            "RReLU",
        )
    },
    "GELU tanh": acts(nn.GELU, approximate="tanh"),
    "ReLU in place": acts(nn.ReLU, inplace=True),
    "ELU in place": acts(nn.ELU, inplace=True),
    "SiLU in place": acts(nn.SiLU, inplace=True),
    "Threshold": acts(nn.Threshold, threshold=0.1, value=0.3),
    "Softmax": acts(nn.Softmax, dim=1),
    "Softmin": acts(nn.Softmin, dim=1),
    "LogSoftmax": acts(nn.LogSoftmax, dim=1),
    "Softmax2d": Entry(nn.Softmax2d, (2, 2, 1)),
    # norms
    "BatchNorm1d": Entry(lambda: nn.BatchNorm1d(2), (2, 3)),
    "BatchNorm2d": Entry(lambda: nn.BatchNorm2d(2), (2, 2, 2)),
    "BatchNorm3d": Entry(lambda: nn.BatchNorm3d(2), (2, 2, 1, 2)),
    "LayerNorm": Entry(lambda: nn.LayerNorm(4)),
    "RMSNorm": Entry(lambda: nn.RMSNorm(4)),
    "GroupNorm": Entry(lambda: nn.GroupNorm(2, 4), (4, 2)),
    "InstanceNorm1d": Entry(lambda: nn.InstanceNorm1d(2, affine=True), (2, 3)),
    "InstanceNorm2d": Entry(lambda: nn.InstanceNorm2d(2, affine=True), (2, 2, 2)),
    "InstanceNorm3d": Entry(lambda: nn.InstanceNorm3d(2), (2, 2, 1, 2)),
    "LocalResponseNorm": Entry(lambda: nn.LocalResponseNorm(2), (3, 2)),
    "CrossMapLRN2d": Entry(lambda: nn.CrossMapLRN2d(2), (3, 1, 1)),
    # recurrent
    "RNN": Entry(lambda: nn.RNN(2, 2, batch_first=True), (3, 2), last),
    "RNN relu": Entry(lambda: nn.RNN(2, 2, nonlinearity="relu", batch_first=True), (3, 2), last),
    "LSTM": Entry(lambda: nn.LSTM(2, 2, batch_first=True), (3, 2), last),
    "LSTM deep": Entry(
        lambda: nn.LSTM(2, 2, 2, bidirectional=True, proj_size=1, batch_first=True), (2, 2), last
    ),
    "LSTM time first": Entry(
        lambda: nn.LSTM(2, 2), (3, 2), lambda m, z: m(z.transpose(0, 1))[0].transpose(0, 1)
    ),
    "LSTM packed": Entry(lambda: nn.LSTM(2, 2, batch_first=True), (2, 2), lengths),
    "GRU": Entry(lambda: nn.GRU(2, 2, batch_first=True), (3, 2), last),
    "GRU deep": Entry(lambda: nn.GRU(2, 2, 2, bidirectional=True, batch_first=True), (2, 2), last),
    "RNNCell": Entry(lambda: nn.RNNCell(4, 2), call=hidden),
    "LSTMCell": Entry(lambda: nn.LSTMCell(4, 2), call=cell),
    "GRUCell": Entry(lambda: nn.GRUCell(4, 2), call=hidden),
    # attention
    "MultiheadAttention": Entry(
        lambda: nn.MultiheadAttention(2, 1, batch_first=True), (3, 2), attention
    ),
    "TransformerEncoderLayer": Entry(
        lambda: nn.TransformerEncoderLayer(2, 1, 2, activation="gelu", batch_first=True), (2, 2)
    ),
    "TransformerEncoder": Entry(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(2, 1, 2, batch_first=True), 1),
        (2, 2),
    ),
    "TransformerDecoderLayer": Entry(
        lambda: nn.TransformerDecoderLayer(2, 1, 2, batch_first=True), (2, 2), twice
    ),
    "TransformerDecoder": Entry(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(2, 1, 2, batch_first=True), 1),
        (2, 2),
        twice,
    ),
    "Transformer": Entry(lambda: nn.Transformer(2, 1, 1, 1, 2, batch_first=True), (2, 2), twice),
    # embeddings
    "Embedding": Entry(lambda: Words(nn.Embedding(5, 2)), None, x=words),
    "Embedding padded": Entry(lambda: Words(nn.Embedding(5, 2, padding_idx=2)), None, x=words),
    "Embedding max_norm": Entry(lambda: Words(nn.Embedding(5, 2, max_norm=0.5)), None, x=words),
    "EmbeddingBag": Entry(lambda: Words(nn.EmbeddingBag(5, 2), 2), None, x=words),
    "EmbeddingBag sum": Entry(lambda: Words(nn.EmbeddingBag(5, 2, mode="sum"), 2), None, x=words),
    "EmbeddingBag max": Entry(lambda: Words(nn.EmbeddingBag(5, 2, mode="max"), 2), None, x=words),
    "AdaptiveLogSoftmaxWithLoss": Entry(
        Adaptive,
        None,
        y=torch.arange(COUNT) % 5,
        loss=lambda z, y: F.nll_loss(z, y, reduction="none"),
    ),
    # shapes and distances
    "Flatten": Entry(nn.Flatten, (2, 2)),
    "Unflatten": Entry(lambda: nn.Unflatten(1, (2, 2))),
    "PixelShuffle": Entry(lambda: nn.PixelShuffle(2), (4, 1, 1)),
    "PixelUnshuffle": Entry(lambda: nn.PixelUnshuffle(2), (1, 2, 2)),
    "ChannelShuffle": Entry(lambda: nn.ChannelShuffle(2), (4, 1, 1)),
    "Upsample": Entry(
        lambda: nn.Upsample(scale_factor=2, mode="bicubic", align_corners=False), (1, 2, 2)
    ),
    "Upsample linear": Entry(lambda: nn.Upsample(scale_factor=2, mode="linear"), (1, 3)),
    "Upsample trilinear": Entry(
        lambda: nn.Upsample(scale_factor=2, mode="trilinear"), (1, 1, 2, 2)
    ),
    "UpsamplingNearest2d": Entry(lambda: nn.UpsamplingNearest2d(scale_factor=2), (1, 2, 2)),
    "UpsamplingBilinear2d": Entry(lambda: nn.UpsamplingBilinear2d(scale_factor=2), (1, 2, 2)),
    "CosineSimilarity": Entry(nn.CosineSimilarity, (2, 3), twice),
    "PairwiseDistance": Entry(
        nn.PairwiseDistance, (4,), lambda m, z: m(z, 2 * z.flip(1).sin())[:, None]
    ),
    # left off in eval mode
    **{
        kind: Entry(lambda kind=kind: getattr(nn, kind)(), shape)
        for kind, shape in (
            ("Dropout", (4,)),
            ("AlphaDropout", (4,)),
            ("FeatureAlphaDropout", (4,)),
            ("Dropout1d", (2, 2)),
            ("Dropout2d", (2, 1, 2)),
            ("Dropout3d", (2, 1, 1, 2)),
        )
    },
}


def expect(table: dict, outcomes: dict[str, tuple[str, str]]) -> None:
    """Set what is known of the entries that are not right by every route."""
    for name, (expected, named) in outcomes.items():
        table[name].expected, table[name].named = expected, named


expect(
    LAYERS,
    {
        "Hardsigmoid": (FIRST, "layer 'layer' (Hardsigmoid)"),
        "CrossMapLRN2d": (FIRST, "layer 'layer' (CrossMapLRN2d)"),
        "EmbeddingBag": (FIRST, "layer 'layer' (EmbeddingBag)"),
        "EmbeddingBag sum": (FIRST, "layer 'layer' (EmbeddingBag)"),
        "EmbeddingBag max": (FIRST, "layer 'layer' (EmbeddingBag)"),
        "Embedding max_norm": (REFUSED, "its parameter 'layer.weight'"),
    },
)

# ---- Operators: each a function of z (B, 4), unless it stands with another shape ----

EYE = torch.eye(2, dtype=F64)
ORDER = torch.tensor([2, 0, 3, 1])
GRID = draw(1, 2, 2, 2, seed=7).clamp(-0.9, 0.9)
CONSTANT = draw(4, 4, seed=8)


def square(z):
    """A 2×2 matrix of each example, well away from a singular one."""
    return z.unflatten(1, (2, 2)).tanh() + 3 * EYE + torch.tensor([[0.0, 1.0], [0.0, 1.5]])


def definite(z):
    m = z.unflatten(1, (2, 2))
    return m @ m.mT + EYE + torch.diag(torch.tensor([0.0, 2.0], dtype=F64))


def positive(z):
    return z.square() + 0.5


def unit(z):
    return 0.8 * torch.tanh(z)


def spectrum(z):
    return torch.complex(z[:, :2], z[:, 2:])


def parts(c):
    return torch.view_as_real(c)


def energy_gradient(z):
    """A force, −∂E/∂z, as physical models have it."""
    return torch.func.vmap(torch.func.grad(lambda r: (r.sin() * r.roll(1)).sum()))(z)


def sparse_product(z):
    return torch.sparse.mm(CONSTANT.to_sparse(), z.T).T


OPERATORS = {
    # linear algebra
    "inv": lambda z: torch.linalg.inv(square(z)),
    "pinv": lambda z: torch.linalg.pinv(square(z)),
    "solve": lambda z: torch.linalg.solve(square(z), z[:, :2]),
    "solve_triangular": lambda z: torch.linalg.solve_triangular(
        square(z).tril(), z[:, :2, None], upper=False
    ),
    "lstsq": lambda z: torch.linalg.lstsq(square(z), z[:, :2, None]).solution,
    "det": lambda z: torch.linalg.det(square(z))[:, None],
    "slogdet": lambda z: torch.linalg.slogdet(square(z))[1][:, None],
    "logdet": lambda z: torch.logdet(definite(z))[:, None],
    "cholesky": lambda z: torch.linalg.cholesky(definite(z)),
    "cholesky_solve": lambda z: torch.cholesky_solve(
        z[:, :2, None], torch.linalg.cholesky(definite(z))
    ),
    "cholesky_inverse": lambda z: torch.cholesky_inverse(torch.linalg.cholesky(definite(z))),
    "qr": lambda z: torch.linalg.qr(square(z))[1],
    "lu": lambda z: torch.linalg.lu(square(z))[2],
    "lu_solve": lambda z: torch.linalg.lu_solve(*torch.linalg.lu_factor(square(z)), z[:, :2, None]),
    "eigh": lambda z: torch.linalg.eigh(definite(z))[1].square(),
    "eigvalsh": lambda z: torch.linalg.eigvalsh(definite(z)),
    "eigvals": lambda z: parts(torch.linalg.eigvals(square(z))),
    "eig": lambda z: torch.linalg.eig(square(z))[1].abs(),
    "svd": lambda z: torch.linalg.svd(square(z))[0].square(),
    "svdvals": lambda z: torch.linalg.svdvals(square(z)),
    "matrix_exp": lambda z: torch.linalg.matrix_exp(z.unflatten(1, (2, 2))),
    "matrix_power": lambda z: torch.linalg.matrix_power(square(z) / 3, 3),
    "multi_dot": lambda z: torch.linalg.multi_dot([z, CONSTANT, CONSTANT]),
    "householder_product": lambda z: torch.linalg.householder_product(
        z.unflatten(1, (2, 2)), unit(z[:, :2])
    ),
    "trace": lambda z: square(z).diagonal(dim1=1, dim2=2).sum(1, keepdim=True),
    "triu": lambda z: square(z).triu().exp(),
    "matmul": lambda z: square(z) @ square(z.flip(1)),
    "bmm": lambda z: torch.bmm(z[:, :, None], z[:, None]),
    "baddbmm": lambda z: torch.baddbmm(square(z), square(z), square(z)),
    "einsum": lambda z: torch.einsum("bi,bj,ij->bj", z, z, CONSTANT),
    "tensordot": lambda z: torch.tensordot(z.square(), CONSTANT, 1),
    "kron": lambda z: torch.stack([torch.kron(r[:2], r[2:]) for r in z]),
    "outer": lambda z: torch.stack([torch.outer(r, r) for r in z]),
    "cross": lambda z: torch.linalg.cross(z[:, :3], z[:, 1:]),
    "vander": lambda z: torch.linalg.vander(unit(z)),
    "sparse.mm": sparse_product,
    # norms and distances
    "norm 1": lambda z: torch.linalg.vector_norm(z, 1, 1, keepdim=True),
    "norm 2": lambda z: torch.linalg.vector_norm(z, 2, 1, keepdim=True),
    "norm 3": lambda z: torch.linalg.vector_norm(z, 3, 1, keepdim=True),
    "norm inf": lambda z: torch.linalg.vector_norm(z, math.inf, 1, keepdim=True),
    "matrix_norm": lambda z: torch.linalg.matrix_norm(square(z))[:, None],
    "nuclear norm": lambda z: torch.linalg.matrix_norm(square(z), "nuc")[:, None],
    "spectral norm": lambda z: torch.linalg.matrix_norm(square(z), 2)[:, None],
    "cond": lambda z: torch.linalg.cond(square(z))[:, None],
    "normalize": lambda z: F.normalize(z),
    "renorm": lambda z: torch.renorm(z, 2, 0, 0.3),
    "cosine_similarity": lambda z: F.cosine_similarity(z[:, :2], z[:, 2:])[:, None],
    "cdist 2": lambda z: torch.cdist(z, CONSTANT),
    "cdist 1": lambda z: torch.cdist(z, CONSTANT, 1),
    "cdist 3": lambda z: torch.cdist(z, CONSTANT, 3),
    "cdist within": lambda z: torch.cdist(z.unflatten(1, (2, 2)), CONSTANT[:, :2]),
    "pdist": lambda z: torch.stack([torch.pdist(r.view(2, 2)) for r in z]),
    # special functions
    **{
        name: (lambda z, name=name, domain=domain: getattr(torch.special, name)(domain(z)))
        for name, domain in {
            "digamma": positive,
            "gammaln": positive,
            "erf": unit,
            "erfc": unit,
            "erfinv": unit,
            "erfcx": unit,
            "ndtr": unit,
            "log_ndtr": unit,
            "expit": unit,
            "expm1": unit,
            "exp2": unit,
            "log1p": positive,
            "entr": positive,
            "i0": unit,
            "i0e": unit,
            "i1": unit,
            "i1e": unit,
            "sinc": unit,
            "psi": positive,
            "bessel_j0": unit,
            "bessel_j1": unit,
            "bessel_y0": positive,
            "modified_bessel_i0": unit,
            "spherical_bessel_j0": unit,
            "airy_ai": unit,
        }.items()
    },
    "ndtri": lambda z: torch.special.ndtri(torch.sigmoid(z)),
    "logit": lambda z: torch.special.logit(torch.sigmoid(z) * 0.9),
    "polygamma": lambda z: torch.special.polygamma(1, positive(z)),
    "multigammaln": lambda z: torch.special.multigammaln(positive(z) + 1, 2),
    "gammainc": lambda z: torch.special.gammainc(positive(CONSTANT[0]), positive(z)),
    "gammainc in a": lambda z: torch.special.gammainc(positive(z), positive(CONSTANT[0])),
    "zeta in q": lambda z: torch.special.zeta(torch.tensor(2.5, dtype=F64), positive(z)),
    "zeta in x": lambda z: torch.special.zeta(1.5 + positive(z), torch.tensor(1.0, dtype=F64)),
    "xlogy": lambda z: torch.special.xlogy(z, positive(z)),
    "xlog1py": lambda z: torch.special.xlog1py(z, positive(z)),
    "logsumexp": lambda z: torch.logsumexp(z, 1, keepdim=True),
    "hermite": lambda z: torch.special.hermite_polynomial_h(z, 3),
    # elementwise
    "atan2": lambda z: torch.atan2(z, positive(z.flip(1))),
    "hypot": lambda z: torch.hypot(z, positive(z)),
    "logaddexp": lambda z: torch.logaddexp(z, z.flip(1)),
    "pow": lambda z: positive(z) ** z.flip(1),
    "fmod": lambda z: torch.fmod(z, 0.3),
    "remainder by z": lambda z: torch.remainder(3.0, positive(z)),
    "clamp": lambda z: z.clamp(-0.3, 0.4),
    "abs": lambda z: z.abs(),
    "maximum": lambda z: torch.maximum(z, z.flip(1).sin()),
    "where": lambda z: torch.where(z > 0, z.sin(), z.square()),
    "lerp": lambda z: torch.lerp(z, z.square(), z.sigmoid()),
    "addcdiv": lambda z: torch.addcdiv(z, z, positive(z), value=0.5),
    "copysign": lambda z: torch.copysign(z.square(), CONSTANT[0]),
    "nan_to_num": lambda z: torch.nan_to_num(z.sqrt() * 0 + z, 0.5),
    "nested where of nan": lambda z: torch.where(z > 0, positive(z).log(), z),
    "acosh": lambda z: torch.acosh(1 + positive(z)),
    "tan": lambda z: torch.tan(unit(z)),
    "rsqrt": lambda z: torch.rsqrt(positive(z)),
    "frac": lambda z: torch.frac(z),
    "float_power": lambda z: torch.float_power(positive(z), 1.3),
    "bernoulli weights": lambda z: z * torch.bernoulli(torch.full_like(z, 0.5)),
    # gather and scatter
    "gather": lambda z: z.gather(1, ORDER.expand(len(z), -1)).square(),
    "gather at argmax": lambda z: z.gather(1, z.argmax(1, keepdim=True)),
    "scatter": lambda z: z.scatter(1, ORDER[:2].expand(len(z), -1), z[:, :2].square()),
    "scatter_add": lambda z: z.scatter_add(1, (ORDER // 2).expand(len(z), -1), z.square()),
    **{
        f"scatter_reduce {how}": lambda z, how=how: z.scatter_reduce(
            1, (ORDER // 2).expand(len(z), -1), positive(z), how
        )
        for how in ("mean", "prod", "amax", "amin")
    },
    "index_select": lambda z: z.index_select(1, ORDER[:2]),
    "index_add": lambda z: z.index_add(1, ORDER // 2, z.square()),
    "index_copy": lambda z: z.index_copy(1, ORDER[:2], z[:, :2].square()),
    "index_fill": lambda z: z.index_fill(1, ORDER[:2], 0.3),
    "index_put": lambda z: z.index_put((torch.arange(len(z)), ORDER[[0] * len(z)]), z[:, 0] ** 2),
    "index_reduce": lambda z: z.index_reduce(1, ORDER // 2, positive(z), "prod"),
    "masked_fill": lambda z: z.masked_fill(z > 0, 0.2),
    "masked_scatter": lambda z: torch.stack([r.masked_scatter(r > 0, r.square()) for r in z]),
    "masked_select": lambda z: torch.stack(
        [r.masked_select(r > 0).square().sum()[None] for r in z]
    ),
    "boolean index": lambda z: torch.stack([r[r > 0].exp().sum()[None] for r in z]),
    "take_along_dim": lambda z: z.take_along_dim(z.argsort(1), 1)[:, :2],
    "take": lambda z: torch.stack([r.take(ORDER[:2]) for r in z]),
    "roll": lambda z: z.roll(1, 1) * z,
    "repeat_interleave": lambda z: z.repeat_interleave(2, 1),
    "segment_reduce": lambda z: (
        torch.segment_reduce(z.T.contiguous(), "mean", lengths=torch.tensor([1, 3])).T
    ),
    "one_hot": lambda z: F.one_hot(z.argmax(1), 4) * z,
    "in place": lambda z: z.clone().mul_(2).sin_().add_(z),
    "slice assigned": lambda z: assigned(z),
    # sorting and cumulative
    "sort": lambda z: z.sort(1)[0],
    "msort": lambda z: torch.msort(z.T).T,
    "topk": lambda z: z.topk(2, 1)[0],
    "kthvalue": lambda z: z.kthvalue(2, 1)[0][:, None],
    "median": lambda z: z.median(1)[0][:, None],
    "nanmedian": lambda z: z.nanmedian(1)[0][:, None],
    "mode": lambda z: z.mode(1)[0][:, None],
    "quantile": lambda z: z.quantile(0.3, 1)[:, None],
    "max": lambda z: z.max(1)[0][:, None],
    "amax": lambda z: z.amax(1, keepdim=True),
    "aminmax": lambda z: torch.stack(z.aminmax(dim=1), 1),
    "cumsum": lambda z: z.cumsum(1),
    "cumprod": lambda z: z.cumprod(1),
    "cummax": lambda z: z.cummax(1)[0],
    "cummin": lambda z: z.cummin(1)[0],
    "logcumsumexp": lambda z: z.logcumsumexp(1),
    "diff": lambda z: z.diff(dim=1),
    "trapezoid": lambda z: torch.trapezoid(z, z.cumsum(1), dim=1)[:, None],
    "gradient": lambda z: torch.gradient(z, dim=1)[0],
    # statistics
    "prod": lambda z: z.prod(1, keepdim=True),
    "std": lambda z: z.std(1, keepdim=True),
    "var": lambda z: z.var(1, keepdim=True),
    "cov": lambda z: torch.stack([torch.cov(r.view(2, 2)) for r in z]),
    "corrcoef": lambda z: torch.stack([torch.corrcoef(torch.stack([r, r**2])) for r in z]),
    "nansum": lambda z: z.nansum(1, keepdim=True).square(),
    "softmax": lambda z: z.softmax(1),
    "log_softmax": lambda z: z.log_softmax(1),
    "histc": lambda z: torch.stack([torch.histc(r, 3, -1, 1) for r in z]) + z[:, :3],
    "bucketize": lambda z: z * torch.bucketize(z, torch.tensor([0.0], dtype=F64)),
    # fft and complex intermediates
    "fft": lambda z: parts(torch.fft.fft(z)),
    "rfft": lambda z: torch.fft.rfft(z).abs(),
    "irfft": lambda z: torch.fft.irfft(torch.fft.rfft(z) ** 2),
    "fft2": lambda z: torch.fft.fft2(z.unflatten(1, (2, 2))).real,
    "hfft": lambda z: torch.fft.hfft(spectrum(z)),
    "ifftn": lambda z: parts(torch.fft.ifftn(spectrum(z), dim=1) ** 2),
    "stft": lambda z: parts(
        torch.stft(z, 4, 2, window=torch.ones(4, dtype=F64), return_complex=True)
    ),
    "istft": lambda z: torch.istft(
        torch.stft(z, 4, 2, window=torch.ones(4, dtype=F64), return_complex=True) ** 2,
        4,
        2,
        window=torch.ones(4, dtype=F64),
    ),
    "fftshift": lambda z: torch.fft.fftshift(z, 1),
    "complex exp": lambda z: parts(spectrum(z).exp()),
    "complex product": lambda z: (spectrum(z) * spectrum(z).conj().roll(1, 1)).imag,
    "angle": lambda z: spectrum(z).angle(),
    "sgn": lambda z: parts(spectrum(z).sgn()),
    "polar": lambda z: parts(torch.polar(positive(z), z)),
    "complex solve": lambda z: parts(
        torch.linalg.solve(torch.complex(square(z), square(z.flip(1))), spectrum(z))
    ),
    # images and attention
    "grid_sample": lambda z: F.grid_sample(
        z.view(-1, 1, 2, 2), GRID.expand(len(z), -1, -1, -1), align_corners=True
    ),
    "grid_sample at z": lambda z: F.grid_sample(
        CONSTANT.expand(len(z), 1, 4, 4), unit(z).view(-1, 1, 2, 2), align_corners=True
    ),
    "affine_grid": lambda z: F.affine_grid(
        torch.cat([z, z[:, :2]], 1).view(-1, 2, 3), (len(z), 1, 2, 2), align_corners=False
    ),
    "interpolate": lambda z: F.interpolate(
        z.view(-1, 1, 2, 2), (3, 3), mode="bilinear", antialias=True
    ),
    "conv2d by z": lambda z: F.conv2d(
        CONSTANT.expand(1, len(z), 4, 4), z.view(-1, 1, 2, 2), groups=len(z)
    )[0],
    "unfold": lambda z: z.unfold(1, 2, 1).prod(2),
    "attention": lambda z: F.scaled_dot_product_attention(
        *(z.unflatten(1, (2, 2)),) * 3, is_causal=True
    ),
    "bilinear": lambda z: F.bilinear(z, z, CONSTANT[None]),
    "gumbel_softmax": lambda z: F.gumbel_softmax(z),
    "dropout": lambda z: F.dropout(z),
    # derivatives inside, and cuts
    "func.grad": energy_gradient,
    "autograd.grad": lambda z: inner_grad(z),
    "detach": lambda z: z * z.detach(),
    "round": lambda z: z + torch.round(z),
    "sign straight through": lambda z: z + (z.sign() - z).detach(),
    "numpy": lambda z: z * torch.from_numpy(z.detach().numpy()),
    "item": lambda z: torch.stack([r * r[0].item() for r in z]),
    "cosine of a batch": lambda z: z - z.mean(0),
}


# The polynomials and Bessel functions have no gradient in PyTorch at all: what stands before them
# is never trained, and the rest is right.
OPERATORS = {name: Entry(lambda f=f: Function(f)) for name, f in OPERATORS.items()}
LAYER, MIXED = "layer 'layer' (Function)", "with the batch around an example"
expect(
    OPERATORS,
    {
        "segment_reduce": (FIRST, LAYER),
        "gammainc in a": (REFUSED, LAYER),
        "zeta in x": (REFUSED, LAYER),
        "remainder by z": (REFUSED, LAYER),
        "nan_to_num": (REFUSED, "NaN or inf; the reason lies in " + LAYER),
        "bernoulli weights": (REFUSED, "draws from torch's CPU generator"),
        "gumbel_softmax": (REFUSED, "draws from torch's CPU generator"),
        "dropout": (REFUSED, "draws from torch's CPU generator"),
        "detach": (REFUSED, LAYER),
        "sign straight through": (REFUSED, LAYER),
        "numpy": (REFUSED, LAYER),
        "item": (REFUSED, LAYER),
        "cosine of a batch": (REFUSED, MIXED),
    },
)


def assigned(z):
    result = torch.zeros_like(z)
    result[:, 1:] = z[:, :-1].square()
    result[:, 0] += z[:, 0]
    return result


def inner_grad(z):
    with torch.enable_grad():
        leaf = z if z.requires_grad else z.detach().requires_grad_()
        value = (leaf.sin() * leaf.roll(1, 1)).sum()
        return torch.autograd.grad(value, leaf, create_graph=True)[0]


# ---- Losses ----

LABELS = torch.arange(COUNT) % 3
SIGNS = torch.tensor([1.0, -1.0, 1.0], dtype=F64)
BITS = (draw(COUNT, 3, seed=9) > 0).double()
SHARES = draw(COUNT, 3, seed=10).softmax(1)


def mean(values):
    return values.flatten(1).mean(1)


def each(loss, **settings):
    """A loss of torch with one number per output, averaged by example."""
    return lambda z, y: mean(loss(z, y, reduction="none", **settings))


def by_label(loss, **settings):
    return lambda z, y: loss(z, y, reduction="none", **settings)


def triplet(z, y):
    return F.triplet_margin_loss(z, y, y.flip(1), margin=5.0, reduction="none")


LOSSES = {
    "msif.cross_entropy": (msif.cross_entropy, LABELS),
    "msif.mean_squared_error": (msif.mean_squared_error, None),
    "MSELoss": (each(F.mse_loss), None),
    "L1Loss": (each(F.l1_loss), None),
    "SmoothL1Loss": (each(F.smooth_l1_loss, beta=0.4), None),
    "HuberLoss": (each(F.huber_loss, delta=0.7), None),
    "CrossEntropyLoss": (by_label(F.cross_entropy), LABELS),
    "CrossEntropyLoss smoothed": (
        by_label(F.cross_entropy, label_smoothing=0.1, weight=SHARES[0]),
        LABELS,
    ),
    "CrossEntropyLoss of shares": (by_label(F.cross_entropy), SHARES),
    "NLLLoss": (lambda z, y: F.nll_loss(z.log_softmax(1), y, reduction="none"), LABELS),
    "BCELoss": (lambda z, y: mean(F.binary_cross_entropy(z.sigmoid(), y, reduction="none")), BITS),
    "BCEWithLogitsLoss": (each(F.binary_cross_entropy_with_logits, pos_weight=SHARES[0]), BITS),
    "KLDivLoss": (lambda z, y: F.kl_div(z.log_softmax(1), y, reduction="none").sum(1), SHARES),
    "PoissonNLLLoss": (each(F.poisson_nll_loss, full=True), 3 * BITS),
    "GaussianNLLLoss": (
        lambda z, y: mean(
            F.gaussian_nll_loss(z[:, :1], y[:, :1], z[:, 1:2].exp(), reduction="none")
        ),
        None,
    ),
    "HingeEmbeddingLoss": (
        lambda z, y: mean(F.hinge_embedding_loss(z.exp(), y, 3.0, reduction="none")),
        2 * BITS - 1,
    ),
    "SoftMarginLoss": (each(F.soft_margin_loss), 2 * BITS - 1),
    "MultiMarginLoss": (by_label(F.multi_margin_loss), LABELS),
    "MultiMarginLoss squared": (by_label(F.multi_margin_loss, p=2, margin=2.0), LABELS),
    "MultiLabelMarginLoss": (
        by_label(F.multilabel_margin_loss),
        torch.tensor([[0, 2, -1], [1, -1, 0]] * (COUNT // 2)),
    ),
    "MultiLabelSoftMarginLoss": (by_label(F.multilabel_soft_margin_loss), BITS),
    "MarginRankingLoss": (
        lambda z, y: F.margin_ranking_loss(
            z[:, 0], z[:, 1] ** 2, 2 * y[:, 0] - 1, margin=0.5, reduction="none"
        ),
        BITS,
    ),
    "CosineEmbeddingLoss": (
        lambda z, y: F.cosine_embedding_loss(z, y, SIGNS[:1].expand(len(z)), reduction="none"),
        None,
    ),
    "TripletMarginLoss": (triplet, None),
    "TripletMarginWithDistanceLoss": (
        lambda z, y: F.triplet_margin_with_distance_loss(
            z,
            y,
            y.flip(1),
            margin=5.0,
            reduction="none",
            distance_function=lambda a, b: (a - b).square().sum(1),
        ),
        None,
    ),
    "CTCLoss": (
        lambda z, y: F.ctc_loss(
            torch.stack([z, z.flip(1), z.roll(1, 1)]).log_softmax(2),
            y[:, None] + 1,
            torch.full((len(z),), 3),
            torch.full((len(z),), 1),
            reduction="none",
        ),
        LABELS % 2,
    ),
    "LinearCrossEntropyLoss": (
        lambda z, y: by_label(F.cross_entropy)(F.linear(z, CONSTANT[:3, :3]), y),
        LABELS,
    ),
    "focal": (
        lambda z, y: (
            (1 - (p := F.cross_entropy(z, y, reduction="none").neg().exp())) ** 2 * -p.log()
        ),
        LABELS,
    ),
    "distance to prototypes": (
        lambda z, y: torch.cdist(z, SHARES).square().gather(1, y[:, None])[:, 0],
        LABELS,
    ),
    "log cosh": (lambda z, y: mean(torch.log(torch.cosh(z - y))), None),
    "quantile": (lambda z, y: mean(torch.maximum(0.3 * (y - z), -0.7 * (y - z))), None),
    "student t": (lambda z, y: mean(torch.log1p((z - y).square())), None),
    "zero-one": (lambda z, y: (z.argmax(1) != y).double(), LABELS),
    "of the batch": (lambda z, y: mean((z - z.mean(0) - y) ** 2), None),
    "mean": (lambda z, y: F.mse_loss(z, y), None),
}


LOSSES = {name: Entry(nn.Identity, loss=f, y=y, outputs=3) for name, (f, y) in LOSSES.items()}
expect(
    LOSSES,
    {
        "MultiMarginLoss": (GRADIENTS, "multi_margin_loss_backward"),
        "MultiMarginLoss squared": (GRADIENTS, "multi_margin_loss_backward"),
        "MultiLabelMarginLoss": (GRADIENTS, "multilabel_margin_loss_backward"),
        "CTCLoss": (GRADIENTS, "ctc_loss_backward"),
        "zero-one": (REFUSED, "no trained parameter changes the loss"),
        "of the batch": (REFUSED, "mixes the examples"),
        "mean": (REFUSED, "expected a tensor (B,)"),
    },
)


# ---- The oracle: plain autograd by the module itself, and differences of its gradients ----


class Plain:
    """Derivatives of a model and its loss without the library."""

    def __init__(self, model: nn.Module, data: msif.Examples, loss: Callable):
        self.model, self.data, self.loss = model, data, loss
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def outputs(self, theta: Tensor, rows) -> Tensor:
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        named = {n: p.view(self.shapes[n]) for n, p in zip(self.shapes, parts, strict=True)}
        return functional_call(self.model, named, (self.data.x[rows],))

    def gradient(self, theta: Tensor, rows) -> Tensor:
        """Of the mean loss of these examples."""
        theta = theta.detach().requires_grad_()
        losses = self.loss(self.outputs(theta, rows), self.data.y[rows])
        return torch.autograd.grad(losses.mean(), theta, materialize_grads=True)[0]

    def gradients(self) -> Tensor:
        return torch.stack([self.gradient(self.theta, [i]) for i in range(len(self.data))])

    def difference(self, v: Tensor, rows, h: float = 1e-5) -> Tensor:
        """``∇² v`` by central differences of the gradient."""
        result = torch.zeros_like(v)
        for sign in (1, -1):
            result += sign / (2 * h) * self.gradient(self.theta + sign * h * v, rows)
        return result

    def hessian(self) -> Tensor:
        """Of the mean; parameters without any gradient are constants, as in training."""
        rows = list(range(len(self.data)))
        units = torch.diag(self.moved())
        return torch.stack([self.difference(e, rows) for e in units], 1)

    def moved(self) -> Tensor:
        """1 for what some example's gradient moves, 0 for the rest: a padding row, say."""
        return (self.gradients() != 0).any(0).double()

    def ggns(self) -> Tensor:
        """``J_iᵀ Λ_i J_i`` of each example, J row by row and Λ by differences."""
        matrices = []
        for i in range(len(self.data)):
            theta = self.theta.detach().requires_grad_()
            z = self.outputs(theta, [i])
            rows = [
                torch.autograd.grad(one, theta, retain_graph=True, materialize_grads=True)[0]
                for one in z.flatten()
            ]
            jacobian = torch.stack(rows)
            matrices.append(jacobian.T @ self._bend(z.detach(), i) @ jacobian)
        return torch.stack(matrices)

    def _bend(self, z: Tensor, i: int, h: float = 1e-4) -> Tensor:
        def slope(z):
            z = z.detach().requires_grad_()
            value = self.loss(z, self.data.y[[i]]).sum()
            return torch.autograd.grad(value, z, materialize_grads=True)[0].flatten()

        units = torch.eye(z.numel(), dtype=z.dtype).unflatten(1, z.shape)
        columns = []
        for unit in units:
            column = 2 / 3 * (slope(z + h * unit) - slope(z - h * unit))
            column -= 1 / 12 * (slope(z + 2 * h * unit) - slope(z - 2 * h * unit))
            columns.append(column / h)
        return torch.stack(columns, 1)
