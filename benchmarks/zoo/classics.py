"""Models and losses that every course has, written as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributions as D

from zoo.case import Case, case


def draw(*shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def made(model: nn.Module, loss: Callable | None, *args: Tensor) -> Case:
    """A case in float64, in train mode."""
    return Case(model.double().train(), loss, args)


# ------------------------------------------------------------------ sequences


class Sequence(nn.Module):
    """A recurrent classifier of token sequences."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.rnn = kind(4, 5, num_layers=2, batch_first=True, dropout=0.1, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.rnn(self.embed(ids))
        return self.head(out[:, -1])


for _kind in (nn.LSTM, nn.GRU, nn.RNN):

    @case(f"{_kind.__name__} classifier")
    def _(kind=_kind) -> Case:
        ids, y = torch.randint(11, (3, 4)), torch.randint(3, (3,))
        return made(Sequence(kind), nn.CrossEntropyLoss(), ids, y)


class PackedSequence(nn.Module):
    """The same on sequences of unequal length."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.rnn(packed)[1][-1])


@case("GRU on packed sequences")
def _() -> Case:
    args = (draw(3, 5, 4), torch.tensor([3, 5, 2]), torch.randint(3, (3,)))
    return made(PackedSequence(), nn.CrossEntropyLoss(), *args)


class CausalConvolution(nn.Module):
    """A block of a temporal convolutional network."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        conv = nn.Conv1d(width, width, 3, dilation=dilation)
        self.conv = nn.utils.parametrizations.weight_norm(conv)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + F.dropout(F.relu(self.conv(F.pad(x, (self.pad, 0)))), 0.1, self.training))


