"""Reinforcement learning: PPO with and without step-size scaling, over a range of step sizes.

    python benchmarks/paper/reinforcement.py [--full] [--out DIR]

Proximal policy optimization (Schulman et al. 2017) on CartPole-v1 (at most 500 points an episode)
with Adam and AdaHesScale, by themselves and under `StepSizeScaling`. Curvature is that of the
clipped loss below, which is traced as it stands: no derivative is written by hand. A run is scored
by the mean return of the episodes that end in its last fifth. The settings DELTA and EPS are from
single runs of a seed that is not among those reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gymnasium
import numpy
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import hesscale_fx
from hesscale_fx.optim import AdaHesScale, StepSizeScaling

from common import Row, Run, canvas, curve, number, progress, seed_all, shown

ENVS, HORIZON, EPOCHS, PARTS = 8, 64, 4, 4
DISCOUNT, TRACE = 0.99, 0.95
DELTA, EPS = 1e-2, 1e-2  # of StepSizeScaling, in the loss's unit, and of AdaHesScale


@dataclass
class Size:
    """How much is done."""

    rates: Sequence[float]
    seeds: int
    steps: int  # of all environments together


RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SIZES = {
    "smoke": Size(RATES[1:2], 1, 2 * ENVS * HORIZON),
    "default": Size(RATES, 4, 20_000),
    "full": Size(RATES, 20, 100_000),
}


class ActorCritic(nn.Module):
    """A policy and a value, each of one hidden layer."""

    def __init__(self, observations: int, actions: int, width: int = 64) -> None:
        super().__init__()
        self.policy = nn.Sequential(
            nn.Linear(observations, width), nn.Tanh(), nn.Linear(width, actions)
        )
        self.value = nn.Sequential(nn.Linear(observations, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """`observation` of shape (batch, observations); logits of the actions, and values."""
        return self.policy(observation), self.value(observation).squeeze(-1)


def ppo(
    output: tuple[Tensor, Tensor], action: Tensor, before: Tensor, advantage: Tensor, target: Tensor
) -> Tensor:
    """Clipped surrogate, error of the value, entropy; `before` is the old log-probability."""
    logits, value = output
    policy = Categorical(logits=logits, validate_args=False)
    ratio = (policy.log_prob(action) - before).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    return -surrogate + 0.5 * (value - target).square().mean() - 0.01 * policy.entropy().mean()


Maker = Callable[[Sequence[nn.Parameter], float], torch.optim.Optimizer]


def adam(parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """At its defaults."""
    return torch.optim.Adam(parameters, lr=rate)


def adahesscale(parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Damped."""
    return AdaHesScale(parameters, lr=rate, eps=EPS)


def scaled(make: Maker) -> Maker:
    """The same under step-size scaling."""
    return lambda parameters, rate: StepSizeScaling(make(parameters, rate), delta=DELTA, beta=0.99)


# Label -> optimizer of the parameters and the step size, and whether it reads curvature.
METHODS: dict[str, tuple[Maker, bool]] = {
    "Adam": (adam, False),
    "Adam, scaled": (scaled(adam), True),
    "AdaHesScale": (adahesscale, True),
    "AdaHesScale, scaled": (scaled(adahesscale), True),
}


class Rollouts:
    """Environments side by side, and the returns of the episodes that have ended."""

    def __init__(self, seed: int) -> None:
        self.envs = gymnasium.make_vec(
            "CartPole-v1", num_envs=ENVS, vectorization_mode="vector_entry_point"
        )
        self.observation, _ = self.envs.reset(seed=seed)
        self.reset = torch.zeros(ENVS, dtype=torch.bool)  # whether the next step is a reset
        self.running = numpy.zeros(ENVS)
        self.ended: list[tuple[int, float]] = []  # steps of all environments, return
        self.steps = 0

    @torch.no_grad()
    def collect(self, net: ActorCritic) -> tuple[Tensor, ...]:
        """One batch: observations, actions, their log-probabilities, advantages, value targets.

        Each has the leading dimension HORIZON * ENVS less the steps in which an environment was
        reset, which are no transitions.
        """
        kept: list[tuple[Tensor, ...]] = []
        for _ in range(HORIZON):
            observation = torch.tensor(self.observation, dtype=torch.float32)
            logits, value = net(observation)
            policy = Categorical(logits=logits)
            action = policy.sample()
            self.observation, reward, over, cut, _ = self.envs.step(action.numpy())
            self.count(reward, over | cut)
            after = net(torch.tensor(self.observation, dtype=torch.float32))[1]
            # What follows a fall is worth nothing; what follows the time limit is worth its value.
            after = torch.where(torch.tensor(over), 0.0, after)
            reward = torch.tensor(reward, dtype=torch.float32)
            error = reward + DISCOUNT * after - value
            done = torch.tensor(over | cut)
            kept.append(
                (observation, action, policy.log_prob(action), error, value, done, self.reset)
            )
            self.reset = done
        observations, actions, before, errors, values, dones, resets = map(
            torch.stack, zip(*kept, strict=True)
        )
        advantage = advantages(errors, dones)
        parts = (observations, actions, before, advantage, advantage + values)
        return tuple(part[~resets] for part in parts)

    def count(self, reward: numpy.ndarray, done: numpy.ndarray) -> None:
        """Keep the books of episodes."""
        self.steps += ENVS
        self.running += reward
        self.ended += [(self.steps, float(r)) for r in self.running[done]]
        self.running[done] = 0


