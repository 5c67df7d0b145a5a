"""The layout of images for a compiler, and memory kept from call to call."""

import platform
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import hesscale_fx
from hesscale_fx.layouts import channels_last

aten = torch.ops.aten
NETS = {
    2: (nn.Conv2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
    3: (nn.Conv3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d),
}


def convolutional(dims: int) -> tuple[nn.Module, torch.Tensor]:
    convolution, pool, average = NETS[dims]
    net = nn.Sequential(
        *(convolution(2, 4, 3, padding=1), nn.Tanh(), pool(2)),
        *(convolution(4, 3, 3, padding=1), average(1), nn.Flatten()),
    )
    return net.double(), torch.randn(5, 2, *[6] * dims, dtype=torch.double)


def strides(graph: torch.fx.Graph) -> list[bool]:
    """Whether each forward convolution's input is made channels-last."""
    found = graph.find_nodes(op="call_function", target=aten.convolution.default)
    return [node.args[0].target is aten.contiguous.default for node in found]


@pytest.mark.parametrize("dims", NETS)
def test_convolutions_get_channels_last_inputs_and_the_same_numbers(dims):
    torch.manual_seed(0)
    net, x = convolutional(dims)
    y = torch.tensor([0, 1, 2, 0, 1])
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss(), (x, y))
    before = hs(x, y)
    assert channels_last(hs.graph) and strides(hs.graph) == [True, True]
    hs.recompile()
    torch.testing.assert_close(hs(x, y), before)


def test_other_networks_are_left_alone():
    hs = hesscale_fx.transform(nn.Linear(3, 2), nn.CrossEntropyLoss())
    hs.materialize(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    assert not channels_last(hs.graph)


def test_only_a_compiler_gets_the_layout():
    net, x = convolutional(2)
    y = torch.tensor([0, 1, 2, 0, 1])
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss(), (x, y), every=2)
    seen = []

    def look(graph, inputs):
        seen.append(sum(n.target == aten.contiguous.default for n in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(hs, backend=look, fullgraph=True)
    for _ in range(2):  # with curvature, and the gradient alone
        torch.testing.assert_close(compiled(x, y).grads, hs.forward(x, y).grads)
    assert seen == [2, 2]
    assert strides(hs.graph) == [False, False]


FAULTS = """
import resource, torch, hesscale_fx
from torch import nn
first, second = nn.Linear(784, 512), nn.Linear(512, 512)
net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(512, 10))
x, y = torch.randn(128, 784), torch.randint(10, (128,))
hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
for _ in range(10):
    hs(x, y)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    hs(x, y)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about the allocator of glibc")
def test_a_step_does_not_ask_the_system_for_its_memory_again():
    """The results alone are 1300 pages, which were asked for again at each call."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAULTS], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 300


def test_the_backend_lays_out_the_first_convolution_too():
    torch.manual_seed(0)
    net, x = convolutional(2)
    y = torch.tensor([0, 1, 2, 0, 1])

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(net(x), y)

    torch.compile(loss, backend="hesscale")().backward()
    expected = hesscale_fx.transform(net, nn.CrossEntropyLoss())(x, y).hess_diag
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.hesscale, expected[name])


def test_a_compiled_convolution_takes_any_batch():
    net, _ = convolutional(2)
    x, y = torch.randn(5, 2, 6, 6, dtype=torch.double), torch.tensor([0, 1, 2, 0, 1])
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss(), (x, y), dynamic=True)
    made = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(hs, backend=made, fullgraph=True)
    for size in (1, 3, 5, 4, 2):
        torch.testing.assert_close(compiled(x[:size], y[:size]), hs.forward(x[:size], y[:size]))
    assert made.frame_count <= 3