@case("TCN")
def _() -> Case:
    net = nn.Sequential(
        nn.Conv1d(2, 4, 1), CausalConvolution(4, 1), CausalConvolution(4, 2),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return made(net, nn.CrossEntropyLoss(), draw(3, 2, 8), torch.randint(3, (3,)))


class Translator(nn.Module):
    """torch.nn.Transformer with its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        out = self.body(
            self.embed(source), self.embed(target), tgt_mask=mask,
            src_key_padding_mask=source == 0, tgt_is_causal=True,
        )  # fmt: skip
        return self.head(out)


@case("nn.Transformer")
def _() -> Case:
    source, target = torch.randint(1, 11, (2, 5)), torch.randint(1, 11, (2, 4))
    source[0, -2:] = 0
    loss = lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten())  # noqa: E731
    return made(Translator(), loss, source, target, target.clone())


@case("Speech, CTC")
def _() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4, bidirectional=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0]).log_softmax(-1)

    def loss(out: Tensor, y: Tensor, times: Tensor, lengths: Tensor) -> Tensor:
        return F.ctc_loss(out, y, times, lengths)

    y = torch.randint(1, 5, (2, 3))
    args = (draw(7, 2, 3), y, torch.tensor([7, 6]), torch.tensor([3, 2]))
    return made(Net(), loss, *args)


class Fourier(nn.Module):
    """A layer of FNet: the real part of a Fourier transform mixes the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(6), mlp(6, 8, 6, activation=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real)
        return x + self.mlp(x)


@case("FNet by hand")
def _() -> Case:
    net = nn.Sequential(nn.Linear(3, 6), Fourier(), nn.Flatten(), nn.Linear(24, 3))
    return made(net, nn.CrossEntropyLoss(), draw(2, 4, 3), torch.randint(3, (2,)))


class RandomField(nn.Module):
    """A linear-chain CRF: the forward algorithm against the score of the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.emit = mlp(4, 6, 3)
        self.start, self.step = nn.Parameter(draw(3) / 2), nn.Parameter(draw(3, 3) / 2)

    def forward(self, x: Tensor, tags: Tensor) -> Tensor:
        emitted = self.emit(x)
        score = emitted.gather(2, tags.unsqueeze(2)).squeeze(2).sum(1) + self.start[tags[:, 0]]
        score = score + self.step[tags[:, :-1], tags[:, 1:]].sum(1)
        alpha = self.start + emitted[:, 0]
        for t in range(1, x.shape[1]):
            alpha = (alpha.unsqueeze(2) + self.step).logsumexp(1) + emitted[:, t]
        return (alpha.logsumexp(1) - score).mean()


@case("Linear-chain CRF")
def _() -> Case:
    return made(RandomField(), None, draw(2, 4, 4), torch.randint(3, (2, 4)))


class HiddenMarkov(nn.Module):
    """The likelihood of a hidden Markov model, in logarithms."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.step = nn.Parameter(draw(3)), nn.Parameter(draw(3, 3))
        self.emit = nn.Parameter(draw(3, 4))

    def forward(self, seen: Tensor) -> Tensor:
        step, emit = self.step.log_softmax(1), self.emit.log_softmax(1).T
        alpha = self.start.log_softmax(0) + emit[seen[:, 0]]
        for t in range(1, seen.shape[1]):
            alpha = (alpha.unsqueeze(2) + step).logsumexp(1) + emit[seen[:, t]]
        return -alpha.logsumexp(1).mean()


@case("Hidden Markov model")
def _() -> Case:
    return made(HiddenMarkov(), None, torch.randint(4, (2, 4)))


class TuringHead(nn.Module):
    """Addressing by content and by place, as in a neural Turing machine, and a read."""

    def __init__(self) -> None:
        super().__init__()
        self.control, self.out = mlp(4, 6, 9), nn.Linear(3, 2)
        self.memory = nn.Parameter(draw(4, 3))

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        key, heat, gate, shift, sharp = self.control(x).split([3, 1, 1, 3, 1], 1)
        near = F.cosine_similarity(key.unsqueeze(1), self.memory.unsqueeze(0), dim=2)
        weight = (F.softplus(heat) * near).softmax(1)
        weight = gate.sigmoid() * weight + (1 - gate.sigmoid()) * last
        shift = shift.softmax(1)
        weight = sum(shift[:, i : i + 1] * weight.roll(i - 1, 1) for i in range(3))
        weight = weight.pow(1 + F.softplus(sharp))
        return self.out((weight / weight.sum(1, keepdim=True)) @ self.memory)


@case("Neural Turing machine")
def _() -> Case:
    last = draw(3, 4).softmax(1)
    return made(TuringHead(), nn.CrossEntropyLoss(), draw(3, 4), last, torch.randint(2, (3,)))


# ------------------------------------------------------------------ generative


class Autoencoder(nn.Module):
    """A variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(8, 6, 4), mlp(2, 6, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (log_var / 2).exp()
        return self.decoder(z), mean, log_var


@case("VAE")
def _() -> Case:
    def loss(out: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        logits, mean, log_var = out
        fit = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return fit - 0.5 * (1 + log_var - mean.square() - log_var.exp()).sum()

    x = torch.rand(3, 8, dtype=torch.float64)
    return made(Autoencoder(), loss, x, x.clone())


class DistributionAutoencoder(nn.Module):
    """The same with torch.distributions, their arguments validated."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(8, 6, 4), mlp(2, 6, 8)

    def forward(self, x: Tensor) -> Tensor:
        mean, scale = self.encoder(x).chunk(2, -1)
        posterior = D.Normal(mean, F.softplus(scale))
        z = posterior.rsample()
        fit = D.Bernoulli(logits=self.decoder(z)).log_prob((x > 0.5).double()).sum(-1)
        prior = D.Normal(torch.zeros_like(mean), torch.ones_like(scale))
        return (D.kl_divergence(posterior, prior).sum(-1) - fit).mean()


@case("VAE by distributions")
def _() -> Case:
    return made(DistributionAutoencoder(), None, torch.rand(3, 8, dtype=torch.float64))


class Adversarial(nn.Module):
    """A generator and a discriminator; `role` says whose loss is returned."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role
        self.generator, self.critic = mlp(2, 6, 4), mlp(4, 6, 1)

    def forward(self, z: Tensor, real: Tensor) -> Tensor:
        fake = self.generator(z)
        if self.role == "generator":
            return F.softplus(-self.critic(fake)).mean()
        fake = fake.detach()
        if self.role == "discriminator":
            return F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()
        mixed = (real + fake).div(2).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(mixed).sum(), mixed, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return self.critic(fake).mean() - self.critic(real).mean() + 10 * penalty


for _role in ("generator", "discriminator", "gradient penalty"):

    @case(f"GAN, {_role}")
    def _(role=_role) -> Case:
        return made(Adversarial(role), None, draw(3, 2), draw(3, 4))


class Coupling(nn.Module):
    """An affine coupling layer of a normalizing flow."""

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.flip, self.net = flip, mlp(2, 6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.flip(-1).chunk(2, -1) if self.flip else x.chunk(2, -1)
        log_scale, shift = self.net(a).chunk(2, -1)
        return torch.cat([a, b * log_scale.exp() + shift], -1), log_scale.sum(-1)


class Flow(nn.Module):
    """RealNVP: the negative log likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Coupling(False), Coupling(True)])

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x[:, 0])
        for layer in self.layers:
            x, log_det = layer(x)
            total = total + log_det
        prior = D.MultivariateNormal(x.new_zeros(4), torch.eye(4, dtype=x.dtype))
        return -(prior.log_prob(x) + total).mean()


