"""The models that whole-model tests run: small ones, of every kind.

``CASES`` maps a name to a function that builds a ``Case`` (in float32; tests cast it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from reference import ctc_loss
from torch import distributions as D
from torch import nn
from torch.nn.utils import parametrizations


@dataclass
class Case:
    model: nn.Module
    loss: Callable | None = None
    inputs: tuple = ()
    targets: tuple = ()
    kwargs: dict = field(default_factory=dict)
    random: bool = False  # the forward draws random numbers
    # The same mathematics for the reference, where torch.export cannot capture the original.
    reference_loss: Callable | None = None
    low_precision: bool = True  # no tie and no kink decides in bfloat16
    tolerance: float = 1e-9


CASES: dict[str, Callable[[], Case]] = {}


def case(name: str):
    def add(build):
        assert name not in CASES, name
        CASES[name] = build
        return build

    return add


def _labels(n, classes, *shape):
    return torch.randint(classes, (n, *shape))


class Scalar(nn.Module):
    """A model that returns its own loss: the mean square of what ``body`` returns."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, *args, **kwargs):
        out = self.body(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return (out - 0.3).square().mean()


# ------------------------------------------------------------------ activations

ACTIVATIONS = [
    nn.ELU(), nn.ELU(0.7), nn.Hardshrink(0.2), nn.Hardsigmoid(), nn.Hardtanh(-0.3, 0.4),
    nn.Hardswish(), nn.LeakyReLU(0.1), nn.LogSigmoid(), nn.PReLU(), nn.PReLU(6), nn.ReLU(),
    nn.ReLU6(), nn.RReLU(), nn.RReLU().eval(), nn.SELU(), nn.CELU(0.8), nn.GELU(),
    nn.GELU("tanh"), nn.Sigmoid(), nn.SiLU(), nn.Mish(), nn.Softplus(), nn.Softplus(2.0, 1.0),
    nn.Softshrink(0.2), nn.Softsign(), nn.Tanh(), nn.Tanhshrink(), nn.Threshold(0.1, -0.2),
    nn.GLU(), nn.Softmin(-1), nn.Softmax(-1), nn.LogSoftmax(-1), nn.ReLU(inplace=True),
    nn.SiLU(inplace=True),
]  # fmt: skip


def _mlp(activation, classes=3):
    width = 3 if isinstance(activation, nn.GLU) else 6
    return nn.Sequential(
        nn.Linear(5, 6), activation, nn.Linear(width, 6), activation, nn.Linear(width, classes)
    )


def _activation_case(activation):
    def build():
        random = isinstance(activation, nn.RReLU) and activation.training
        return Case(
            _mlp(activation),
            nn.CrossEntropyLoss(),
            (torch.randn(4, 5),),
            (_labels(4, 3),),
            random=random,
            low_precision=not isinstance(activation, (nn.Threshold, nn.Hardshrink)),
            # torch's hardsigmoid_backward multiplies by a float32 1/6 in float64 too
            tolerance=1e-6 if isinstance(activation, nn.Hardsigmoid) else 1e-9,
        )

    return build


for _a in ACTIVATIONS:
    _mode = "" if _a.training else "-eval"
    CASES[f"mlp-{_a}{_mode}"] = _activation_case(_a)


@case("mlp-Softmax2d")
def _():
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Softmax2d(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(12, 3)
    )
    return Case(net, nn.CrossEntropyLoss(), (torch.randn(2, 2, 6, 6),), (_labels(2, 3),))


# ------------------------------------------------------------------ convolutions

_CONVOLUTIONS = {
    "1d": (nn.Conv1d(2, 4, 3), (7,)),
    "1d-stride-groups": (nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), (7,)),
    "1d-dilated": (nn.Conv1d(2, 3, 3, dilation=2, bias=False), (8,)),
    "1d-same": (nn.Conv1d(2, 3, 3, padding="same", dilation=2), (6,)),
    "2d": (nn.Conv2d(2, 3, 3, padding=1), (4, 5)),
    "2d-stride": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (5, 4)),
    "2d-dilated": (nn.Conv2d(2, 3, 2, dilation=2), (5, 5)),
    "2d-depthwise": (nn.Conv2d(2, 4, 3, groups=2, padding="same"), (4, 4)),
    "2d-zeros": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="zeros"), (4, 4)),
    "2d-reflect": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (4, 4)),
    "2d-replicate": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"), (4, 4)),
    "2d-circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (4, 4)),
    "3d": (nn.Conv3d(2, 2, 2, stride=(1, 2, 1)), (3, 4, 3)),
    "transposed-1d": (nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (4,)),
    "transposed-2d": (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), (3, 3)),
    "transposed-2d-groups": (nn.ConvTranspose2d(2, 4, 2, groups=2, dilation=2), (3, 3)),
    "transposed-3d": (nn.ConvTranspose3d(2, 2, 2, bias=False), (2, 3, 2)),
}


def _convolution_case(layer, size):
    def build():
        x = torch.randn(2, 2, *size)
        with torch.no_grad():
            features = layer(x)[0].numel()
        lift = type(layer) if not isinstance(layer, nn.modules.conv._ConvTransposeNd) else None
        first = (lift or getattr(nn, f"Conv{len(size)}d"))(2, 2, 1)
        net = nn.Sequential(
            first, nn.Tanh(), layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3)
        )
        return Case(net, nn.CrossEntropyLoss(), (x,), (_labels(2, 3),))

    return build


