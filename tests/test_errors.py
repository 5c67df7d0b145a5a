"""Bad input: never a wrong number, always the culprit and the way out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesscale_fx
from hesscale_fx import HesScaleError

LOSS = nn.CrossEntropyLoss()


def raises(builtin, *words):
    """A HesScaleError that is also the builtin that fits, and whose message has the words."""
    pattern = "(?is)" + "".join(f"(?=.*(?:{w}))" for w in words)
    info = pytest.raises(HesScaleError, match=pattern)

    class Both:
        def __enter__(self):
            self.info = info.__enter__()
            return self.info

        def __exit__(self, *error):
            done = info.__exit__(*error)
            assert isinstance(self.info.value, builtin), type(self.info.value).__mro__
            text = str(self.info.value)
            assert len(text) < 3000, "a page, not a message"
            return done

    return Both()


class Fn(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fc, self.fn = nn.Linear(4, 3), fn

    def forward(self, *args):
        return self.fn(self.fc, *args)


def x(n=5):
    return torch.randn(n, 4)


def test_no_scalar_and_no_loss():
    with raises((TypeError, ValueError), "scalar", "loss"):
        hesscale_fx.transform(nn.Linear(4, 3), example_inputs=(x(),))


def test_a_loss_that_is_no_scalar():
    with raises((TypeError, ValueError), "scalar", r"5, 3|reduction"):
        hesscale_fx.transform(nn.Linear(4, 3), lambda out: out.square(), (x(),))


def test_no_tensor_at_all():
    with raises((TypeError, ValueError), "loss|scalar"):
        hesscale_fx.transform(Fn(lambda fc, x: None), example_inputs=(x(),))


def test_a_complex_loss():
    with raises((TypeError, ValueError), "complex"):
        hesscale_fx.transform(Fn(lambda fc, x: (fc(x) * 1j).sum()), example_inputs=(x(),))


def test_an_integer_loss():
    with raises((TypeError, ValueError), "int"):
        hesscale_fx.transform(Fn(lambda fc, x: fc(x).argmax(-1).sum()), example_inputs=(x(),))


def test_a_lazy_module_says_it_at_the_first_call():
    hs = hesscale_fx.transform(nn.Linear(4, 3))
    with raises((TypeError, ValueError), "scalar", "loss"):
        hs(x())


def branching(fc, x):
    y = fc(x)
    if y.sum() > 0:
        y = y * 2
    return y.square().mean()


def test_a_call_that_takes_another_branch_than_the_captured_one():
    net, positive = Fn(branching), x()
    with torch.no_grad():
        net.fc.bias.fill_(100.0)
    hs = hesscale_fx.transform(net, example_inputs=(positive,))
    assert torch.equal(hs(positive).loss, net(positive))
    with torch.no_grad():
        net.fc.bias.fill_(-100.0)
    with raises(ValueError, "transform") as info:
        hs(positive)
    text = str(info.value)
    assert "test_errors.py" in text and "y.sum()" in text, "the user's own line"
    assert len(text.splitlines()) <= 2


def test_a_number_that_another_call_would_read_otherwise():
    first = torch.full((5, 4), 2.5)
    net = Fn(lambda fc, x: fc(x).mean() * int(x[0, 0]))
    hs = hesscale_fx.transform(net, example_inputs=(first,))
    assert torch.equal(hs(first * 1.1).loss, net(first * 1.1))
    with raises(ValueError, r"gave 2", "test_errors.py"):
        hs(first * 2)


@pytest.mark.parametrize(
    "cut", [lambda y: y.detach().numpy() * 2, lambda y: y.detach().__array__()]
)
def test_a_numpy_round_trip(cut):
    def body(fc, x):
        y = fc(x)
        return (torch.from_numpy(cut(y)) * y).mean()

    with raises(RuntimeError, "numpy") as info:
        hesscale_fx.transform(Fn(body), example_inputs=(x(),))
    assert len(str(info.value).splitlines()) == 2


@torch.library.custom_op("hesscale_fx_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


cube.register_fake(torch.empty_like)
cube.register_autograd(
    lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("hesscale_fx_tests::halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


halved.register_fake(torch.empty_like)
halved.register_autograd(lambda ctx, g: g / 2)


def test_operators_without_a_structure_are_named_all_at_once():
    def body(fc, x):
        y = fc(x)
        return cube(y).sum() + halved(y).sum()

    ways = ("register", 'fallback="exact"', 'fallback="estimate"')
    with raises(NotImplementedError, "cube", "halved", *ways, "5, 3") as info:
        hesscale_fx.transform(Fn(body), example_inputs=(x(),))
    assert "test_errors.py" in str(info.value), "the user's own line"


def test_an_operator_beside_the_path_does_not_matter():
    def body(fc, x):
        return fc(x).square().mean() + cube(x).mean()

    net = Fn(body)
    out = hesscale_fx.transform(net)(x())
    assert out.hess_diag["fc.weight"].any()


@pytest.fixture
def hs():
    return hesscale_fx.transform(nn.Linear(4, 3), LOSS, (x(), torch.randint(3, (5,))))


def y(n=5):
    return torch.randint(3, (n,))


def test_too_few_arguments(hs):
    with raises((TypeError, ValueError), "argument"):
        hs(x())


def test_too_many_arguments(hs):
    with raises((TypeError, ValueError), "argument"):
        hs(x(), y(), y())


def test_an_unknown_keyword(hs):
    with raises((TypeError, ValueError), "mask"):
        hs(x(), y(), mask=None)


def test_another_width(hs):
    with raises(ValueError, "shape", "4", "7", "transform"):
        hs(torch.randn(5, 7), y())


def test_another_rank(hs):
    with raises(ValueError, "shape"):
        hs(torch.randn(5, 2, 4), y())


def test_batches_that_disagree(hs):
    with raises(ValueError, "shape", "6"):
        hs(x(5), y(6))


def test_another_dtype(hs):
    with raises((TypeError, ValueError), "float64", "float32"):
        hs(x().double(), y())


def test_another_device(hs):
    with raises((TypeError, ValueError), "meta", "cpu"):
        hs(x().to("meta"), y())


def test_no_tensor_where_one_belongs(hs):
    with raises((TypeError, ValueError), "list|tensor|argument"):
        hs([[1.0] * 4] * 5, y())


def test_another_mode():
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout())
    hs = hesscale_fx.transform(net, LOSS, (x(), y()))
    net.eval()
    with raises((ValueError, RuntimeError), "train|eval"):
        hs(x(), y())
    net.train()
    hs(x(), y())


def test_too_few_arguments_when_lazy():
    with raises((TypeError, ValueError, RuntimeError)):
        hesscale_fx.transform(nn.Linear(4, 3), LOSS)(x())


@pytest.mark.parametrize("wrt", ["nothing", ["weight", "nothing"], "encoder.*", lambda n, p: False])
def test_wrt_that_matches_nothing(wrt):
    words = () if callable(wrt) else ("nothing|encoder", "weight")
    with raises((KeyError, ValueError), "wrt|match", *words):
        hesscale_fx.transform(nn.Linear(4, 3), LOSS, wrt=wrt)


def test_no_parameter_to_differentiate():
    net = nn.Linear(4, 3).requires_grad_(False)
    with raises(ValueError, "parameter", "wrt|requires_grad"):
        hesscale_fx.transform(net, LOSS, (x(), y()))


def test_inputs_without_a_floating_point_one():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    with raises((KeyError, ValueError, TypeError), "inputs", "float"):
        hesscale_fx.transform(net, LOSS, (torch.randint(5, (5, 2)), y()), wrt="inputs")


def test_complex_parameters():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, dtype=torch.complex64))

        def forward(self, x):
            return (x * self.w).abs().square().sum()

    with raises((TypeError, ValueError), "complex", "'?w'?"):
        hesscale_fx.transform(Complex(), example_inputs=(torch.randn(3),))


@pytest.mark.parametrize(
    "body", [lambda fc, x: fc(x.mul_(2)).mean(), lambda fc, x: fc(x.clamp_(0)).square().mean()]
)
def test_a_model_that_writes_into_its_inputs(body):
    argument = x()
    before = argument.clone()
    with raises((RuntimeError, TypeError, ValueError), "input", "clone|copy|out of place|in place"):
        hesscale_fx.transform(Fn(body), example_inputs=(argument,))
    assert torch.equal(argument, before)


def test_an_unknown_method():
    with raises(ValueError, "newton", "hesscale", "hesscale_gn"):
        hesscale_fx.transform(nn.Linear(4, 3), LOSS, method="newton")


def test_gauss_newton_without_a_boundary():
    with raises(ValueError, "hesscale_gn", "loss"):
        hesscale_fx.transform(
            Fn(lambda fc, x: fc(x).square().mean()), example_inputs=(x(),), method="hesscale_gn"
        )


@pytest.mark.parametrize("model", [None, 3, "net", torch.ones(2)])
def test_something_that_is_no_model(model):
    with raises((TypeError, ValueError), "Module"):
        hesscale_fx.transform(model)


def test_a_loss_that_cannot_be_called():
    with raises((TypeError, ValueError), "loss", "callable"):
        hesscale_fx.transform(nn.Linear(4, 3), 3)


def test_example_inputs_that_are_no_tuple():
    with raises((TypeError, ValueError), "example_inputs", "tuple"):
        hesscale_fx.transform(nn.Linear(4, 3), lambda o: o.square().mean(), x())


def test_the_model_s_own_error_stays_readable():
    with raises((RuntimeError, ValueError), "shape|size|4"):
        hesscale_fx.transform(nn.Linear(4, 3), LOSS, (torch.randn(5, 7), y()))


def test_functions_of_torch_are_not_mistaken_for_models_with_parameters():
    with raises(ValueError, "parameter|wrt"):
        hesscale_fx.transform(lambda x: F.relu(x).sum(), example_inputs=(x(),))


def test_writing_into_a_tensor_of_nobody():
    x, mean, var = torch.randn(3, 4), torch.zeros(4), torch.ones(4)

    def model(x):
        return torch.nn.functional.batch_norm(x, mean, var, training=True).square().sum()

    with raises(TypeError, "neither a buffer", "register_buffer"):
        hesscale_fx.transform(model, None, (x,), wrt="inputs")
