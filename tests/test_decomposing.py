"""Calls that are decomposed on their own: the same values and writes as by torch.export."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._guards import detect_fake_mode

from hesscale_fx import capture, captured, decomposing
from hesscale_fx.step import Step


class Net(nn.Module):
    """A layer, what is done with its output, a sum."""

    def __init__(self, act):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.act = act

    def forward(self, x):
        h = self.act(self, self.linear(x))
        return h.square().sum() + self.mean.sum()


def through_slice(net, h):
    y = h * 2
    y[:, 0].add_(1.0)
    return y


def base_of_view(net, h):
    v = h.view(-1, 2, 2)
    h.mul_(3.0)
    return v.flatten(1)


def view_of_base(net, h):
    h.view(-1, 2, 2).mul_(3.0)
    return h


def twice(net, h):
    net.mean.mul_(0.5).add_(h.detach().mean(0))
    net.mean.add_(1.0)
    return h * net.mean


def alias_of_buffer(net, h):
    row = net.mean.view(1, 4)
    net.mean.add_(h.detach().mean(0))
    return h * row


def transposed(net, h):
    y = h * 1.5
    y.t_()
    return y


def conjugated(net, h):
    z = torch.fft.fft(h)
    return torch.view_as_real(z * z.conj() + z * z).sum(-1)


ALONE = {
    "in place": lambda net, h: F.relu(h, inplace=True),
    "itself": lambda net, h: h.mul_(h),
    "twice": twice,
    "norm": lambda net, h: F.batch_norm(h, net.mean, net.var, training=True),
    "instance": lambda net, h: F.instance_norm(h[..., None].expand(-1, -1, 3)),
    "constant": lambda net, h: h * torch.tensor(2.0),
    "conjugated": conjugated,
    "contiguous": lambda net, h: h.contiguous().exp_() + h,
    "loop": lambda net, h: [h.tanh_() for _ in range(3)][-1],
}
TOGETHER = {
    "slice": through_slice,
    "base of view": base_of_view,
    "view of base": view_of_base,
    "alias of buffer": alias_of_buffer,
    "transposed": transposed,
    "no grad": lambda net, h: h * torch.no_grad()(lambda: h.exp())(),
}


def exported(net):
    step = Step(net, None)
    return capture.export(step, step.bind((torch.randn(3, 4),), {}), True, None, [])


def alone(program):
    values = [n.meta.get("val") for n in program.graph.nodes]
    mode = detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])
    return decomposing.decomposed(program.graph, captured.decompositions(), mode)


@pytest.mark.parametrize("name", [*ALONE, *TOGETHER])
def test_values_and_writes_are_the_models(name):
    net = Net({**ALONE, **TOGETHER}[name]).double()
    program = exported(net)
    assert (alone(program) is not None) == (name in ALONE)
    graph, signature = captured.decompose(program)
    x = torch.randn(5, 4, dtype=torch.double)
    state = {
        f"model.{k}": v.detach().clone() for k, v in [*net.named_parameters(), *net.named_buffers()]
    }
    inputs = [
        state[s.target] if s.target in state else program.constants.get(s.target, x)
        for s in signature.input_specs
    ]
    with torch.no_grad():
        found = torch.fx.Interpreter(torch.fx.GraphModule({}, graph)).run(*inputs)
        want = net(x)
    for spec, value in zip(signature.output_specs, found, strict=True):
        kind = spec.kind.name
        assert kind in ("BUFFER_MUTATION", "USER_OUTPUT")
        expected = want if kind == "USER_OUTPUT" else net.get_buffer(spec.target[6:])
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    changed = {s.target for s in signature.output_specs if s.kind.name == "BUFFER_MUTATION"}
    for key, buffer in net.named_buffers():
        assert torch.equal(buffer, state[f"model.{key}"]) or f"model.{key}" in changed


def test_equal_layers_are_traced_once(monkeypatch):
    traced = []
    original = decomposing.trace
    monkeypatch.setattr(decomposing, "trace", lambda *args: traced.append(args) or original(*args))
    counts = []
    for layers in (2, 6):
        traced.clear()
        blocks = [
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True))
            for _ in range(layers)
        ]
        program = exported(nn.Sequential(*blocks, Sum()))
        assert alone(program) is not None
        counts.append(len(traced))
    assert counts[0] == counts[1]


class Sum(nn.Module):
    def forward(self, x):
        return x.sum()