for _n, (_layer, _size) in _CONVOLUTIONS.items():
    CASES[f"conv-{_n}"] = _convolution_case(_layer, _size)

# ------------------------------------------------------------------ pooling

_POOLS = {
    "max-1d": (nn.MaxPool1d(2), (8,)),
    "max-1d-overlap": (nn.MaxPool1d(3, stride=1, padding=1), (6,)),
    "max-2d": (nn.MaxPool2d(2), (4, 4)),
    "max-2d-overlap": (nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), (5, 4)),
    "max-2d-dilated": (nn.MaxPool2d(2, 1, dilation=2), (4, 4)),
    "max-3d": (nn.MaxPool3d(2), (2, 4, 4)),
    "avg-1d": (nn.AvgPool1d(3, 2, padding=1), (7,)),
    "avg-1d-nopad": (nn.AvgPool1d(3, 2, padding=1, count_include_pad=False), (7,)),
    "avg-2d": (nn.AvgPool2d(2), (4, 4)),
    "avg-2d-ceil": (nn.AvgPool2d(3, 2, ceil_mode=True, count_include_pad=False), (4, 5)),
    "avg-2d-divisor": (nn.AvgPool2d(2, divisor_override=3), (4, 4)),
    "avg-3d": (nn.AvgPool3d(2), (2, 4, 4)),
    "adaptive-avg-1d": (nn.AdaptiveAvgPool1d(3), (7,)),
    "adaptive-avg-2d": (nn.AdaptiveAvgPool2d((2, 3)), (5, 4)),
    "adaptive-avg-2d-global": (nn.AdaptiveAvgPool2d(1), (4, 4)),
    "adaptive-avg-3d": (nn.AdaptiveAvgPool3d((1, 2, 2)), (2, 3, 4)),
    "adaptive-max-1d": (nn.AdaptiveMaxPool1d(3), (7,)),
    "adaptive-max-2d": (nn.AdaptiveMaxPool2d((2, 3)), (5, 4)),
    "adaptive-max-3d": (nn.AdaptiveMaxPool3d((1, 2, 2)), (2, 3, 4)),
    "lp-1d": (nn.LPPool1d(2, 2), (6,)),
    "lp-2d": (nn.LPPool2d(3, 2), (4, 4)),
    "lp-3d": (nn.LPPool3d(2, 2), (2, 2, 4)),
    "fractional-max-2d": (nn.FractionalMaxPool2d(2, output_size=3), (6, 6)),
    "fractional-max-3d": (nn.FractionalMaxPool3d(2, output_size=2), (4, 4, 4)),
}


class _Positive(nn.Module):
    def forward(self, x):
        return F.softplus(x)


def _pool_case(pool, size):
    def build():
        x = torch.randn(2, 1, *size)
        with torch.no_grad():
            features = 2 * pool(x)[0].numel()
        conv = getattr(nn, f"Conv{len(size)}d")
        positive = type(pool).__name__.startswith("LP")
        net = nn.Sequential(
            conv(1, 2, 3, padding=1),
            _Positive() if positive else nn.Tanh(),
            pool,
            nn.Flatten(),
            nn.Linear(features, 3),
        )
        maximum = "Max" in type(pool).__name__
        return Case(
            net,
            nn.CrossEntropyLoss(),
            (x,),
            (_labels(2, 3),),
            random="Fractional" in type(pool).__name__,
            low_precision=not maximum,
        )

    return build


for _n, (_layer, _size) in _POOLS.items():
    CASES[f"pool-{_n}"] = _pool_case(_layer, _size)


class _Unpool(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x):
        y, where = self.pool(torch.tanh(self.conv(x)))
        return self.out(self.unpool(y, where))


@case("pool-max-unpool-2d")
def _():
    y = torch.randn(2, 1, 2, 2)
    return Case(_Unpool(), nn.MSELoss(), (torch.randn(2, 1, 4, 4),), (y,), low_precision=False)


# ------------------------------------------------------------------ normalisation


_NORMS = {
    "batch-1d": (nn.BatchNorm1d(4), (5,)),
    "batch-1d-flat": (nn.BatchNorm1d(4), ()),
    "batch-2d": (nn.BatchNorm2d(4), (3, 2)),
    "batch-2d-eval": (nn.BatchNorm2d(4).eval(), (3, 2)),
    "batch-2d-plain": (nn.BatchNorm2d(4, affine=False), (3, 2)),
    "batch-2d-untracked": (nn.BatchNorm2d(4, track_running_stats=False), (3, 2)),
    "batch-3d": (nn.BatchNorm3d(4), (3, 2, 1)),
    "group": (nn.GroupNorm(2, 4), (3, 2)),
    "group-plain": (nn.GroupNorm(1, 4, affine=False), (3, 2)),
    "group-flat": (nn.GroupNorm(2, 4), ()),
    "instance-1d": (nn.InstanceNorm1d(4), (5,)),
    "instance-2d": (nn.InstanceNorm2d(4, affine=True), (3, 2)),
    "instance-2d-tracked": (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 2)),
    "instance-2d-tracked-eval": (nn.InstanceNorm2d(4, track_running_stats=True).eval(), (3, 2)),
    "instance-3d": (nn.InstanceNorm3d(4), (3, 2, 1)),
    "layer": (nn.LayerNorm(5), (5,)),
    "layer-2": (nn.LayerNorm((4, 5)), (5,)),
    "layer-plain": (nn.LayerNorm(5, elementwise_affine=False), (5,)),
    "layer-nobias": (nn.LayerNorm(5, bias=False), (5,)),
    "rms": (nn.RMSNorm(5), (5,)),
    "rms-eps": (nn.RMSNorm((4, 5), eps=1e-3, elementwise_affine=False), (5,)),
    "local-response": (nn.LocalResponseNorm(3, alpha=0.5), (3, 2)),
}