@case("Normalizing flow")
def _() -> Case:
    return made(Flow(), None, draw(3, 4))


class Diffusion(nn.Module):
    """A denoising network and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(5, 8, 4, activation=nn.SiLU)
        self.register_buffer("kept", torch.linspace(0.99, 0.01, 10).cumprod(0))

    def forward(self, x: Tensor) -> Tensor:
        t = torch.randint(10, (x.shape[0],))
        kept, noise = self.kept[t].unsqueeze(1), torch.randn_like(x)
        noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
        return F.mse_loss(self.net(torch.cat([noisy, t.unsqueeze(1) / 10], 1)), noise)


@case("Diffusion")
def _() -> Case:
    return made(Diffusion(), None, draw(3, 4))


class MixtureDensity(nn.Module):
    """A mixture of three normal densities."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(2, 6, 9)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits, mean, log_scale = self.body(x).chunk(3, -1)
        parts = D.Normal(mean, log_scale.exp())
        return -D.MixtureSameFamily(D.Categorical(logits=logits), parts).log_prob(y).mean()


@case("Mixture density")
def _() -> Case:
    return made(MixtureDensity(), None, draw(4, 2), draw(4))


# ------------------------------------------------------------------ pictures


class UNet(nn.Module):
    """One level down, one level up, a skip between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        b = self.up(self.middle(F.max_pool2d(a, 2)))
        return self.out(torch.cat([a, b], 1))


@case("U-Net")
def _() -> Case:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        p, hot = out.softmax(1), F.one_hot(y, 2).movedim(-1, 1)
        dice = 1 - (2 * (p * hot).sum() + 1) / (p.sum() + hot.sum() + 1)
        return F.cross_entropy(out, y) + dice

    return made(UNet(), loss, draw(2, 1, 4, 4), torch.randint(2, (2, 4, 4)))


class PointNet(nn.Module):
    """A shared network for each point and a maximum over the points."""

    def __init__(self) -> None:
        super().__init__()
        self.align, self.shared, self.head = mlp(3, 6, 9), mlp(3, 6, 8), mlp(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        turn = self.align(x).amax(1).reshape(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
        return self.head(self.shared(x @ turn).amax(1))


@case("PointNet")
def _() -> Case:
    return made(PointNet(), nn.CrossEntropyLoss(), draw(2, 5, 3), torch.randint(3, (2,)))


class Radiance(nn.Module):
    """A neural radiance field: encodings, a density and colours along a ray."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3 + 3 * 4, 8, 4, activation=nn.ReLU)

    def forward(self, points: Tensor) -> Tensor:
        scaled = torch.cat([points * 2**k for k in range(2)], -1) * math.pi
        out = self.body(torch.cat([points, scaled.sin(), scaled.cos()], -1))
        alpha = 1 - (-F.softplus(out[..., 0]) * 0.25).exp()
        through = (1 - alpha + 1e-10).cumprod(-1)
        weight = alpha * F.pad(through[..., :-1], (1, 0), value=1.0)
        return (weight.unsqueeze(-1) * out[..., 1:].sigmoid()).sum(-2)


