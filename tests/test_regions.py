"""Same mathematics, same answer: the curvature does not depend on how a function is spelled.

Every family below is one function in several spellings. Each spelling is put into the same network,
with layers before and after it and with the same parameters, and transformed once. Called with 1
and with 7 samples, all spellings must give the diagonals of the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, relative_error, some
from reference import autograd, exact_hessian_diagonal, reference
from torch import nn
from torch.distributions import Categorical, Normal

import hesscale_fx

TOLERANCE = 1e-10
SIZES = (7, 1)


@dataclass
class Family:
    """Spellings of one function.

    Attributes:
        spellings: name -> f(x, p), or for a loss f(z, t, p); p is a dict of parameters.
        shape: of one sample of x.
        params: shape of each parameter in p.
        loss: whether the function is the loss; then `target` makes its targets.
        sizes: numbers of samples, the first one is captured.
    """

    spellings: dict[str, Callable]
    shape: tuple[int, ...] = (6,)
    params: dict[str, tuple[int, ...]] = field(default_factory=dict)
    loss: bool = False
    target: Callable | None = None
    sizes: tuple[int, ...] = SIZES


class Net(nn.Module):
    """Linear, tanh, linear, a function, and unless that is the loss: linear, tanh."""

    def __init__(self, family: Family, function: Callable):
        super().__init__()
        torch.manual_seed(1)
        self.function, self.shape, self.is_loss = function, family.shape, family.loss
        self.first = nn.Linear(4, 5)
        self.before = nn.Linear(5, math.prod(family.shape))
        self.p = nn.ParameterDict(
            {n: nn.Parameter(0.6 * torch.randn(s) + 0.3) for n, s in family.params.items()}
        )
        if not self.is_loss:
            with torch.no_grad():
                out = function(torch.ones(2, *self.shape), dict(self.p.items()))
            self.after = nn.Linear(out[0].numel(), 3)
        self.double()

    def forward(self, x, *targets):
        z = self.before(torch.tanh(self.first(x))).reshape(x.shape[0], *self.shape)
        p = dict(self.p.items())
        if self.is_loss:
            return self.function(z, *targets, p)
        z = torch.tanh(self.after(self.function(z, p).flatten(1)))
        return ((z - targets[0]) ** 2).mean()


FAMILIES: dict[str, Family] = {}


def family(name: str, **options) -> Callable:
    """Register the dict of spellings that a function returns."""

    def add(function: Callable) -> Callable:
        FAMILIES[name] = Family(function(), **options)
        return function

    return add


# ------------------------------------------------------------------ activations


@family("silu")
def _silu():
    return {
        "F": lambda x, p: F.silu(x),
        "x * sigmoid": lambda x, p: x * torch.sigmoid(x),
        "x / (1 + exp)": lambda x, p: x / (1 + torch.exp(-x)),
        "by tanh": lambda x, p: 0.5 * x * (1 + torch.tanh(0.5 * x)),
        "exp of logsigmoid": lambda x, p: x * F.logsigmoid(x).exp(),
        "nn.SiLU": lambda x, p: nn.SiLU()(x),
    }


@family("gelu")
def _gelu():
    return {
        "F": lambda x, p: F.gelu(x),
        "erf": lambda x, p: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "x * cdf": lambda x, p: x * torch.special.ndtr(x),
        "erfc": lambda x, p: x * torch.erfc(-x * 0.5**0.5) * 0.5,
    }


@family("gelu of tanh")
def _gelu_tanh():
    c = math.sqrt(2 / math.pi)
    return {
        "F": lambda x, p: F.gelu(x, approximate="tanh"),
        "pow": lambda x, p: 0.5 * x * (1 + torch.tanh(c * (x + 0.044715 * torch.pow(x, 3)))),
        "products": lambda x, p: 0.5 * x * (1 + torch.tanh(c * (x + 0.044715 * x * x * x))),
        "sigmoid": lambda x, p: x * torch.sigmoid(2 * c * x * (1 + 0.044715 * x * x)),
    }


@family("mish")
def _mish():
    return {
        "F": lambda x, p: F.mish(x),
        "softplus": lambda x, p: x * torch.tanh(F.softplus(x)),
        "log1p": lambda x, p: x * torch.tanh(torch.log1p(torch.exp(x))),
        "square": lambda x, p: x * (((1 + x.exp()) ** 2 - 1) / ((1 + x.exp()) ** 2 + 1)),
    }


@family("softplus")
def _softplus():
    return {
        "F": lambda x, p: F.softplus(x),
        "log1p": lambda x, p: torch.log1p(torch.exp(x)),
        "stable": lambda x, p: x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())),
        "logsigmoid": lambda x, p: -F.logsigmoid(-x),
        "logaddexp": lambda x, p: torch.logaddexp(x, torch.zeros_like(x)),
        "logsumexp": lambda x, p: torch.logsumexp(torch.stack([x, torch.zeros_like(x)]), 0),
    }


@family("elu")
def _elu():
    return {
        "F": lambda x, p: F.elu(x, 1.5),
        "where": lambda x, p: torch.where(x > 0, x, 1.5 * torch.expm1(x)),
        "clamps": lambda x, p: x.clamp(min=0) + 1.5 * (x.clamp(max=0).exp() - 1),
        "relu": lambda x, p: F.relu(x) - 1.5 * (1 - torch.exp(-F.relu(-x))),
        "mask": lambda x, p: x * (x > 0) + (x <= 0) * 1.5 * (torch.exp(x) - 1),
    }


@family("hardswish")
def _hardswish():
    return {
        "F": lambda x, p: F.hardswish(x),
        "relu6": lambda x, p: x * F.relu6(x + 3) / 6,
        "clamp": lambda x, p: x * (x + 3).clamp(0, 6) / 6,
        "where": lambda x, p: torch.where(
            x <= -3, torch.zeros_like(x), torch.where(x >= 3, x, x * (x + 3) / 6)
        ),
    }


@family("softsign")
def _softsign():
    return {
        "F": lambda x, p: F.softsign(x),
        "abs": lambda x, p: x / (1 + x.abs()),
        "reciprocal": lambda x, p: x * (x.abs() + 1).reciprocal(),
        "sign": lambda x, p: x.sign() * (1 - 1 / (1 + x.abs())),
    }


@family("prelu", params={"a": (6,)})
def _prelu():
    return {
        "F": lambda x, p: F.prelu(x, p["a"]),
        "where": lambda x, p: torch.where(x > 0, x, p["a"] * x),
        "relu": lambda x, p: F.relu(x) - p["a"] * F.relu(-x),
        "clamp": lambda x, p: x.clamp(min=0) + p["a"][None] * x.clamp(max=0),
    }


@family("swish with a learned slope", params={"b": (6,)})
def _swish():
    return {
        "sigmoid": lambda x, p: x * torch.sigmoid(p["b"] * x),
        "silu": lambda x, p: F.silu(p["b"] * x) / p["b"],
        "exp": lambda x, p: x / (1 + torch.exp(-(x * p["b"]))),
    }


def _half(x):
    return x.chunk(2, -1)


@family("glu", shape=(8,))
def _glu():
    return {
        "F": lambda x, p: F.glu(x),
        "chunk": lambda x, p: _half(x)[0] * torch.sigmoid(_half(x)[1]),
        "slice": lambda x, p: x[:, :4] / (1 + torch.exp(-x[:, 4:])),
        "split": lambda x, p: (lambda a, b: b.sigmoid() * a)(*x.split(4, -1)),
    }


@family("swiglu", shape=(8,), params={"w": (8, 5), "v": (8, 5)})
def _swiglu():
    return {
        "F": lambda x, p: F.silu(x @ p["w"]) * (x @ p["v"]),
        "by hand": lambda x, p: (lambda a, b: b * a * torch.sigmoid(a))(x @ p["w"], x @ p["v"]),
        "grouped": lambda x, p: (lambda a, b: (a * b) / (1 + torch.exp(-a)))(
            x @ p["w"], x @ p["v"]
        ),
    }


@family("geglu", shape=(8,))
def _geglu():
    return {
        "F": lambda x, p: _half(x)[0] * F.gelu(_half(x)[1]),
        "by hand": lambda x, p: (lambda a, b: a * b * 0.5 * (1 + torch.erf(b * 0.5**0.5)))(
            *_half(x)
        ),
        "cdf": lambda x, p: (lambda a, b: torch.special.ndtr(b) * (a * b))(*_half(x)),
    }


@family("square")
def _square():
    return {
        "x * x": lambda x, p: x * x,
        "x ** 2": lambda x, p: x**2,
        "torch.square": lambda x, p: torch.square(x),
        "pow": lambda x, p: torch.pow(x, 2.0),
        "abs": lambda x, p: x.abs() * x.abs(),
        "clone": lambda x, p: x.clone() * x,
        "view": lambda x, p: (x.view(-1, 2, 3) * x.reshape(-1, 2, 3)).flatten(1),
        "transposed": lambda x, p: (x.T * x.T).T,
        "binomial": lambda x, p: (x + 1) * (x - 1) + 1,
    }


@family("square of a product", params={"w": (6,)})
def _square_of_product():
    return {
        "(w x) ** 2": lambda x, p: (p["w"] * x) ** 2,
        "w ** 2 x ** 2": lambda x, p: p["w"] ** 2 * x**2,
        "w x w x": lambda x, p: p["w"] * x * p["w"] * x,
        "x (w (x w))": lambda x, p: x * (p["w"] * (x * p["w"])),
        "expanded": lambda x, p: (x * p["w"].expand_as(x)).square(),
    }


# ------------------------------------------------------------------ norms

AFFINE = {"w": (6,), "b": (6,)}


def _layer_norms(w=lambda p: 1.0, b=lambda p: 0.0):
    def two_pass(x, p):
        d = x - x.mean(-1, keepdim=True)
        return d / torch.sqrt((d**2).mean(-1, keepdim=True) + 1e-5) * w(p) + b(p)

    def one_pass(x, p):
        m, s = x.mean(-1, keepdim=True), (x * x).mean(-1, keepdim=True)
        return (x - m) * torch.rsqrt(s - m * m + 1e-5) * w(p) + b(p)

    def by_var(x, p):
        v = x.var(-1, keepdim=True, unbiased=False)
        return b(p) + w(p) * ((x - x.mean(-1, keepdim=True)) / (v + 1e-5) ** 0.5)

    def sums(x, p):
        n = x.shape[-1]
        m = x.sum(-1, keepdim=True) / n
        v = ((x - m) * (x - m)).sum(-1, keepdim=True) / n
        return (x - m) * w(p) / (v + 1e-5).sqrt() + b(p)

    def var_mean(x, p):
        v, m = torch.var_mean(x, -1, correction=0)
        return (x - m[:, None]) * (v[:, None] + 1e-5).pow(-0.5) * w(p) + b(p)

    def transposed(x, p):
        x = x.T
        d = x - x.mean(0)
        return (d / (d.square().mean(0) + 1e-5).sqrt()).T * w(p) + b(p)

    return {
        "two-pass": two_pass,
        "one-pass": one_pass,
        "var": by_var,
        "sums": sums,
        "var_mean": var_mean,
        "transposed": transposed,
    }


@family("layer norm")
def _layer_norm():
    return {"F": lambda x, p: F.layer_norm(x, (6,)), **_layer_norms()}


@family("affine layer norm", params=AFFINE)
def _layer_norm_affine():
    return {
        "F": lambda x, p: F.layer_norm(x, (6,), p["w"], p["b"]),
        "F, affine by hand": lambda x, p: F.layer_norm(x, (6,)) * p["w"] + p["b"],
        "native": lambda x, p: torch.native_layer_norm(x, (6,), p["w"], p["b"], 1e-5)[0],
        **_layer_norms(lambda p: p["w"], lambda p: p["b"]),
    }


@family("layer norm of two dimensions", shape=(3, 4), params={"w": (3, 4), "b": (3, 4)})
def _layer_norm_2d():
    def by_hand(x, p):
        d = x - x.mean((1, 2), keepdim=True)
        return d * ((d * d).mean((1, 2), keepdim=True) + 1e-5).rsqrt() * p["w"] + p["b"]

    def flat(x, p):
        y = F.layer_norm(x.flatten(1), (12,), p["w"].flatten(), p["b"].flatten())
        return y.view(-1, 3, 4)

    return {
        "F": lambda x, p: F.layer_norm(x, (3, 4), p["w"], p["b"]),
        "by hand": by_hand,
        "flat": flat,
    }


@family("rms norm")
def _rms_norm():
    return {
        "F": lambda x, p: F.rms_norm(x, (6,), eps=1e-5),
        "rsqrt": lambda x, p: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
        "sqrt": lambda x, p: x / ((x * x).sum(-1, keepdim=True) / 6 + 1e-5).sqrt(),
    }


@family("affine rms norm", params={"w": (6,)})
def _rms_norm_affine():
    return {
        "F": lambda x, p: F.rms_norm(x, (6,), p["w"], eps=1e-5),
        "rsqrt": lambda x, p: p["w"] * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)),
        "scaled first": lambda x, p: (x * p["w"]) / (x.square().mean(-1, True) + 1e-5).sqrt(),
        "norm": lambda x, p: (
            x * p["w"] * (torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / 6 + 1e-5) ** -0.5
        ),
    }


@family("gated rms norm", shape=(12,), params={"w": (6,)})
def _gated_rms_norm():
    def by_hand(x, p):
        x, gate = _half(x)
        x = x * gate * torch.sigmoid(gate)
        return x * p["w"] / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    return {
        "F": lambda x, p: F.rms_norm(_half(x)[0] * F.silu(_half(x)[1]), (6,), p["w"], 1e-5),
        "by hand": by_hand,
    }


IMAGE = {"w": (6,), "b": (6,)}


def _channel(v):
    return v[:, None]


def _group_norms(affine):
    def out(y, p):
        return y * _channel(p["w"]) + _channel(p["b"]) if affine else y

    def two_pass(x, p):
        g = x.reshape(x.shape[0], 3, -1)
        d = g - g.mean(-1, keepdim=True)
        return out((d * ((d * d).mean(-1, keepdim=True) + 1e-5).rsqrt()).reshape(x.shape), p)

    def one_pass(x, p):
        g = x.reshape(x.shape[0], 3, 2, 4)
        m = g.mean((2, 3), keepdim=True)
        v = (g**2).mean((2, 3), keepdim=True) - m**2
        return out(((g - m) / (v + 1e-5).sqrt()).view(x.shape), p)

    weights = (lambda p: (p["w"], p["b"])) if affine else (lambda p: ())
    return {
        "F": lambda x, p: F.group_norm(x, 3, *weights(p)),
        "two-pass": two_pass,
        "one-pass": one_pass,
    }


@family("group norm", shape=(6, 4))
def _group_norm():
    return _group_norms(False)


@family("affine group norm", shape=(6, 4), params=IMAGE)
def _group_norm_affine():
    return _group_norms(True)


def _axis_norms(dims, affine, named):
    """Instance norm (over the last dimension) and batch norm (over all but the channels)."""

    def out(y, p):
        return y * _channel(p["w"]) + _channel(p["b"]) if affine else y

    def two_pass(x, p):
        d = x - x.mean(dims, keepdim=True)
        return out(d / ((d**2).mean(dims, keepdim=True) + 1e-5).sqrt(), p)

    def one_pass(x, p):
        m = x.mean(dims, keepdim=True)
        v = (x * x).mean(dims, keepdim=True) - m.square()
        return out((x - m) * (v + 1e-5).rsqrt(), p)

    def by_var(x, p):
        v, m = torch.var_mean(x, dims, correction=0, keepdim=True)
        return out((x - m) / torch.sqrt(v + 1e-5), p)

    weights = (lambda p: {"weight": p["w"], "bias": p["b"]}) if affine else (lambda p: {})
    return {
        "F": lambda x, p: named(x, **weights(p)),
        "two-pass": two_pass,
        "one-pass": one_pass,
        "var_mean": by_var,
    }


@family("instance norm", shape=(6, 4))
def _instance_norm():
    return _axis_norms((2,), False, F.instance_norm)


@family("affine instance norm", shape=(6, 4), params=IMAGE)
def _instance_norm_affine():
    return _axis_norms((2,), True, F.instance_norm)


def _train_batch_norm(x, **weights):
    return F.batch_norm(x, None, None, training=True, **weights)


@family("batch norm in train mode", shape=(6, 4))
def _batch_norm():
    return _axis_norms((0, 2), False, _train_batch_norm)


@family("affine batch norm in train mode", shape=(6, 4), params=IMAGE)
def _batch_norm_affine():
    return _axis_norms((0, 2), True, _train_batch_norm)


@family("batch norm of vectors", params=AFFINE, sizes=(7, 3))
def _batch_norm_1d():
    def by_hand(x, p):
        d = x - x.mean(0)
        return p["w"] * d / ((d * d).mean(0) + 1e-5).sqrt() + p["b"]

    return {
        "F": lambda x, p: _train_batch_norm(x, weight=p["w"], bias=p["b"]),
        "by hand": by_hand,
    }


@family("weight norm", params={"v": (5, 6), "g": (5, 1)})
def _weight_norm():
    def norm(v):
        return v.norm(dim=1, keepdim=True)

    return {
        "torch": lambda x, p: F.linear(x, torch._weight_norm(p["v"], p["g"], 0)),
        "norm": lambda x, p: F.linear(x, p["v"] * (p["g"] / norm(p["v"]))),
        "sqrt": lambda x, p: F.linear(x, p["g"] * p["v"] / (p["v"] ** 2).sum(1, True).sqrt()),
        "normalize": lambda x, p: F.linear(x, F.normalize(p["v"], dim=1) * p["g"]),
        "transposed": lambda x, p: x @ (p["v"].T * p["g"].T / p["v"].T.norm(dim=0)),
    }


@family("l2 normalisation")
def _normalize():
    return {
        "F": lambda x, p: F.normalize(x, dim=-1),
        "norm": lambda x, p: x / x.norm(dim=-1, keepdim=True),
        "vector_norm": lambda x, p: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
        "sqrt": lambda x, p: x / torch.sqrt((x * x).sum(-1, keepdim=True)),
        "rsqrt": lambda x, p: x * torch.rsqrt(x.square().sum(-1))[:, None],
        "pow": lambda x, p: x * (x**2).sum(-1, keepdim=True) ** -0.5,
    }


@family("cosine similarity", shape=(2, 6))
def _cosine():
    def by_hand(x, p):
        a, b = x.unbind(1)
        return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)))[:, None]

    def separately(x, p):
        a, b = F.normalize(x[:, 0], dim=-1), F.normalize(x[:, 1], dim=-1)
        return (a * b).sum(-1, keepdim=True)

    def squares(x, p):
        a, b = x[:, 0], x[:, 1]
        return (a * b).sum(-1, keepdim=True) / torch.sqrt(
            a.square().sum(-1, keepdim=True) * b.square().sum(-1, keepdim=True)
        )

    def products(dot):
        def by_products(x, p):
            a, b = x[:, 0], x[:, 1]
            return (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt())[:, None]

        return by_products

    return {
        "F": lambda x, p: F.cosine_similarity(x[:, 0], x[:, 1])[:, None],
        "by hand": by_hand,
        "squares": squares,
        "normalized": separately,
        "einsum": products(lambda a, b: torch.einsum("bi,bi->b", a, b)),
        "vecdot": products(torch.linalg.vecdot),
        "matmul": products(lambda a, b: (a[:, None] @ b[..., None])[:, 0, 0]),
    }


# ------------------------------------------------------------------ softmax


@family("softmax")
def _softmax():
    def stable(x, p):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    def detached(x, p):
        e = torch.exp(x - x.max(-1, keepdim=True).values.detach())
        return e / e.sum(-1, keepdim=True)

    def shifted(x, p):
        return torch.exp(x - x.max(-1, keepdim=True).values) / torch.exp(
            x - x.max(-1, keepdim=True)[0]
        ).sum(-1, keepdim=True)

    return {
        "F": lambda x, p: F.softmax(x, -1),
        "exp / sum": lambda x, p: x.exp() / x.exp().sum(-1, keepdim=True),
        "amax": stable,
        "detached max": detached,
        "max": shifted,
        "log": lambda x, p: F.log_softmax(x, -1).exp(),
        "logsumexp": lambda x, p: torch.exp(x - torch.logsumexp(x, -1, keepdim=True)),
        "softmin": lambda x, p: F.softmin(-x, -1),
        "first dimension": lambda x, p: F.softmax(x.T, 0).T,
        "reciprocal": lambda x, p: x.exp() * x.exp().sum(-1).reciprocal().unsqueeze(-1),
    }


@family("log-softmax")
def _log_softmax():
    def stable(x, p):
        z = x - x.amax(-1, keepdim=True)
        return z - z.exp().sum(-1, keepdim=True).log()

    return {
        "F": lambda x, p: F.log_softmax(x, -1),
        "log of softmax": lambda x, p: F.softmax(x, -1).log(),
        "logsumexp": lambda x, p: x - x.logsumexp(-1, keepdim=True),
        "exp, sum, log": lambda x, p: x - x.exp().sum(-1, keepdim=True).log(),
        "amax": stable,
        "log of quotient": lambda x, p: (x.exp() / x.exp().sum(-1, keepdim=True)).log(),
    }


@family("softmax shifted by the maximum of all rows")
def _softmax_shifted_by_all():
    def whole(x, p):
        e = torch.exp(x - x.max())
        return e / e.sum(-1, keepdim=True)

    def logs(x, p):
        m = x.amax((0, 1), keepdim=True)
        return torch.exp(x - (x - m).exp().sum(-1, keepdim=True).log() - m)

    return {"F": lambda x, p: F.softmax(x, -1), "exp, sum": whole, "exp, sum, log": logs}


@family("logsumexp")
def _logsumexp():
    def stable(x, p):
        m = x.amax(-1, keepdim=True)
        return (x - m).exp().sum(-1, keepdim=True).log() + m

    return {
        "torch": lambda x, p: torch.logsumexp(x, -1, keepdim=True),
        "exp, sum, log": lambda x, p: x.exp().sum(-1).log()[:, None],
        "amax": stable,
        "log-softmax": lambda x, p: (x - F.log_softmax(x, -1)).mean(-1, keepdim=True),
        "halves": lambda x, p: torch.logaddexp(
            x[:, :3].logsumexp(-1, keepdim=True), x[:, 3:].logsumexp(-1, keepdim=True)
        ),
    }


@family("softmin")
def _softmin():
    return {
        "F": lambda x, p: F.softmin(x, -1),
        "softmax": lambda x, p: F.softmax(-x, -1),
        "by hand": lambda x, p: torch.exp(-x) / torch.exp(-x).sum(-1, keepdim=True),
    }


def _gumbel(x):
    return -torch.empty_like(x).exponential_().log()


@family("gumbel-softmax")
def _gumbel_softmax():
    def by_hand(x, p):
        e = ((x + _gumbel(x)) / 0.7).exp()
        return e / e.sum(-1, keepdim=True)

    return {
        "F": lambda x, p: F.gumbel_softmax(x, 0.7),
        "softmax": lambda x, p: F.softmax((x + _gumbel(x)) / 0.7, -1),
        "by hand": by_hand,
    }


NOISE = torch.linspace(-1, 2, 6).double()


@family("gumbel-softmax with fixed noise", params={"t": (1,)})
def _fixed_gumbel_softmax():
    def by_hand(x, p):
        e = torch.exp((x + NOISE) / (1 + p["t"] ** 2))
        return e / e.sum(-1, keepdim=True)

    return {
        "softmax": lambda x, p: F.softmax((x + NOISE) / (1 + p["t"] * p["t"]), -1),
        "by hand": by_hand,
    }


@family("masked softmax")
def _masked_softmax():
    keep = torch.tensor([True, False, True, True, False, True])

    def by_hand(x, p):
        e = x.exp() * keep
        return e / e.sum(-1, keepdim=True)

    return {
        "masked_fill": lambda x, p: F.softmax(x.masked_fill(~keep, -math.inf), -1),
        "where": lambda x, p: F.softmax(torch.where(keep, x, -math.inf), -1),
        "added": lambda x, p: F.softmax(x + torch.where(keep, 0.0, -math.inf), -1),
        "by hand": by_hand,
    }


# ------------------------------------------------------------------ chains over one row


@family("softmax of a layer norm", params=AFFINE)
def _norm_softmax():
    def by_hand(x, p):
        d = x - x.mean(-1, keepdim=True)
        y = d / ((d * d).mean(-1, keepdim=True) + 1e-5).sqrt() * p["w"] + p["b"]
        e = y.exp()
        return e / e.sum(-1, keepdim=True)

    return {
        "F": lambda x, p: F.softmax(F.layer_norm(x, (6,), p["w"], p["b"]), -1),
        "by hand": by_hand,
        "half by hand": lambda x, p: (lambda e: e / e.sum(-1, keepdim=True))(
            F.layer_norm(x, (6,), p["w"], p["b"]).exp()
        ),
    }


@family("layer norm of a softmax of a norm", params={"w": (6,)})
def _three_row_operators():
    def by_hand(x, p):
        x = p["w"] * x / (x.square().sum(-1, keepdim=True) / 6 + 1e-5).sqrt()
        e = x.exp()
        e = e / e.sum(-1, keepdim=True)
        return (e - e.mean(-1, keepdim=True)) / (e.var(-1, correction=0)[:, None] + 1e-5) ** 0.5

    return {
        "F": lambda x, p: F.layer_norm(F.softmax(F.rms_norm(x, (6,), p["w"], 1e-5), -1), (6,)),
        "by hand": by_hand,
    }


@family("a residual around a norm", params=AFFINE)
def _residual():
    def by_hand(x, p):
        d = x - x.mean(-1, keepdim=True)
        y = d / ((d * d).mean(-1, keepdim=True) + 1e-5).sqrt() * p["w"] + p["b"]
        return x + y * torch.sigmoid(y)

    return {
        "F": lambda x, p: x + F.silu(F.layer_norm(x, (6,), p["w"], p["b"])),
        "by hand": by_hand,
    }


# ------------------------------------------------------------------ losses: classification


def _classes(n):
    return torch.arange(n) * 5 % 6


def _one_hot(t):
    return (t[:, None] == torch.arange(6)).double()


def _cross_entropies():
    def sums(z, t, p):
        z = z - z.amax(-1, keepdim=True)
        return (z.exp().sum(-1).log() - z.gather(1, t[:, None])[:, 0]).mean()

    return {
        "F": lambda z, t, p: F.cross_entropy(z, t),
        "nn": lambda z, t, p: nn.CrossEntropyLoss()(z, t),
        "nll": lambda z, t, p: F.nll_loss(F.log_softmax(z, -1), t),
        "gather": lambda z, t, p: -F.log_softmax(z, -1).gather(1, t[:, None]).mean(),
        "index": lambda z, t, p: -F.log_softmax(z, -1)[torch.arange(z.shape[0]), t].mean(),
        "one-hot": lambda z, t, p: -(F.log_softmax(z, -1) * _one_hot(t)).sum(-1).mean(),
        "one-hot targets": lambda z, t, p: F.cross_entropy(z, _one_hot(t)),
        "where": lambda z, t, p: (
            torch.where(t[:, None] == torch.arange(6), -F.log_softmax(z, -1), 0.0).sum()
            / t.shape[0]
        ),
        "log of softmax": lambda z, t, p: -F.softmax(z, -1).gather(1, t[:, None]).log().mean(),
        "logsumexp": lambda z, t, p: (z.logsumexp(-1) - (z * _one_hot(t)).sum(-1)).mean(),
        "logsumexp, gather": lambda z, t, p: (
            z.logsumexp(-1) - z.gather(1, t[:, None]).squeeze(1)
        ).mean(),
        "amax": sums,
        "exp, sum": lambda z, t, p: (
            -((z.exp() / z.exp().sum(-1, keepdim=True)).log() * _one_hot(t)).sum() / z.shape[0]
        ),
        "Categorical": lambda z, t, p: (
            -Categorical(logits=z, validate_args=False).log_prob(t).mean()
        ),
        "F per sample": lambda z, t, p: F.cross_entropy(z, t, reduction="none").mean(),
    }


@family("cross-entropy", loss=True, target=_classes)
def _cross_entropy():
    return _cross_entropies()


@family("cross-entropy with label smoothing", loss=True, target=_classes)
def _label_smoothing():
    def by_hand(z, t, p):
        logp = F.log_softmax(z, -1)
        return -(0.9 * logp.gather(1, t[:, None])[:, 0] + 0.1 * logp.mean(-1)).mean()

    return {
        "F": lambda z, t, p: F.cross_entropy(z, t, label_smoothing=0.1),
        "targets": lambda z, t, p: F.cross_entropy(z, 0.9 * _one_hot(t) + 0.1 / 6),
        "one-hot": lambda z, t, p: (
            -((0.9 * _one_hot(t) + 0.1 / 6) * (z - z.logsumexp(-1, keepdim=True))).sum(-1).mean()
        ),
        "by hand": by_hand,
    }


@family("weighted cross-entropy", loss=True, target=_classes)
def _weighted_cross_entropy():
    w = torch.linspace(0.5, 2, 6).double()

    def by_hand(z, t, p):
        nll = -F.log_softmax(z, -1).gather(1, t[:, None])[:, 0]
        return (nll * w[t]).sum() / w[t].sum()

    return {"F": lambda z, t, p: F.cross_entropy(z, t, w), "by hand": by_hand}


def _bits(n):
    return (torch.arange(n * 6).reshape(n, 6) * 7 % 5 % 2).double()


@family("binary cross-entropy", loss=True, target=_bits)
def _bce():
    def logs(z, t, p):
        q = torch.sigmoid(z)
        return -(t * q.log() + (1 - t) * (1 - q).log()).mean()

    def stable(z, t, p):
        return (z.clamp(min=0) - z * t + torch.log1p(torch.exp(-z.abs()))).mean()

    return {
        "logits": lambda z, t, p: F.binary_cross_entropy_with_logits(z, t),
        "sigmoid": lambda z, t, p: F.binary_cross_entropy(torch.sigmoid(z), t),
        "logs": logs,
        "stable": stable,
        "softplus": lambda z, t, p: (F.softplus(z) - z * t).mean(),
        "logsigmoid": lambda z, t, p: -(t * F.logsigmoid(z) + (1 - t) * F.logsigmoid(-z)).mean(),
    }


# ------------------------------------------------------------------ losses: regression


def _numbers(n):
    return torch.linspace(-2, 2, n * 6).double().reshape(n, 6)


@family("mse", loss=True, target=_numbers)
def _mse():
    return {
        "F": lambda z, t, p: F.mse_loss(z, t),
        "** 2": lambda z, t, p: ((z - t) ** 2).mean(),
        "product": lambda z, t, p: ((z - t) * (z - t)).sum() / z.numel(),
        "expanded": lambda z, t, p: (z * z - 2 * z * t + t * t).mean(),
        "norm": lambda z, t, p: torch.linalg.vector_norm(z - t) ** 2 / z.numel(),
        "square": lambda z, t, p: torch.square(t - z).mean(0).mean(),
        "per sample": lambda z, t, p: (z - t).pow(2).sum(-1).mean() / 6,
    }


@family("huber", loss=True, target=_numbers)
def _huber():
    def where(z, t, p):
        d = (z - t).abs()
        return torch.where(d <= 0.7, 0.5 * d * d, 0.7 * (d - 0.35)).mean()

    def clamped(z, t, p):
        d = (z - t).abs()
        q = d.clamp(max=0.7)
        return (0.5 * q**2 + 0.7 * (d - q)).mean()

    return {
        "F": lambda z, t, p: F.huber_loss(z, t, delta=0.7),
        "where": where,
        "clamped": clamped,
        "smooth l1": lambda z, t, p: 0.7 * F.smooth_l1_loss(z, t, beta=0.7),
    }


@family("smooth l1", loss=True, target=_numbers)
def _smooth_l1():
    def where(z, t, p):
        d = (z - t).abs()
        return torch.where(d < 0.7, 0.5 * d**2 / 0.7, d - 0.35).mean()

    return {
        "F": lambda z, t, p: F.smooth_l1_loss(z, t, beta=0.7),
        "where": where,
        "huber": lambda z, t, p: F.huber_loss(z, t, delta=0.7) / 0.7,
    }


@family("Gaussian nll", loss=True, target=lambda n: _numbers(n)[:, :3])
def _gaussian_nll():
    c = 0.5 * math.log(2 * math.pi)

    def by_hand(z, t, p):
        v = z[:, 3:].exp()
        return (0.5 * (v.log() + (z[:, :3] - t) ** 2 / v)).mean() + c

    def log_variance(z, t, p):
        m, u = _half(z)
        return 0.5 * (u + (m - t).square() * torch.exp(-u)).mean() + c

    def normal(z, t, p):
        m, u = _half(z)
        return -Normal(m, (0.5 * u).exp(), validate_args=False).log_prob(t).mean()

    return {
        "F": lambda z, t, p: F.gaussian_nll_loss(z[:, :3], t, z[:, 3:].exp(), full=True),
        "by hand": by_hand,
        "log variance": log_variance,
        "Normal": normal,
    }


def _probabilities(n):
    return F.softmax(_numbers(n) * 0.7, -1)


@family("kl", loss=True, target=_probabilities)
def _kl():
    def batchmean(z, t, p):
        return (t * (t.log() - F.log_softmax(z, -1))).sum() / z.shape[0]

    return {
        "F": lambda z, t, p: F.kl_div(F.log_softmax(z, -1), t, reduction="batchmean"),
        "logs": lambda z, t, p: F.kl_div(
            F.log_softmax(z, -1), t.log(), reduction="batchmean", log_target=True
        ),
        "by hand": batchmean,
        "quotient": lambda z, t, p: (t * (t / F.softmax(z, -1)).log()).sum(-1).mean(),
        "cross-entropy": lambda z, t, p: F.cross_entropy(z, t) + (t * t.log()).sum(-1).mean(),
        "distributions": lambda z, t, p: torch.distributions.kl_divergence(
            Categorical(probs=t, validate_args=False), Categorical(logits=z, validate_args=False)
        ).mean(),
    }


@family("reversed kl", loss=True, target=_probabilities)
def _reversed_kl():
    def by_hand(z, t, p):
        q = F.softmax(z, -1)
        return (q * (q.log() - t.log())).sum(-1).mean()

    def logs(z, t, p):
        logq = F.log_softmax(z, -1)
        return (logq.exp() * (logq - t.log())).sum() / z.shape[0]

    return {"by hand": by_hand, "logs": logs}


# ------------------------------------------------------------------ losses: reinforcement


@family("entropy of Categorical", loss=True, target=_classes)
def _entropy():
    def logs(z, t, p):
        logp = z - z.logsumexp(-1, keepdim=True)
        return (logp.exp() * logp).sum(-1).mean()

    def logsumexp(z, t, p):
        q = F.softmax(z, -1)
        return ((q * z).sum(-1) - z.logsumexp(-1)).mean()

    return {
        "Categorical": lambda z, t, p: -Categorical(logits=z, validate_args=False).entropy().mean(),
        "softmax": lambda z, t, p: (F.softmax(z, -1) * F.log_softmax(z, -1)).sum(-1).mean(),
        "logs": logs,
        "logsumexp": logsumexp,
        "log of softmax": lambda z, t, p: (
            (F.softmax(z, -1) * F.softmax(z, -1).log()).sum(-1).mean()
        ),
    }


@family("Normal with a learned scale", loss=True, target=_numbers, params={"s": (6,)})
def _normal():
    def by_hand(z, t, p):
        r = (t - z) / p["s"].exp()
        return (0.5 * r * r + p["s"] + 0.5 * math.log(2 * math.pi)).sum(-1).mean()

    def variance(z, t, p):
        v = (2 * p["s"]).exp()
        return ((z - t) ** 2 / (2 * v) + 0.5 * (2 * math.pi * v).log()).sum(-1).mean()

    return {
        "Normal": lambda z, t, p: (
            -Normal(z, p["s"].exp(), validate_args=False).log_prob(t).sum(-1).mean()
        ),
        "by hand": by_hand,
        "variance": variance,
        "expanded": lambda z, t, p: (
            -Normal(z, p["s"].exp().expand_as(z), validate_args=False).log_prob(t).sum(-1).mean()
        ),
    }


@family("entropy of Normal", loss=True, target=_numbers)
def _normal_entropy():
    c = 0.5 + 0.5 * math.log(2 * math.pi)
    return {
        "Normal": lambda z, t, p: (
            -(Normal(t, F.softplus(z), validate_args=False).entropy().sum(-1).mean())
        ),
        "by hand": lambda z, t, p: -(F.softplus(z).log() + c).sum(-1).mean(),
        "log1p": lambda z, t, p: -(torch.log(torch.log1p(z.exp())) + c).sum() / z.shape[0],
    }


@family("clipped ppo", loss=True, target=_classes)
def _ppo():
    def setting(t):
        n = t.shape[0]
        return -1.8 + 0.1 * t.double(), (t.double() - 2.2), n

    def ratio(logp, t):
        old, advantage, _ = setting(t)
        return torch.exp(logp - old), advantage

    def logp_of(z, t):
        return Categorical(logits=z, validate_args=False).log_prob(t)

    def minimum(z, t, p):
        r, a = ratio(logp_of(z, t), t)
        return -torch.min(r * a, r.clamp(0.8, 1.2) * a).mean()

    def gathered(z, t, p):
        r, a = ratio(F.log_softmax(z, -1).gather(1, t[:, None])[:, 0], t)
        return -torch.minimum(r * a, torch.clamp(r, 0.8, 1.2) * a).mean()

    def maximum(z, t, p):
        r, a = ratio((z * _one_hot(t)).sum(-1) - z.logsumexp(-1), t)
        return torch.max(-a * r, -a * torch.clamp(r, 1 - 0.2, 1 + 0.2)).mean()

    def where(z, t, p):
        r, a = ratio(logp_of(z, t), t)
        clipped = r.clamp(0.8, 1.2)
        return -torch.where(r * a < clipped * a, r * a, clipped * a).mean()

    def quotient(z, t, p):
        old, a, _ = setting(t)
        r = F.softmax(z, -1).gather(1, t[:, None])[:, 0] / old.exp()
        return -torch.min(r * a, r.clamp(0.8, 1.2) * a).mean()

    return {
        "min": minimum,
        "gather": gathered,
        "max": maximum,
        "where": where,
        "quotient": quotient,
    }


@family("ppo with an entropy bonus", loss=True, target=_classes)
def _ppo_entropy():
    def distribution(z, t, p):
        d = Categorical(logits=z, validate_args=False)
        r = torch.exp(d.log_prob(t) + 1.7)
        a = t.double() - 2.2
        return (-torch.min(r * a, r.clamp(0.8, 1.2) * a) - 0.1 * d.entropy()).mean()

    def by_hand(z, t, p):
        logp = F.log_softmax(z, -1)
        r = torch.exp(logp.gather(1, t[:, None])[:, 0] + 1.7)
        a = t.double() - 2.2
        loss = -torch.min(r * a, r.clamp(0.8, 1.2) * a).mean()
        return loss + 0.1 * (logp.exp() * logp).sum(-1).mean()

    return {"Categorical": distribution, "by hand": by_hand}


# ------------------------------------------------------------------ losses of the whole tensor


@family("root mean square", loss=True, target=_numbers)
def _root_mean_square():
    return {
        "sqrt": lambda z, t, p: torch.sqrt(((z - t) ** 2).mean()),
        "norm": lambda z, t, p: (z - t).norm() / z.numel() ** 0.5,
        "vector_norm": lambda z, t, p: torch.linalg.vector_norm(z - t) * z.numel() ** -0.5,
        "pow": lambda z, t, p: F.mse_loss(z, t) ** 0.5,
        "by log": lambda z, t, p: torch.exp(0.5 * torch.log((z - t).square().mean())),
        "of rows": lambda z, t, p: ((z - t) ** 2).mean(-1).mean().sqrt(),
        "of columns": lambda z, t, p: ((z - t) ** 2).sum(0).sum().div(z.numel()).sqrt(),
    }


@family("log of a mean", loss=True, target=_numbers)
def _log_of_mean():
    return {
        "log mean exp": lambda z, t, p: (z * t).exp().mean().log(),
        "logsumexp": lambda z, t, p: (
            (z * t).flatten().logsumexp(0) - torch.ones_like(z).sum().log()
        ),
        "rows, then columns": lambda z, t, p: (
            (z * t).logsumexp(-1).logsumexp(-1) - torch.ones_like(z).sum().log()
        ),
        "sum": lambda z, t, p: torch.log(torch.exp(z * t).sum() / z.numel()),
    }


@family("loss of a norm of the batch", loss=True, target=_classes, shape=(6,))
def _in_batch_softmax():
    """A softmax over classes whose temperature is the size of the whole batch of logits."""

    def by_hand(z, t, p):
        z = z / (z * z).sum().sqrt()
        return -(z - z.exp().sum(-1, keepdim=True).log()).gather(1, t[:, None]).mean()

    return {
        "F": lambda z, t, p: F.cross_entropy(z / z.norm(), t),
        "by hand": by_hand,
    }


# ------------------------------------------------------------------ attention

HEAD = dict.fromkeys(("q", "k", "v"), (6, 6))


def _heads(x, p):
    """(N, 5, 6) -> three of (N, 2, 5, 3)."""
    return [(x @ p[n]).view(x.shape[0], 5, 2, 3).transpose(1, 2) for n in "qkv"]


def _attentions(causal):
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if causal else None

    def masked(scores):
        return scores if mask is None else scores.masked_fill(~mask, -math.inf)

    def join(y):
        return y.transpose(1, 2).flatten(2)

    def sdpa(x, p):
        return join(F.scaled_dot_product_attention(*_heads(x, p), is_causal=causal))

    def given_mask(x, p):
        return join(F.scaled_dot_product_attention(*_heads(x, p), attn_mask=mask))

    def matmul(x, p):
        q, k, v = _heads(x, p)
        return join(F.softmax(masked(q @ k.transpose(-2, -1) / math.sqrt(3)), -1) @ v)

    def by_hand(x, p):
        q, k, v = _heads(x, p)
        e = masked((q * 3**-0.5) @ k.transpose(-2, -1)).exp()
        return join((e / e.sum(-1, keepdim=True)) @ v)

    def einsum(x, p):
        q, k, v = ((x @ p[n]).view(x.shape[0], 5, 2, 3) for n in "qkv")
        a = masked(torch.einsum("nihd,njhd->nhij", q, k) / math.sqrt(3)).softmax(-1)
        return torch.einsum("nhij,njhd->nihd", a, v).flatten(2)

    def einsum_all(x, p):
        q, k, v = (torch.einsum("nic,chd->nihd", x, p[n].view(6, 2, 3)) for n in "qkv")
        s = masked(torch.einsum("nihd,njhd->nhij", q, k) * 3**-0.5)
        s = s - s.amax(-1, keepdim=True)
        a = s.exp() / s.exp().sum(-1, keepdim=True)
        return torch.einsum("nhij,njhd->nihd", a, v).reshape(x.shape)

    return {
        "sdpa": sdpa,
        "sdpa with a mask": given_mask,
        "matmul": matmul,
        "by hand": by_hand,
        "einsum": einsum,
        "einsum throughout": einsum_all,
    }


@family("attention", shape=(5, 6), params=HEAD)
def _attention():
    return _attentions(False)


@family("causal attention", shape=(5, 6), params=HEAD)
def _causal_attention():
    return _attentions(True)


@family("attention without its scale in one place", shape=(5, 6), params=HEAD)
def _query_norm():
    def named(x, p):
        q, k, v = _heads(x, p)
        q, k = F.normalize(q, dim=-1), F.rms_norm(k, (3,), eps=1e-6)
        return F.scaled_dot_product_attention(q, k, v, scale=1.3).transpose(1, 2).flatten(2)

    def by_hand(x, p):
        q, k, v = _heads(x, p)
        q = q / (q * q).sum(-1, keepdim=True).sqrt()
        k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        a = torch.softmax(1.3 * torch.einsum("nhid,nhjd->nhij", q, k), -1)
        return (a @ v).transpose(1, 2).flatten(2)

    return {"named": named, "by hand": by_hand}


# ------------------------------------------------------------------ sharing and repeating


@family("a shared sigmoid", params={"z": (6,), "w": (6, 6)})
def _shared():
    def also(s, p):
        return torch.tanh(s @ p["w"])

    return {
        "silu": lambda x, p: p["z"] * F.silu(x) + also(torch.sigmoid(x), p),
        "shared": lambda x, p: (lambda s: (p["z"] * x) * s + also(s, p))(torch.sigmoid(x)),
        "repeated": lambda x, p: p["z"] * x * torch.sigmoid(x) + also(torch.sigmoid(x), p),
        "shared, other order": lambda x, p: (lambda s: also(s, p) + x * (s * p["z"]))(x.sigmoid()),
    }


@family("a sigmoid that only another layer shares", params={"z": (6,), "w": (6, 6)})
def _shared_deep():
    """The other use is a level further from the loss, and comes back as a gate."""

    def gate(s, p):
        return F.softplus(s @ p["w"])

    return {
        "silu": lambda x, p: p["z"] * F.silu(x) * gate(torch.sigmoid(x), p),
        "shared": lambda x, p: (lambda s: (p["z"] * x) * s * gate(s, p))(torch.sigmoid(x)),
        "repeated": lambda x, p: (p["z"] * x) * x.sigmoid() * gate(1 / (1 + (-x).exp()), p),
    }


@family("a shared norm", params={"w": (6, 6), "v": (6, 6)})
def _shared_norm():
    """Used as it is, through one layer, and through two."""

    def named(x, p):
        y = F.layer_norm(x, (6,))
        return y * torch.sigmoid(y @ p["w"]) + torch.tanh(torch.sin(y @ p["w"]) @ p["v"])

    def by_hand(x, p):
        d = x - x.mean(-1, keepdim=True)
        y = d / ((d * d).mean(-1, keepdim=True) + 1e-5).sqrt()
        return y * torch.sigmoid(y @ p["w"]) + torch.tanh(torch.sin(y @ p["w"]) @ p["v"])

    def repeated(x, p):
        def norm(x):
            m = x.mean(-1, keepdim=True)
            return (x - m) * ((x * x).mean(-1, keepdim=True) - m * m + 1e-5).rsqrt()

        return norm(x) * torch.sigmoid(norm(x) @ p["w"]) + torch.tanh(
            torch.sin(F.layer_norm(x, (6,)) @ p["w"]) @ p["v"]
        )

    return {"named": named, "by hand": by_hand, "repeated": repeated}


@family("a temperature under losses along rows and along columns", shape=(3, 4), params={"t": ()})
def _shared_temperature():
    def both(rows, columns):
        return (rows - rows.logsumexp(-1, True)).tanh().sum((-1, -2)), (
            columns - columns.logsumexp(-2, True)
        ).square().sum((-1, -2))

    def shared(x, p):
        z = x * p["t"].exp()
        return torch.stack(both(z, z), -1)

    def swapped(x, p):
        z = x * p["t"].exp()
        columns = (z - z.logsumexp(-2, True)).square().sum((-1, -2))
        return torch.stack([(z - z.logsumexp(-1, True)).tanh().sum((-1, -2)), columns], -1)

    def transposed(x, p):
        z = x * p["t"].exp()
        turned = z.mT - z.mT.logsumexp(-1, True)
        rows = (z - z.logsumexp(-1, True)).tanh().sum((-1, -2))
        return torch.stack([rows, turned.square().sum((-1, -2))], -1)

    return {
        "shared": shared,
        "columns first": swapped,
        "transposed": transposed,
        "twice": lambda x, p: torch.stack(both(x * p["t"].exp(), p["t"].exp() * x), -1),
    }


@family("a squeeze and excitation gate", shape=(6, 4), params={"w": (6, 6)})
def _squeeze_excite():
    return {
        "mean": lambda x, p: x * torch.sigmoid(x.mean(-1) @ p["w"])[:, :, None],
        "pool": lambda x, p: (
            x * torch.sigmoid(F.adaptive_avg_pool1d(x, 1)[..., 0] @ p["w"]).unsqueeze(-1)
        ),
        "sum": lambda x, p: x / (1 + torch.exp(-(x.sum(-1) / 4) @ p["w"]))[:, :, None],
    }


# ------------------------------------------------------------------ the comparison


def _setting(name, spelling):
    """The network, and its arguments for each number of samples."""
    made = FAMILIES[name]
    torch.manual_seed(2)
    batches = [torch.randn(n, 4).double() for n in made.sizes]
    target = made.target or (lambda n: torch.linspace(-1, 1, 3 * n).double().reshape(n, 3))
    return Net(made, made.spellings[spelling]), [(x, target(x.shape[0])) for x in batches]


def _call(name, spelling):
    net, batches = _setting(name, spelling)
    hs = hesscale_fx.transform(net, None, batches[0])
    results = []
    for args in batches:
        torch.manual_seed(3)
        results.append(hs(*args))
    return results


@cache
def _first(name):
    return _call(name, next(iter(FAMILIES[name].spellings)))


def _pairs():
    for name, made in FAMILIES.items():
        for i, spelling in enumerate(list(made.spellings)[1:]):
            marks = [pytest.mark.slow] if i else []
            yield pytest.param(name, spelling, id=f"{name}: {spelling}", marks=marks)


@pytest.mark.parametrize(("name", "spelling"), list(_pairs()))
def test_same_mathematics_same_answer(name, spelling):
    for size, want, got in zip(
        FAMILIES[name].sizes, _first(name), _call(name, spelling), strict=True
    ):
        assert relative_error(got.loss, want.loss) < 1e-12
        assert_close(dict(got.grads), dict(want.grads), TOLERANCE, f"gradients at {size}")
        assert_close(dict(got.hess_diag), dict(want.hess_diag), TOLERANCE, f"curvature at {size}")
        assert all(h.isfinite().all() for h in got.hess_diag.values())


@pytest.mark.parametrize("name", list(some(FAMILIES, 4)))
def test_gradients_are_autograds(name):
    net, batches = _setting(name, next(iter(FAMILIES[name].spellings)))
    torch.manual_seed(3)
    loss = net(*batches[0])
    grads = torch.autograd.grad(loss, list(net.parameters()))
    want = {n: g for (n, _), g in zip(net.named_parameters(), grads, strict=True)}
    assert relative_error(_first(name)[0].loss, loss) < 1e-12
    assert_close(dict(_first(name)[0].grads), want, TOLERANCE, "gradients")


# ------------------------------------------------------------------ what differs, as it must


def test_a_detached_factor_differs():
    square = Family({"": lambda x, p: x * x})
    detached = Family({"": lambda x, p: x * x.detach()})
    constant = Family({"": lambda x, p: x.detach() * x.clone()})
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()

    def call(made):
        return hesscale_fx.transform(Net(made, made.spellings[""]), None, (x, y))(x, y)

    a, b, c = call(square), call(detached), call(constant)
    assert torch.equal(a.loss, b.loss)
    assert relative_error(b.grads["before.bias"], a.grads["before.bias"] / 2) < 1e-12
    assert relative_error(b.hess_diag["before.bias"], a.hess_diag["before.bias"]) > 0.1
    assert_close(dict(c.hess_diag), dict(b.hess_diag), TOLERANCE, "curvature")


# ------------------------------------------------------------------ dropout, recurrent layers


def test_dropout_is_a_mask_multiply():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

        def forward(self, x, y, mask=None):
            h = F.silu(self.first(x))
            h = F.dropout(h, 0.3) if mask is None else h * mask
            return ((torch.tanh(self.second(h)) - y) ** 2).mean()

    x, y = torch.randn(7, 4).double(), torch.randn(7, 3).double()
    torch.manual_seed(5)
    mask = torch.native_dropout(torch.ones(7, 6).double(), 0.3, True)[0]
    assert 0 < (mask == 0).sum() < mask.numel()
    hs = hesscale_fx.transform(Masked(), None, (x, y))
    torch.manual_seed(5)
    got = hs(x, y)
    want = hesscale_fx.transform(Masked(), None, (x, y, mask))(x, y, mask)
    assert relative_error(got.loss, want.loss) < 1e-12
    assert_close(dict(got.hess_diag), dict(want.hess_diag), TOLERANCE, "curvature")


class _Recurrent(nn.Module):
    """Three steps of a recurrent layer, its parameters in the order of torch's cells."""

    def __init__(self, kind, step):
        super().__init__()
        torch.manual_seed(1)
        self.kind, self.step = kind, step
        gates = {"lstm": 16, "gru": 12}[kind]
        shapes = [(gates, 5), (gates, 4), (gates,), (gates,)]
        names = ["w_ih", "w_hh", "b_ih", "b_hh"]
        self.before = nn.Linear(3, 5)
        self.p = nn.ParameterDict(
            {n: nn.Parameter(torch.randn(s) * 0.5) for n, s in zip(names, shapes, strict=True)}
        )
        self.after = nn.Linear(4, 2)
        self.double()

    def forward(self, x, y):
        x = torch.tanh(self.before(x))
        state = x.new_zeros(x.shape[0], 4)
        state = (state, state) if self.kind == "lstm" else state
        out = self.step(x, state, [self.p[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh")])
        return ((torch.tanh(self.after(out)) - y) ** 2).mean()


def _lstm_by_hand(x, state, w):
    h, c = state
    for t in range(3):
        z = x[:, t] @ w[0].T + w[2] + h @ w[1].T + w[3]
        i, f, g, o = z.chunk(4, 1)
        c = f.sigmoid() * c + torch.tanh(g) / (1 + torch.exp(-i))
        h = torch.tanh(c) * torch.sigmoid(o)
    return h


def _lstm_cell(x, state, w):
    for t in range(3):
        state = torch.lstm_cell(x[:, t], state, *w)
    return state[0]


def _lstm_layer(x, state, w):
    h = [s[None] for s in state]
    return torch.lstm(x, h, w, True, 1, 0.0, False, False, True)[0][:, -1]


def _gru_by_hand(x, h, w):
    for t in range(3):
        a, b = F.linear(x[:, t], w[0], w[2]), F.linear(h, w[1], w[3])
        (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
        r, z = 1 / (1 + torch.exp(-ar - br)), torch.sigmoid(az + bz)
        n = torch.tanh(an + r * bn)
        h = n + z * (h - n)
    return h


def _gru_cell(x, h, w):
    for t in range(3):
        h = torch.gru_cell(x[:, t], h, *w)
    return h


def _gru_layer(x, h, w):
    return torch.gru(x, h[None], w, True, 1, 0.0, False, False, True)[0][:, -1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "spellings"),
    [
        ("lstm", (_lstm_cell, _lstm_by_hand, _lstm_layer)),
        ("gru", (_gru_cell, _gru_by_hand, _gru_layer)),
    ],
    ids=["lstm", "gru"],
)
def test_recurrent_layers(kind, spellings):
    batches = [(torch.randn(n, 3, 3).double(), torch.randn(n, 2).double()) for n in SIZES]
    results = []
    for step in spellings:
        hs = hesscale_fx.transform(_Recurrent(kind, step), None, batches[0])
        results.append([hs(*b) for b in batches])
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            assert relative_error(a.loss, b.loss) < 1e-12
            assert_close(dict(a.hess_diag), dict(b.hess_diag), TOLERANCE, "curvature")


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_modules(kind):
    """nn.LSTMCell and nn.LSTM, nn.GRUCell and nn.GRU."""

    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.rnn = getattr(nn, f"{kind}Cell")(3, 4).double()

        def forward(self, x, y):
            state, loss = None, 0.0
            for t in range(3):
                state = self.rnn(x[:, t], state)
                loss = loss + (((state[0] if kind == "LSTM" else state) - y) ** 2).mean()
            return loss / 3

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.rnn = getattr(nn, kind)(3, 4, batch_first=True).double()

        def forward(self, x, y):
            return ((self.rnn(x)[0] - y[:, None]) ** 2).mean()

    x, y = torch.randn(7, 3, 3).double(), torch.randn(7, 4).double()
    cells, layer = (hesscale_fx.transform(m(), None, (x, y))(x, y) for m in (Cells, Layer))
    assert relative_error(layer.loss, cells.loss) < 1e-12
    got = {n.removesuffix("_l0"): h for n, h in layer.hess_diag.items()}
    assert_close(got, dict(cells.hess_diag), TOLERANCE, "curvature")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {}),
        pytest.param("GRU", {"bias": False}, marks=pytest.mark.slow),
        pytest.param("RNN", {"bidirectional": True, "num_layers": 2}, marks=pytest.mark.slow),
    ],
    ids=["lstm", "gru", "rnn"],
)
def test_recurrent_layers_leave_the_batch_free(kind, options):
    """They are written into the graph after it was captured, from one trace of a step."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.rnn = getattr(nn, kind)(2, 3, batch_first=True, **options)
            self.head = nn.Linear(6 if self.rnn.bidirectional else 3, 2)
            self.double()

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    net, loss = Classifier(), nn.CrossEntropyLoss()
    batches = [(torch.randn(n, 2, 2).double(), torch.arange(n) % 2) for n in (2, 1, 5)]
    hs = hesscale_fx.transform(net, loss, batches[0])
    for x, y in batches[1:]:
        got, want = hs(x, y), reference(net, loss, (x,), (y,)).hess_diag
        want = {name: want[name] for name in got.hess_diag}
        assert_close(dict(got.grads), autograd(net, loss, (x,), (y,))[1], TOLERANCE, "gradient")
        assert_close(dict(got.hess_diag), want, TOLERANCE, "curvature")


# ------------------------------------------------------------------ ways of capture


class _Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        return self.last(F.gelu(self.norm(self.first(x))))


@pytest.mark.parametrize("way", ["lazy", "symbolic_trace", "export"])
def test_ways_of_capture(way):
    loss = nn.CrossEntropyLoss()
    batches = [(torch.randn(n, 4).double(), torch.arange(n) % 3) for n in SIZES]
    eager = hesscale_fx.transform(_Classifier(), loss, batches[0])
    if way == "lazy":
        hs = hesscale_fx.transform(_Classifier(), loss)
    elif way == "symbolic_trace":
        hs = hesscale_fx.transform(torch.fx.symbolic_trace(_Classifier()), loss, batches[0])
    else:
        free = ({0: torch.export.Dim.AUTO},)
        program = torch.export.export(_Classifier(), batches[0][:1], dynamic_shapes=free)
        hs = hesscale_fx.transform(program, loss, batches[0])
    for batch in batches:
        got, want = hs(*batch), eager(*batch)
        assert relative_error(got.loss, want.loss) < 1e-12
        assert_close(dict(got.hess_diag), dict(want.hess_diag), TOLERANCE, "curvature")


# ------------------------------------------------------------------ extremes of a row


def _head(f, x):
    """Curvature of the input of f."""

    class Head(nn.Module):
        def forward(self, x):
            return f(x)

    return hesscale_fx.transform(Head(), None, (x,), wrt="inputs")(x).hess_diag["x"]


def _stable(x):
    z = x - x.amax(-1, keepdim=True)
    return z - z.exp().sum(-1, keepdim=True).log()


@pytest.mark.parametrize(
    "logp",
    [lambda x: F.log_softmax(x, -1), _stable, lambda x: x - x.logsumexp(-1, keepdim=True)],
    ids=["F", "by hand", "logsumexp"],
)
def test_logits_of_size_1e4_lose_no_digits(logp):
    small = torch.randint(-64, 64, (3, 6)).double() / 16
    p = F.softmax(small, -1)
    for shift in (1e4, -1e4):  # exact in floating point, and without effect on the loss
        got = _head(lambda x: -logp(x)[:, 0].sum(), small + shift)
        assert relative_error(got, p - p * p) < 1e-12


def test_softmax_of_logits_far_apart_is_finite():
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4 - 1]]).double()
    p = F.softmax(x, -1)
    got = _head(lambda x: -_stable(x)[:, 0].sum(), x)
    assert relative_error(got, p - p * p) < 1e-12
    named = _head(lambda x: F.softmax(x, -1).square().sum(), x)
    by_hand = _head(lambda x: _stable(x).exp().square().sum(), x)
    assert named.isfinite().all()
    assert relative_error(by_hand, named) < TOLERANCE


_ROWS = {
    "softmax": lambda x: (F.softmax(x, -1) * torch.sin(x)).sum(),
    "softmax by hand": lambda x: (_stable(x).exp() * torch.sin(x)).sum(),
    "layer norm": lambda x: (F.layer_norm(x, x.shape[-1:]) * torch.sin(x)).sum(),
    "rms norm by hand": lambda x: torch.sin(
        x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    ).sum(),
    "logsumexp": lambda x: torch.logsumexp(x, -1).square().sum(),
    "norm": lambda x: torch.sqrt((x * x).mean()),
}


@pytest.mark.parametrize("size", [1, 2, 10_000])
@pytest.mark.parametrize("name", list(_ROWS))
def test_rows_of_any_length(name, size):
    f = _ROWS[name]
    x = torch.randn(2, size).double()
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    entries = [(i, j) for i in range(2) for j in {0, size // 2, size - 1}]

    def second(e):
        if not grad.requires_grad:
            return grad[e]
        return torch.autograd.grad(grad[e], leaf, retain_graph=True)[0][e]

    want = torch.stack([second(e) for e in entries])
    got = _head(f, x)
    got = torch.stack([got[e] for e in entries])
    assert (got - want).abs().max() <= 1e-10 * max(want.abs().max().item(), 1e-3 / size)


# ------------------------------------------------------------------ one tensor along two axes


def _rows(z):
    return z.unsqueeze(1), z.unsqueeze(0)


_PAIRS = {
    "distances": lambda z: (torch.sub(*_rows(z)).square().sum(-1) / -2).exp(),
    "quotients": lambda z: z.unsqueeze(1) / (2 + z.unsqueeze(0).square()),
    "softmax of products": lambda z: (z.T.unsqueeze(2) * z.T.unsqueeze(1)).softmax(-1),
    "flattened": lambda z: z.reshape(-1)[:, None] * z.reshape(-1)[None].exp(),
    "triples": lambda z: z[:, None, None] * z[None, :, None].tanh() * (z[None, None] + 1),
}


@pytest.mark.parametrize("name", _PAIRS)
def test_pairs_of_one_tensor(name):
    """A function of all pairs of rows is one unit: exact where what follows is elementwise."""
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def loss(z):
        y = _PAIRS[name](z)
        w = torch.arange(1.0, 1 + y.numel()).double().cos().reshape(y.shape)
        return (w * y + y.sin()).sum()

    (found,) = hesscale_fx.transform(loss, wrt="inputs")(z.detach()).hess_diag.values()
    exact = exact_hessian_diagonal(lambda: loss(z), {"z": z})["z"]
    assert relative_error(found, exact) < TOLERANCE