def _norm_case(norm, size):
    def build():
        for n, p in norm.named_parameters():
            nn.init.normal_(p, 1.0 if n == "weight" else 0.0, 0.3)
        if getattr(norm, "running_mean", None) is not None and not norm.training:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
        first = getattr(nn, f"Conv{len(size)}d")(2, 4, 1) if size else nn.Linear(2, 4)
        net = nn.Sequential(first, norm, nn.Tanh(), nn.Flatten(), nn.Linear(4 * math.prod(size), 3))
        # a batch of three: two would leave batch norm at +-1 exactly
        return Case(net, nn.CrossEntropyLoss(), (torch.randn(3, 2, *size),), (_labels(3, 3),))

    return build


for _n, (_layer, _size) in _NORMS.items():
    CASES[f"norm-{_n}"] = _norm_case(_layer, _size)


@case("norm-weight")
def _():
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(6, 3), dim=None),
    )  # fmt: skip
    return Case(net, nn.CrossEntropyLoss(), (torch.randn(4, 5),), (_labels(4, 3),))


@case("norm-spectral-eval")
def _():
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 3))
    return Case(net.eval(), nn.CrossEntropyLoss(), (torch.randn(4, 5),), (_labels(4, 3),))


# ------------------------------------------------------------------ dropout

_DROPOUTS = {
    "plain": nn.Dropout(0.4), "0": nn.Dropout(0.0), "1d": nn.Dropout1d(0.4),
    "alpha": nn.AlphaDropout(0.4), "feature-alpha": nn.FeatureAlphaDropout(0.4),
    "eval": nn.Dropout(0.4).eval(),
}  # fmt: skip


def _dropout_case(layer):
    def build():
        net = nn.Sequential(
            nn.Conv1d(2, 6, 1),
            nn.Tanh(),
            layer,
            nn.Conv1d(6, 5, 1),
            layer,
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(20, 3),
        )
        # torch draws other masks in other dtypes
        random = layer.training and layer.p > 0
        return Case(
            net, nn.CrossEntropyLoss(), (torch.randn(3, 2, 4),), (_labels(3, 3),), random=random
        )

    return build


for _n, _layer in _DROPOUTS.items():
    CASES[f"dropout-{_n}"] = _dropout_case(_layer)

# ------------------------------------------------------------------ architectures