@case("NeRF")
def _() -> Case:
    colours = torch.rand(3, 3, dtype=torch.float64)
    return made(Radiance(), nn.MSELoss(), draw(3, 4, 3), colours)


def squash(x: Tensor) -> Tensor:
    """Of a capsule: its direction, and its length between 0 and 1."""
    square = x.square().sum(-1, keepdim=True)
    return x * square / (1 + square) / (square + 1e-9).sqrt()


class Capsules(nn.Module):
    """Routing by agreement: softmax over the capsules above, sums over those below."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.turn = nn.Linear(5, 6), nn.Parameter(draw(3, 2, 2, 3) / 2)

    def forward(self, x: Tensor) -> Tensor:
        below = squash(self.first(x).view(-1, 3, 2))
        votes = torch.einsum("bid,iode->bioe", below, self.turn)
        logits = torch.zeros_like(votes[..., 0])
        for _ in range(2):
            above = squash((logits.softmax(2).unsqueeze(3) * votes).sum(1))
            logits = logits + (votes * above.unsqueeze(1)).sum(3)
        return above.square().sum(2).add(1e-9).sqrt()


@case("Capsules")
def _() -> Case:
    def loss(length: Tensor, y: Tensor) -> Tensor:
        hot = F.one_hot(y, 2)
        missed, wrong = F.relu(0.9 - length).square(), F.relu(length - 0.1).square()
        return (hot * missed + (1 - hot) * wrong / 2).sum(1).mean()

    return made(Capsules(), loss, draw(3, 5), torch.randint(2, (3,)))


# ------------------------------------------------------------------ sets, graphs, tables


class DeepSets(nn.Module):
    """A sum over a masked set."""

    def __init__(self) -> None:
        super().__init__()
        self.phi, self.rho = mlp(3, 6, 5), mlp(5, 6, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.rho((self.phi(x) * mask.unsqueeze(-1)).sum(1)).squeeze(-1)


@case("DeepSets")
def _() -> Case:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return made(DeepSets(), nn.HuberLoss(), draw(2, 3, 3), mask, draw(2))


class DenseGraph(nn.Module):
    """Graph convolution by a normalized adjacency matrix (Kipf and Welling)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        loops = adjacency + torch.eye(x.shape[0], dtype=x.dtype)
        scale = loops.sum(1).rsqrt()
        spread = scale.unsqueeze(1) * loops * scale
        return spread @ self.b(F.relu(spread @ self.a(x)))


@case("Graph convolution, dense")
def _() -> Case:
    edges = torch.rand(5, 5, dtype=torch.float64).gt(0.5).double()
    x = (draw(5, 3), (edges + edges.T).clamp(max=1))
    return made(DenseGraph(), nn.CrossEntropyLoss(), *x, torch.randint(2, (5,)))