def advantages(errors: Tensor, dones: Tensor) -> Tensor:
    """Generalized advantage estimates: discounted sums of errors up to the end of the episode.

    All of shape (steps, environments).
    """
    found, later = [], torch.zeros_like(errors[0])
    for error, done in zip(errors.flip(0), dones.flip(0), strict=True):
        later = error + DISCOUNT * TRACE * torch.where(done, 0.0, later)
        found.append(later)
    return torch.stack(found[::-1])


def train(
    net: ActorCritic, hs: Callable | None, make: Maker, rate: float, seed: int, steps: int
) -> Row:
    """One run: its curve of returns and what its steps took."""
    rollouts = Rollouts(seed)
    optimizer = make(list(net.parameters()), rate)
    seconds, updates, scales = 0.0, 0, []
    while rollouts.steps < steps:
        batch = rollouts.collect(net)
        for _ in range(EPOCHS):
            order = torch.randperm(len(batch[0]))
            for chosen in order.chunk(PARTS):
                observation, action, before, advantage, target = (part[chosen] for part in batch)
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                start = time.process_time()
                optimizer.zero_grad()
                if hs is None:
                    ppo(net(observation), action, before, advantage, target).backward()
                else:
                    hs.backward(observation, action, before, advantage, target)
                optimizer.step()
                seconds += time.process_time() - start
                updates += 1
                if isinstance(optimizer, StepSizeScaling):
                    scales.append(optimizer.scale.item())
    return {
        "ended": rollouts.ended,
        "ms": 1e3 * seconds / updates,
        "scale": statistics.median(scales) if scales else 1.0,
    }


POINTS = 10  # of a curve


def returns(ended: list[tuple[int, float]], steps: int) -> list[float]:
    """Mean return of the episodes that ended in each part of a run; of none: as before."""
    means = [0.0]
    for k in range(POINTS):
        low, high = steps * k / POINTS, steps * (k + 1) / POINTS
        part = [r for at, r in ended if low < at <= high]
        means.append(statistics.mean(part) if part else means[-1])
    return means[1:]


def measure(size: Size) -> list[Row]:
    """One row for each point of every run's curve."""
    rows = []
    total = len(METHODS) * len(size.rates) * size.seeds
    with progress(None, "CartPole", total) as bar:
        for label, (make, curved) in METHODS.items():
            net = ActorCritic(4, 2)
            hs = hesscale_fx.transform(net, ppo, dynamic=True) if curved else None
            for rate in size.rates:
                for seed in range(size.seeds):
                    bar.set_postfix_str(f"{label}, {rate:g}")
                    seed_all(seed)
                    net.load_state_dict(ActorCritic(4, 2).state_dict())
                    run = train(net, hs, make, rate, seed, size.steps)
                    for k, mean in enumerate(returns(run["ended"], size.steps)):
                        case = {"method": label, "rate": rate, "seed": seed}
                        at = {"step": round(size.steps * (k + 1) / POINTS), "return": mean}
                        rows.append({**case, **at, "ms": run["ms"], "scale": run["scale"]})
                    bar.update()
    return rows


def score(rows: list[Row], label: str, rate: float) -> list[float]:
    """Mean return in the last fifth, for each seed."""
    runs = by_seed(rows, label, rate)
    return [statistics.mean(r["return"] for r in run[-POINTS // 5 :]) for run in runs]


def by_seed(rows: list[Row], label: str, rate: float) -> list[list[Row]]:
    """The curves of one method and rate."""
    found = [r for r in rows if r["method"] == label and r["rate"] == rate]
    return [[r for r in found if r["seed"] == s] for s in sorted({r["seed"] for r in found})]


def report(run: Run, rows: list[Row]) -> None:
    """Methods by step sizes, and what an update costs."""
    rates: Sequence[float] = run.size.rates
    lines = []
    for label in METHODS:
        scores = {rate: score(rows, label, rate) for rate in rates}
        every = statistics.mean(statistics.mean(s) for s in scores.values())
        ms = statistics.median(r["ms"] for r in rows if r["method"] == label)
        texts = [shown(s) for s in scores.values()]
        lines.append([label, *texts, number(every), number(ms, 2)])
    heads = ["", *(f"{rate:g}" for rate in rates), "mean over rates", "ms an update"]
    run.table("reinforcement", heads, lines)


def plot(rows: list[Row], rates: Sequence[float]) -> object:
    """Scores over step sizes, and the curves of each step size."""
    figure = canvas(1 + len(rates), width=2.3)
    first, *others = figure.subplots(1, 1 + len(rates), sharey=True)
    for k, label in enumerate(METHODS):
        runs = list(zip(*(score(rows, label, rate) for rate in rates), strict=True))
        curve(first, rates, runs, label=label, color=f"C{k}", marker="o", ms=3)
        for axes, rate in zip(others, rates, strict=True):
            curves = by_seed(rows, label, rate)
            steps = [r["step"] / 1000 for r in curves[0]]
            curve(axes, steps, [[r["return"] for r in c] for c in curves], color=f"C{k}")
            axes.set(title=f"step size {rate:g}", xlabel="thousand steps")
    first.set(xscale="log", xlabel="step size", ylabel="return", title="last fifth", ylim=(0, 510))
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, draw."""
    run = Run(__doc__.splitlines()[0], SIZES, argv)
    rows = run.rows("reinforcement", lambda: measure(run.size))
    report(run, rows)
    run.figure("reinforcement", plot(rows, run.size.rates))


if __name__ == "__main__":
    main()