class ResidualBlock(nn.Module):
    def __init__(self, a, b, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.skip = nn.Conv2d(a, b, 1, stride) if (a, stride) != (b, 1) else nn.Identity()

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


@case("resnet")
def _():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(),
        ResidualBlock(3, 3), ResidualBlock(3, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    return Case(net, nn.CrossEntropyLoss(), (torch.randn(3, 1, 6, 6),), (_labels(3, 3),))


@case("resnet-eval")
def _():
    built = CASES["resnet"]()
    built.model.eval()
    return built


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2 + 2 * i, 2, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(2 + 2 * i) for i in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.out(F.avg_pool2d(x, 4).flatten(1))


@case("densenet")
def _():
    x = torch.randn(3, 2, 4, 4)
    return Case(DenseNet(), nn.CrossEntropyLoss(), (x,), (_labels(3, 3),))


class UNet(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.down, self.mid = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
        self.up, self.out = nn.Conv2d(5, 2, 3, padding=1), nn.Conv2d(2, 3, 1)
        self.mode = mode

    def forward(self, x):
        a = F.silu(self.down(x))
        b = F.silu(self.mid(F.avg_pool2d(a, 2)))
        corners = None if self.mode.startswith("nearest") else False
        b = F.interpolate(b, scale_factor=2, mode=self.mode, align_corners=corners)
        return self.out(F.silu(self.up(torch.cat([a, b], 1))))


for _m in ("nearest", "bilinear", "bicubic"):

    @case(f"unet-{_m}")
    def _(mode=_m):
        x, y = torch.randn(2, 1, 4, 4), _labels(2, 3, 4, 4)
        return Case(UNet(mode), nn.CrossEntropyLoss(), (x,), (y,))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)
        self.out = nn.Linear(6 * 9, 3)

    def forward(self, x):
        branches = [self.a(x), F.gelu(self.b(x)), F.max_pool2d(x, 3, 1, 1)]
        return self.out(torch.cat(branches, 1).tanh().flatten(1))


@case("inception")
def _():
    x = torch.randn(2, 2, 3, 3)
    return Case(Inception(), nn.CrossEntropyLoss(), (x,), (_labels(2, 3),), low_precision=False)


# ------------------------------------------------------------------ recurrent


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)
        self.out = nn.Linear(8 if options.get("bidirectional") else 4, 3)

    def forward(self, x):
        y, _ = self.rnn(x)
        return self.out(y[:, -1])


_RECURRENT = {
    "rnn": (nn.RNN, {}),
    "rnn-relu": (nn.RNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
    "gru-nobias": (nn.GRU, {"bias": False}),
    "lstm-projected": (nn.LSTM, {"proj_size": 4, "num_layers": 1}),
}
for _kind in ("rnn", "gru", "lstm"):
    for _layers, _both in ((2, False), (1, True), (2, True)):
        _cls = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[_kind]
        _RECURRENT[f"{_kind}-{_layers}{'-bidirectional' if _both else ''}"] = (
            _cls,
            {"num_layers": _layers, "bidirectional": _both},
        )
_RECURRENT["lstm-dropout"] = (nn.LSTM, {"num_layers": 2, "dropout": 0.4})
del _RECURRENT["lstm-projected"]


def _recurrent_case(kind, options):
    def build():
        net = Recurrent(kind, **options)
        x = torch.randn(2, 3, 3)
        return Case(net, nn.CrossEntropyLoss(), (x,), (_labels(2, 3),), random="dropout" in options)

    return build


for _n, (_cls, _options) in _RECURRENT.items():
    CASES[f"recurrent-{_n}"] = _recurrent_case(_cls, _options)


class Cells(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.out = cell, nn.Linear(4, 2)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.out(state[0] if isinstance(state, tuple) else state)


for _cell in (nn.RNNCell(3, 4), nn.GRUCell(3, 4), nn.LSTMCell(3, 4)):

    @case(f"recurrent-{type(_cell).__name__}")
    def _(cell=_cell):
        return Case(Cells(cell), nn.MSELoss(), (torch.randn(2, 3, 3),), (torch.randn(2, 2),))


# ------------------------------------------------------------------ transformers


class Attention(nn.Module):
    def __init__(self, d, heads, causal, dropout=0.0, by_hand=False):
        super().__init__()
        self.heads, self.causal, self.p, self.by_hand = heads, causal, dropout, by_hand
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x, mask=None):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        p = self.p if self.training else 0.0
        if self.by_hand:
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
            keep = torch.ones(t, t, dtype=torch.bool).tril()
            scores = scores.masked_fill(~keep, float("-inf")) if self.causal else scores
            y = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=p, is_causal=self.causal
            )
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, d, heads, causal, dropout, by_hand):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d, heads, causal, dropout, by_hand)
        self.mlp = nn.Sequential(
            nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d), nn.Dropout(dropout)
        )

    def forward(self, x, mask=None):
        x = x + self.attn(self.ln1(x), mask)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(
        self, vocab=5, d=4, heads=2, layers=2, length=3, dropout=0.0, tied=True, by_hand=False
    ):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(length, d)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d, heads, True, dropout, by_hand) for _ in range(layers))
        self.ln, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens, targets):
        x = self.drop(self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1])))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


for _n, _options in {
    "gpt": {}, "gpt-untied": {"tied": False}, "gpt-dropout": {"dropout": 0.3},
    "gpt-by-hand": {"by_hand": True},
}.items():  # fmt: skip

    @case(_n)
    def _(options=_options):
        tokens = _labels(2, 5, 4)
        net = GPT(**options)
        inputs = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        return Case(net, None, inputs, random=bool(options.get("dropout")))


class Bert(nn.Module):
    """Pre-norm encoder with a padding mask, read out at the first token."""

    def __init__(self, d=4, dropout=0.0):
        super().__init__()
        self.embed, self.kind = nn.Embedding(6, d, padding_idx=0), nn.Embedding(2, d)
        self.block = Block(d, 2, False, dropout, False)
        self.pool, self.out = nn.Linear(d, d), nn.Linear(d, 2)

    def forward(self, tokens, kinds):
        mask = (tokens != 0)[:, None, None, :]
        x = self.block(self.embed(tokens) + self.kind(kinds), mask)
        return self.out(torch.tanh(self.pool(x[:, 0])))


for _p in (0.0, 0.3):

    @case(f"bert{'-dropout' if _p else ''}")
    def _(p=_p):
        tokens = torch.tensor([[1, 4, 2, 0], [3, 5, 0, 0]])
        return Case(
            Bert(dropout=p),
            nn.CrossEntropyLoss(),
            (tokens, _labels(2, 2, 4)),
            (_labels(2, 2),),
            random=p > 0,
        )


def _encoder(**options):
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


for _n, _options in {
    "pre": {"norm_first": True, "dropout": 0.0},
    "pre-gelu": {"norm_first": True, "dropout": 0.0, "activation": "gelu"},
    "pre-dropout": {"norm_first": True, "dropout": 0.3}, "post": {"dropout": 0.0},
    "post-dropout": {"dropout": 0.3},
}.items():  # fmt: skip

    @case(f"transformer-encoder-{_n}")
    def _(options=_options):
        return Case(
            Scalar(_encoder(**options)),
            None,
            (torch.randn(2, 3, 4),),
            random=options["dropout"] > 0,
        )