class ScatterGraph(nn.Module):
    """Message passing over a list of edges, with attention normalized at each target."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.score, self.head = mlp(6, 6, 5), nn.Linear(6, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        pair = torch.cat([x[source], x[target]], -1)
        score = F.leaky_relu(self.score(pair)).squeeze(-1)
        peak = torch.full((x.shape[0],), -1e9, dtype=x.dtype)
        peak = peak.scatter_reduce(0, target, score, "amax").detach()
        weight = (score - peak[target]).exp()
        total = torch.zeros(x.shape[0], dtype=x.dtype).scatter_add(0, target, weight)
        sent = self.message(pair) * (weight / total[target]).unsqueeze(-1)
        gathered = torch.zeros(x.shape[0], 5, dtype=x.dtype).index_add(0, target, sent)
        return self.head(torch.cat([x, gathered], -1))


@case("Graph convolution, scatter")
def _() -> Case:
    edges = torch.randint(5, (2, 9))
    return made(ScatterGraph(), nn.CrossEntropyLoss(), draw(5, 3), edges, torch.randint(2, (5,)))


class Recommender(nn.Module):
    """DLRM: embedding bags, dense features and their pairwise products."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(7, 4, mode="sum") for _ in range(2))
        self.bottom, self.top = mlp(3, 6, 4, activation=nn.ReLU), mlp(7, 6, 1, activation=nn.ReLU)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = torch.stack([x] + [bag(sparse[:, i]) for i, bag in enumerate(self.bags)], 1)
        products = rows @ rows.transpose(1, 2)
        i, j = torch.tril_indices(3, 3, -1)
        return self.top(torch.cat([x, products[:, i, j]], 1)).squeeze(1)


@case("DLRM")
def _() -> Case:
    clicks = torch.randint(2, (3,)).double()
    args = (draw(3, 3), torch.randint(7, (3, 2, 2)), clicks)
    return made(Recommender(), nn.BCEWithLogitsLoss(), *args)


# ------------------------------------------------------------------ embeddings


@case("Triplet")
def _() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(4, 6, 3)

        def forward(self, a: Tensor, p: Tensor, n: Tensor) -> Tensor:
            return F.triplet_margin_loss(self.body(a), self.body(p), self.body(n))

    return made(Net(), None, draw(3, 4), draw(3, 4), draw(3, 4))


@case("Contrastive")
def _() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mlp(4, 6, 3), mlp(5, 6, 3)
            self.heat = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            scores = F.normalize(self.a(x), dim=-1) @ F.normalize(self.b(y), dim=-1).T
            scores = scores * self.heat.exp()
            y = torch.arange(x.shape[0])
            return (F.cross_entropy(scores, y) + F.cross_entropy(scores.T, y)) / 2

    return made(Net(), None, draw(4, 4), draw(4, 5))


class SoftKMeans(nn.Module):
    """One step of k-means with soft assignments, and what is left of the distances."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.centres = mlp(4, 6, 2), nn.Parameter(draw(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        z, centres = self.encoder(x), self.centres
        share = (-(z.unsqueeze(1) - centres).square().sum(2)).softmax(1)
        centres = (share.unsqueeze(2) * z.unsqueeze(1)).sum(0) / share.sum(0).unsqueeze(1)
        distance = (z.unsqueeze(1) - centres).square().sum(2)
        return ((-2 * distance).softmax(1) * distance).sum(1).mean()


@case("Soft k-means")
def _() -> Case:
    return made(SoftKMeans(), None, draw(5, 4))


# ------------------------------------------------------------------ decisions


class Policy(nn.Module):
    """PPO with a clipped ratio, a value loss and an entropy bonus."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = mlp(4, 6, 3), mlp(4, 6, 1)

    def forward(self, state: Tensor, action: Tensor, old: Tensor, gain: Tensor) -> Tensor:
        policy = D.Categorical(logits=self.actor(state))
        ratio = (policy.log_prob(action) - old).exp()
        gain_ = (gain - gain.mean()) / (gain.std() + 1e-8)
        surrogate = torch.min(ratio * gain_, ratio.clamp(0.8, 1.2) * gain_).mean()
        value = F.mse_loss(self.critic(state).squeeze(-1), gain)
        return -surrogate + 0.5 * value - 0.01 * policy.entropy().mean()


@case("PPO")
def _() -> Case:
    args = (draw(5, 4), torch.randint(3, (5,)), -draw(5).abs(), draw(5))
    return made(Policy(), None, *args)