@case("transformer-encoder-padding")
def _():
    pad = torch.tensor([[False, False, True], [False, False, False]])
    net = Scalar(_encoder(norm_first=True, dropout=0.0))
    return Case(net, None, (torch.randn(2, 3, 4),), kwargs={"src_key_padding_mask": pad})


@case("transformer-decoder")
def _():
    layer = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    net = Scalar(nn.TransformerDecoder(layer, 1))
    inputs = (torch.randn(2, 3, 4), torch.randn(2, 2, 4))
    return Case(net, None, inputs, kwargs={"tgt_mask": mask, "tgt_is_causal": True})


class MultiHead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.weights = options.pop("weights", False)
        self.inp = nn.Linear(4, 4)
        self.attn = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x, **masks):
        x = self.inp(x)
        y, w = self.attn(x, x, x, need_weights=self.weights, **masks)
        loss = (y.sin() - 0.2).square().mean()
        return loss if w is None else loss + (w - 0.5).pow(3).mean()


_MASK = torch.ones(3, 3, dtype=torch.bool).triu(1)
_PAD = torch.tensor([[False, False, True], [False, False, False]])
for _n, _options, _masks in (
    ("plain", {"batch_first": True}, {}),
    ("sequence-first", {}, {}),
    ("weights", {"batch_first": True, "weights": True}, {}),
    ("causal", {"batch_first": True}, {"attn_mask": _MASK, "is_causal": True}),
    ("causal-weights", {"batch_first": True, "weights": True}, {"attn_mask": _MASK}),
    ("padding", {"batch_first": True}, {"key_padding_mask": _PAD}),
    ("bias-kv", {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}, {}),
    ("dropout", {"batch_first": True, "dropout": 0.3}, {}),
):

    @case(f"multihead-{_n}")
    def _(options=_options, masks=_masks):
        x = torch.randn(3, 2, 4) if not options.get("batch_first") else torch.randn(2, 3, 4)
        return Case(
            MultiHead(**dict(options)), None, (x,), kwargs=masks, random="dropout" in options
        )


class Llama(nn.Module):
    """RMSNorm, rotary positions, grouped queries, SwiGLU."""

    def __init__(self, d=8, heads=4, kv=2):
        super().__init__()
        self.heads, self.kv, self.size = heads, kv, d // heads
        self.embed = nn.Embedding(5, d)
        self.n1, self.n2, self.n3 = (nn.RMSNorm(d, eps=1e-5) for _ in range(3))
        self.q, self.o = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, kv * self.size, bias=False)
        self.v = nn.Linear(d, kv * self.size, bias=False)
        self.gate, self.up = nn.Linear(d, 6, bias=False), nn.Linear(d, 6, bias=False)
        self.down, self.head = nn.Linear(6, d, bias=False), nn.Linear(d, 5, bias=False)

    def rotate(self, x):
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.ones(
            self.size, dtype=x.dtype
        )
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def forward(self, tokens):
        x = self.embed(tokens)
        b, t, _ = x.shape
        h = self.n1(x)
        q = self.q(h).view(b, t, self.heads, -1).transpose(1, 2)
        k = self.k(h).view(b, t, self.kv, -1).transpose(1, 2)
        v = self.v(h).view(b, t, self.kv, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        h = self.n2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(self.n3(x))


@case("llama")
def _():
    def loss(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Case(Llama(), loss, (_labels(2, 5, 3),), (_labels(2, 5, 3),))


class Patches(nn.Module):
    """A vision transformer: patches, a class token, one block."""

    def __init__(self):
        super().__init__()
        self.patch, self.cls = nn.Conv2d(1, 4, 2, 2), nn.Parameter(torch.randn(1, 1, 4))
        self.pos = nn.Parameter(torch.randn(1, 5, 4) * 0.1)
        self.block, self.norm = Block(4, 2, False, 0.0, False), nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.out(self.norm(self.block(x))[:, 0])


@case("vision-transformer")
def _():
    return Case(Patches(), nn.CrossEntropyLoss(), (torch.randn(2, 1, 4, 4),), (_labels(2, 3),))


# ------------------------------------------------------------------ embeddings, mixtures, RL


class Bag(nn.Module):
    def __init__(self, mode, **options):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(6, 4, mode=mode, **options), nn.Linear(4, 3)

    def forward(self, *args, **kwargs):
        return self.out(self.bag(*args, **kwargs).tanh())


for _m in ("sum", "mean", "max"):

    @case(f"embedding-bag-{_m}")
    def _(mode=_m):
        low = mode != "max"
        x = torch.tensor([[0, 1, 1], [3, 4, 2]])
        return Case(Bag(mode), nn.CrossEntropyLoss(), (x,), (_labels(2, 3),), low_precision=low)


@case("embedding-bag-offsets")
def _():
    net = Bag("mean", padding_idx=1)
    x, offsets = torch.tensor([0, 1, 2, 2, 5]), torch.tensor([0, 3])
    return Case(net, nn.CrossEntropyLoss(), (x, offsets), (_labels(2, 3),))


@case("embedding-bag-weighted")
def _():
    x, w = torch.tensor([[0, 1, 1], [3, 4, 2]]), torch.rand(2, 3)
    net = Bag("sum")
    return Case(
        net, nn.CrossEntropyLoss(), (x,), (_labels(2, 3),), kwargs={"per_sample_weights": w}
    )


@case("embedding")
def _():
    net = nn.Sequential(nn.Embedding(6, 3, padding_idx=1), nn.Flatten(), nn.Tanh(), nn.Linear(9, 3))
    x = torch.tensor([[0, 1, 1], [3, 3, 2]])
    return Case(net, nn.CrossEntropyLoss(), (x,), (_labels(2, 3),))


class Mixture(nn.Module):
    def __init__(self, top=None):
        super().__init__()
        self.gate, self.top = nn.Linear(4, 3), top
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)) for _ in range(3)
        )

    def forward(self, x):
        logits = self.gate(x)
        if self.top:
            values, where = logits.topk(self.top, -1)
            logits = torch.full_like(logits, float("-inf")).scatter(-1, where, values)
        weights = logits.softmax(-1)
        outs = torch.stack([e(x) for e in self.experts], -2)
        return (weights.unsqueeze(-1) * outs).sum(-2)


class StackedMixture(nn.Module):
    """Experts as one batched product."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 5, 3))

    def forward(self, x):
        h = F.silu(torch.einsum("bi,eio->ebo", x, self.up))
        return torch.einsum("be,ebo->bo", self.gate(x).softmax(-1), torch.bmm(h, self.down))


for _n, _cls in {"dense": Mixture, "top2": lambda: Mixture(2), "stacked": StackedMixture}.items():

    @case(f"mixture-{_n}")
    def _(cls=_cls):
        return Case(
            cls(),
            nn.CrossEntropyLoss(),
            (torch.randn(3, 4),),
            (_labels(3, 3),),
            low_precision=cls in (Mixture, StackedMixture),
        )


class ActorCritic(nn.Module):
    def __init__(self, continuous):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.policy, self.value = nn.Linear(5, 2), nn.Linear(5, 1)
        self.log_std = nn.Parameter(torch.zeros(2)) if continuous else None

    def forward(self, obs, action, old, advantage, returns):
        h = self.body(obs)
        if self.log_std is None:
            pi = D.Categorical(logits=self.policy(h), validate_args=False)
            log_prob, entropy = pi.log_prob(action), pi.entropy()
        else:
            pi = D.Normal(self.policy(h), self.log_std.exp(), validate_args=False)
            log_prob, entropy = pi.log_prob(action).sum(-1), pi.entropy().sum(-1)
        ratio = (log_prob - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        policy = -torch.min(ratio * advantage, clipped * advantage).mean()
        value = F.mse_loss(self.value(h).squeeze(-1), returns)
        return policy + 0.5 * value - 0.01 * entropy.mean()


for _c in (False, True):

    @case(f"actor-critic-{'normal' if _c else 'categorical'}")
    def _(continuous=_c):
        action = torch.randn(4, 2) if continuous else _labels(4, 2)
        inputs = (
            torch.randn(4, 3),
            action,
            torch.randn(4) * 0.1 - 1,
            torch.randn(4),
            torch.randn(4),
        )
        return Case(ActorCritic(continuous), None, inputs, low_precision=False)


class GraphNet(nn.Module):
    """Message passing by index_add over a fixed edge list."""

    def __init__(self):
        super().__init__()
        self.message, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, edges):
        m = F.silu(self.message(x))[edges[0]]
        return self.out(torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, edges[1], m).tanh())


@case("graph-network")
def _():
    edges = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]])
    return Case(GraphNet(), nn.MSELoss(), (torch.randn(3, 3), edges), (torch.randn(3, 2),))


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x):
        mean, log_var = self.encode(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        fit = F.binary_cross_entropy_with_logits(self.decode(z), x.sigmoid(), reduction="sum")
        return (fit - 0.5 * (1 + log_var - mean.square() - log_var.exp()).sum()) / len(x)


@case("variational-autoencoder")
def _():
    return Case(Vae(), None, (torch.randn(3, 4),), random=True)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.pair = nn.Linear(3, 4), nn.Linear(3, 2), nn.Bilinear(4, 2, 3)

    def forward(self, x):
        return self.pair(self.a(x).tanh(), self.b(x).sigmoid())


@case("bilinear")
def _():
    return Case(Bilinear(), nn.CrossEntropyLoss(), (torch.randn(3, 3),), (_labels(3, 3),))


class Detached(nn.Module):
    """detach stops the gradient and the curvature alike."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x).tanh()
        return self.b(h * h.detach() + h.detach().exp())


@case("detach")
def _():
    return Case(Detached(), nn.CrossEntropyLoss(), (torch.randn(3, 3),), (_labels(3, 3),))


class Siamese(nn.Module):
    """One body for both inputs; a contrastive loss by hand."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, a, b, same):
        d = (self.body(a) - self.body(b)).square().sum(-1)
        return torch.where(same, d, F.relu(2 - (d + 1e-3).sqrt()).square()).mean()


@case("siamese")
def _():
    same = torch.tensor([True, False, True])
    return Case(Siamese(), None, (torch.randn(3, 3), torch.randn(3, 3), same))


class HandSpelled(nn.Module):
    """Pointwise and row functions written out, and values used twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.rand(5) + 0.5)

    def forward(self, x, y):
        h = self.a(x)
        h = h * torch.sigmoid(h)
        h = h - h.mean(-1, keepdim=True)
        h = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.scale
        h = self.b(h)
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        h = self.c(h)
        h = h - h.max(-1, keepdim=True).values
        return (h.exp().sum(-1).log() - h.gather(-1, y[:, None]).squeeze(-1)).mean()