class SoftActor(nn.Module):
    """SAC: the policy's loss under a squashed normal, and the critics' loss."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.q1, self.q2 = mlp(3, 6, 4), mlp(5, 6, 1), mlp(5, 6, 1)

    def forward(self, state: Tensor, action: Tensor, target: Tensor) -> Tensor:
        mean, log_scale = self.actor(state).chunk(2, -1)
        squash = [D.transforms.TanhTransform(cache_size=1)]
        policy = D.TransformedDistribution(D.Normal(mean, log_scale.clamp(-5, 2).exp()), squash)
        drawn = policy.rsample()
        both = torch.cat([state, drawn], -1)
        worth = torch.min(self.q1(both), self.q2(both)).squeeze(-1)
        actor = (0.2 * policy.log_prob(drawn).sum(-1) - worth).mean()
        taken = torch.cat([state, action], -1)
        return actor + sum(F.mse_loss(q(taken).squeeze(-1), target) for q in (self.q1, self.q2))


@case("SAC")
def _() -> Case:
    return made(SoftActor(), None, draw(4, 3), draw(4, 2).tanh(), draw(4))


# ------------------------------------------------------------------ equations and processes


class Heat(nn.Module):
    """A physics-informed network of u_t = u_xx, differentiated by torch.autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.u = mlp(2, 6, 6, 1)

    def forward(self, points: Tensor, edge: Tensor) -> Tensor:
        x, t = points[:, :1].clone().requires_grad_(), points[:, 1:].clone().requires_grad_()
        u = self.u(torch.cat([x, t], 1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        return (u_t - u_xx).square().mean() + self.u(edge).square().mean()


@case("PINN, autograd")
def _() -> Case:
    return made(Heat(), None, draw(4, 2), draw(2, 2))


class HeatFunc(Heat):
    """The same by torch.func."""

    def forward(self, points: Tensor, edge: Tensor) -> Tensor:
        def u(p: Tensor) -> Tensor:
            return self.u(p).squeeze(-1)

        slope = torch.func.vmap(torch.func.grad(u))(points)
        second = torch.func.vmap(torch.func.hessian(u))(points)
        residual = slope[:, 1] - second[:, 0, 0]
        return residual.square().mean() + self.u(edge).square().mean()


@case("PINN, torch.func")
def _() -> Case:
    return made(HeatFunc(), None, draw(4, 2), draw(2, 2))


class NeuralODE(nn.Module):
    """Steps of Heun's method; the step is halved where its error is too large."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.head = mlp(3, 6, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        time, step = 0.0, 0.5
        while time < 1:
            a = self.slope(x)
            b = self.slope(x + step * a)
            if (b - a).abs().max() * step / 2 > 0.2 and step > 0.2:
                step = step / 2
                continue
            x, time = x + step / 2 * (a + b), time + step
        return self.head(x)


@case("Neural ODE, adaptive")
def _() -> Case:
    return made(NeuralODE(), nn.CrossEntropyLoss(), draw(3, 3), torch.randint(2, (3,)))


class GaussianProcess(nn.Module):
    """The marginal likelihood of a Gaussian process with a learned feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.features = mlp(2, 4, 2)
        self.log_scale, self.log_noise = (
            nn.Parameter(torch.zeros(())),
            nn.Parameter(torch.zeros(())),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.features(x)
        distance = (z.unsqueeze(1) - z.unsqueeze(0)).square().sum(-1)
        noise = self.log_noise.exp() * torch.eye(x.shape[0], dtype=x.dtype)
        kernel = (2 * self.log_scale - distance / 2).exp() + noise
        factor = torch.linalg.cholesky(kernel)
        white = torch.linalg.solve_triangular(factor, y.unsqueeze(-1), upper=False)
        return white.square().sum() / 2 + factor.diagonal().log().sum()


@case("Gaussian process")
def _() -> Case:
    return made(GaussianProcess(), None, draw(4, 2), draw(4))


class MaskedRegression(nn.Module):
    """A loss over what was observed, and a branch on whether anything was."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 6, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        seen = ~y.isnan()
        if not seen.any():
            return self.net(x).sum() * 0
        return (self.net(x)[seen] - y[seen]).square().mean()


@case("Regression with missing targets")
def _() -> Case:
    y = draw(4, 2)
    y[0, 1] = y[2, 0] = math.nan
    return made(MaskedRegression(), None, draw(4, 3), y)