@case("hand-spelled")
def _():
    return Case(HandSpelled(), None, (torch.randn(3, 4), _labels(3, 3)), low_precision=False)


# ------------------------------------------------------------------ losses


def _net(width):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, width))


def loss_case(name, loss, targets, width=3, n=5, reference=None, net=None, low=True):
    """A small net under one loss; ``targets()`` draws what follows the output."""

    @case(f"loss-{name}")
    def build():
        return Case(
            net() if net else _net(width),
            loss,
            (torch.randn(n, 4),),
            targets(),
            reference_loss=reference,
            low_precision=low,
        )


class _Spatial(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 3)

    def forward(self, x):  # (n, classes, 2)
        return self.b(self.a(x).tanh().view(-1, 2, 3)).transpose(1, 2)


def _ignored(*shape):
    y = torch.randint(3, shape)
    y.view(-1)[0] = -100
    return (y,)


_W = torch.tensor([0.5, 1.0, 2.0])
_R = ("mean", "sum")

for _r in _R:
    loss_case(f"cross-entropy-{_r}", nn.CrossEntropyLoss(reduction=_r), lambda: (_labels(5, 3),))
    loss_case(f"mse-{_r}", nn.MSELoss(reduction=_r), lambda: (torch.randn(5, 3),))
    loss_case(f"l1-{_r}", nn.L1Loss(reduction=_r), lambda: (torch.randn(5, 3),), low=False)
    loss_case(f"bce-logits-{_r}", nn.BCEWithLogitsLoss(reduction=_r), lambda: (torch.rand(5, 3),))
    loss_case(f"huber-{_r}", nn.HuberLoss(_r, 0.5), lambda: (torch.randn(5, 3),), low=False)
    loss_case(
        f"smooth-l1-{_r}",
        nn.SmoothL1Loss(reduction=_r, beta=0.5),
        lambda: (torch.randn(5, 3),),
        low=False,
    )
    loss_case(
        f"soft-margin-{_r}", nn.SoftMarginLoss(reduction=_r), lambda: (torch.randn(5, 3).sign(),)
    )
    loss_case(
        f"hinge-embedding-{_r}",
        nn.HingeEmbeddingLoss(0.7, reduction=_r),
        lambda: (torch.randn(5, 3).sign(),),
        low=False,
    )
    loss_case(
        f"multi-margin-{_r}",
        nn.MultiMarginLoss(p=2, margin=0.7, reduction=_r),
        lambda: (_labels(5, 3),),
        low=False,
    )
    loss_case(f"poisson-{_r}", nn.PoissonNLLLoss(reduction=_r), lambda: (torch.rand(5, 3) * 3,))

loss_case("cross-entropy-weight", nn.CrossEntropyLoss(_W), lambda: (_labels(5, 3),))
loss_case(
    "cross-entropy-smoothing", nn.CrossEntropyLoss(label_smoothing=0.2), lambda: (_labels(5, 3),)
)
loss_case("cross-entropy-ignore", nn.CrossEntropyLoss(), lambda: _ignored(5))
loss_case(
    "cross-entropy-ignore-class",
    nn.CrossEntropyLoss(_W, ignore_index=1, label_smoothing=0.1),
    lambda: (torch.tensor([0, 1, 2, 2, 1]),),
)
loss_case(
    "cross-entropy-probabilities",
    nn.CrossEntropyLoss(_W, label_smoothing=0.1),
    lambda: (torch.randn(5, 3).softmax(-1),),
)
loss_case(
    "cross-entropy-spatial",
    nn.CrossEntropyLoss(_W, ignore_index=2),
    lambda: (_labels(5, 3, 2),),
    net=_Spatial,
)
loss_case(
    "cross-entropy-spatial-sum",
    nn.CrossEntropyLoss(reduction="sum"),
    lambda: (_labels(5, 3, 2),),
    net=_Spatial,
)
loss_case(
    "cross-entropy-none",
    lambda o, y: (F.cross_entropy(o, y, reduction="none") * torch.arange(5)).sum(),
    lambda: (_labels(5, 3),),
)
loss_case(
    "cross-entropy-scaled", lambda o, y: 3.5 * F.cross_entropy(o, y), lambda: (_labels(5, 3),)
)
loss_case(
    "focal",
    lambda o, y: (
        (1 - (-F.cross_entropy(o, y, reduction="none")).exp())
        .square()
        .mul(F.cross_entropy(o, y, reduction="none"))
        .mean()
    ),
    lambda: (_labels(5, 3),),
)
loss_case("nll", lambda o, y: F.nll_loss(o.log_softmax(-1), y), lambda: (_labels(5, 3),))
loss_case(
    "nll-weight-ignore",
    lambda o, y: F.nll_loss(o.log_softmax(-1), y, _W.to(o.dtype), ignore_index=0),
    lambda: (torch.tensor([0, 1, 2, 2, 1]),),
)
loss_case(
    "nll-sum",
    lambda o, y: F.nll_loss(o.log_softmax(-1), y, reduction="sum"),
    lambda: (_labels(5, 3),),
)
loss_case(
    "nll-spatial",
    lambda o, y: F.nll_loss(o.log_softmax(1), y, _W.to(o.dtype)),
    lambda: (_labels(5, 3, 2),),
    net=_Spatial,
)
loss_case(
    "nll-module",
    nn.NLLLoss(),
    lambda: (_labels(5, 3),),
    net=lambda: nn.Sequential(*_net(3), nn.LogSoftmax(-1)),
)
loss_case(
    "bce",
    nn.BCELoss(),
    lambda: (torch.rand(5, 3),),
    net=lambda: nn.Sequential(*_net(3), nn.Sigmoid()),
)
loss_case(
    "bce-weight",
    nn.BCELoss(_W),
    lambda: (torch.rand(5, 3),),
    net=lambda: nn.Sequential(*_net(3), nn.Sigmoid()),
)
loss_case(
    "bce-logits-weights",
    nn.BCEWithLogitsLoss(_W, pos_weight=torch.tensor([2.0, 1.0, 3.0])),
    lambda: (torch.rand(5, 3),),
)
loss_case(
    "kl",
    nn.KLDivLoss(reduction="batchmean"),
    lambda: (torch.randn(5, 3).softmax(-1),),
    net=lambda: nn.Sequential(*_net(3), nn.LogSoftmax(-1)),
)
loss_case(
    "kl-log-target",
    nn.KLDivLoss(reduction="sum", log_target=True),
    lambda: (torch.randn(5, 3).log_softmax(-1),),
    net=lambda: nn.Sequential(*_net(3), nn.LogSoftmax(-1)),
)
loss_case("multi-margin-weight", nn.MultiMarginLoss(weight=_W), lambda: (_labels(5, 3),), low=False)
loss_case(
    "multilabel-margin",
    nn.MultiLabelMarginLoss(),
    lambda: (torch.tensor([[0, 2, -1], [1, -1, 0], [2, 0, -1], [-1, 0, 1], [0, 1, 2]]),),
    low=False,
)
loss_case(
    "multilabel-soft-margin",
    nn.MultiLabelSoftMarginLoss(_W),
    lambda: (torch.randint(2, (5, 3)).float(),),
)
loss_case(
    "poisson-full",
    nn.PoissonNLLLoss(log_input=False, full=True),
    lambda: (torch.rand(5, 3) * 5,),
    net=lambda: nn.Sequential(*_net(3), nn.Softplus()),
)
loss_case(
    "margin-ranking",
    lambda o, y: F.margin_ranking_loss(o[:, 0], o[:, 1], y, margin=0.3),
    lambda: (torch.randn(5).sign(),),
    low=False,
)
loss_case(
    "cosine-embedding",
    lambda o, other, y: F.cosine_embedding_loss(o, other, y, margin=-0.5),
    lambda: (torch.randn(5, 3), torch.randn(5).sign()),
)
loss_case(
    "cosine-similarity",
    lambda o, other: 1 - F.cosine_similarity(o, other).mean(),
    lambda: (torch.randn(5, 3),),
)
loss_case(
    "triplet",
    lambda o, p, n: F.triplet_margin_loss(o, p, n, margin=2.0),
    lambda: (torch.randn(5, 3), torch.randn(5, 3)),
)
loss_case(
    "triplet-swap",
    lambda o, p, n: F.triplet_margin_loss(o, p, n, margin=2.0, swap=True),
    lambda: (torch.randn(5, 3), torch.randn(5, 3)),
)
loss_case(
    "triplet-distance",
    nn.TripletMarginWithDistanceLoss(distance_function=nn.PairwiseDistance(), margin=2.0),
    lambda: (torch.randn(5, 3), torch.randn(5, 3)),
)
loss_case("root-mean-square", lambda o, y: F.mse_loss(o, y).sqrt(), lambda: (torch.randn(5, 3),))
loss_case("log-cosh", lambda o, y: (o - y).cosh().log().mean(), lambda: (torch.randn(5, 3),))


def _gaussian_nll(o, y):
    return F.gaussian_nll_loss(o[:, :2], y, F.softplus(o[:, 2:]) + 0.1)


def _gaussian_nll_by_hand(o, y):
    var = F.softplus(o[:, 2:]) + 0.1
    return (0.5 * (var.log() + (o[:, :2] - y).square() / var)).mean()


loss_case(
    "gaussian-nll",
    _gaussian_nll,
    lambda: (torch.randn(5, 2),),
    width=4,
    reference=_gaussian_nll_by_hand,
)
loss_case("gaussian-nll-by-hand", _gaussian_nll_by_hand, lambda: (torch.randn(5, 2),), width=4)


class _CtcNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(3, 3)

    def forward(self, x):  # (time, n, classes)
        return self.b(self.a(x).tanh().view(-1, 4, 3)).log_softmax(-1).transpose(0, 1)


def _ctc(log_probs, targets):
    n = log_probs.shape[1]
    return F.ctc_loss(log_probs, targets, (4,) * n, (2,) * n, reduction="sum")


loss_case(
    "ctc",
    _ctc,
    lambda: (torch.tensor([[1, 2], [1, 1]]),),
    n=2,
    net=_CtcNet,
    reference=ctc_loss,
    low=False,
)
