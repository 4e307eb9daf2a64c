"""How fast is a training step, of what the machine can do, and how does it compare?

    python -m benchmarks.train_step                                  # four networks, float32 and bf16; some minutes
    python -m benchmarks.train_step --networks MLP VIT --torch       # beside PyTorch
    python -m benchmarks.train_step --tiny --torch                   # a minute: that it runs, not how fast

Whatever is compared takes turns in one run: medians over the rounds, ratios within a round. Prints

- the matmul rate of this machine in JAX, float32 and bf16 apart: the best product of square matrices in the run;
- of each network, images/s and the share of that rate. The operations of a step are those of the matrix products and
  convolutions in its traced gradient, counted from their shapes (`benchmarks.flops`): elementwise work and optimizer
  take time and count nothing. A bf16 network is held against the bf16 rate;
- of a smaller network of each kind, 8 members in each of the two programs of `mae_align.train.step` against 8 runs one
  after the other. That is the evidence for the choice there;
- with `--torch`, the same MLP and masked autoencoder in PyTorch (`benchmarks.torch_models`), where it is installed,
  with one thread per core as JAX has it.

A step is all of it: gather the batch, draw masks, gradient, clip, AdamW. Compilation is timed apart. One device.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.flops import count_flops
from benchmarks.start import check_counts, machine, start
from benchmarks.timing import MatmulRate, median_ratio, take_turns
from mae_align.corruption import FixedCountPatchMasking
from mae_align.models import (
    VIT_NANO,
    VIT_TINY,
    Autoencoder,
    ConvAutoencoder,
    MaskedAutoencoder,
    MLPAutoencoder,
    Pixels,
    ResNetAutoencoder,
    VitSize,
)
from mae_align.models.vit_mae import sincos_positions
from mae_align.runtime.devices import compile_counter, worker_count
from mae_align.runtime.errors import InputError
from mae_align.runtime.processes import train_mesh
from mae_align.train.ensemble import Training, reconstruct
from mae_align.train.optimizer import OptimizerConfig, adamw
from mae_align.train.step import Program, choose_program

_SHAPE = (32, 32, 3)
_PATCH, _RATIO = 4, 0.75
_OPTIMIZER = OptimizerConfig(total_steps=10**6)
_DTYPES: dict[str, Any] = {"float32": jnp.float32, "bf16": jnp.bfloat16}


class Network(enum.Enum):
    """The networks, by the name of their class."""

    MLP = enum.auto()
    CONV = enum.auto()
    RESNET = enum.auto()
    VIT = enum.auto()


_CLASSES: dict[Network, Any] = {
    Network.MLP: MLPAutoencoder,
    Network.CONV: ConvAutoencoder,
    Network.RESNET: ResNetAutoencoder,
    Network.VIT: MaskedAutoencoder,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    networks: tuple[Network, ...] = tuple(Network)
    """What is measured."""
    repeats: int = 7
    """Rounds; the median counts."""
    images: int = 2048
    """Images of the data set, which lies on the device."""
    members: int = 8
    """Members of an ensemble; 0 leaves this part out."""
    matmul_sizes: tuple[int, ...] = (512, 1024, 2048)
    """Sides of the square matrices whose products give the rate; the best counts."""
    torch: bool = False
    """Compare with PyTorch."""
    tiny: bool = False
    """Very small networks, for a test that everything runs."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and how it is run: arguments of its class, images of a batch, steps of a timing."""

    network: Network
    arguments: dict[str, Any]
    batch: int
    steps: int

    def make(self, pixels: Pixels, dtype: Any) -> Callable[[nnx.Rngs], Autoencoder]:
        """The network of given random numbers."""
        given = dict(self.arguments, dtype=dtype)
        return lambda rngs: _CLASSES[self.network](pixels, rngs=rngs, **given)

    def describe(self) -> str:
        """For a line of the output."""
        inner = ", ".join(f"{name} {value}" for name, value in self.arguments.items())
        return f"{self.network.name}: {inner}; batches of {self.batch}"


def _vit(size: VitSize, batch: int, steps: int) -> Case:
    return Case(
        Network.VIT,
        {"corruption": FixedCountPatchMasking.from_ratio(_PATCH, _RATIO, _SHAPE), **dataclasses.asdict(size)},
        batch,
        steps,
    )


def cases(tiny: bool) -> dict[Network, Case]:
    """One network of each kind at a size worth training."""
    if tiny:
        return small_cases(tiny)
    found = [
        Case(Network.MLP, {"hidden": (512, 256), "latent": 64}, 256, 10),
        Case(Network.CONV, {"widths": (32, 64, 128), "latent": 64}, 64, 2),
        Case(Network.RESNET, {"blocks": (2, 2, 2, 2), "width": 64, "latent": 128}, 16, 1),
        _vit(dataclasses.replace(VIT_TINY, depth=4, decoder_depth=1), 256, 2),
    ]
    return {case.network: case for case in found}


def small_cases(tiny: bool) -> dict[Network, Case]:
    """Networks of which one wants several: those of the ensembles."""
    if tiny:
        found = [
            Case(Network.MLP, {"hidden": (16,), "latent": 4}, 16, 2),
            Case(Network.CONV, {"widths": (2, 4), "latent": 4}, 4, 1),
            Case(Network.RESNET, {"blocks": (1, 1), "width": 2, "latent": 4}, 4, 1),
            _vit(VitSize(16, 1, 2, 16, 1, 2), 4, 2),
        ]
    else:
        found = [
            Case(Network.MLP, {"hidden": (256,), "latent": 64}, 64, 10),
            Case(Network.CONV, {"widths": (16, 32, 64), "latent": 64}, 32, 1),
            Case(Network.RESNET, {"blocks": (1, 1, 1), "width": 16, "latent": 64}, 8, 1),
            _vit(VIT_NANO, 32, 2),
        ]
    return {case.network: case for case in found}


def step_flops(case: Case, pixels: Pixels) -> int:
    """Operations of the products and convolutions in one step; traced, not run."""
    model = nnx.eval_shape(lambda: case.make(pixels, jnp.float32)(nnx.Rngs(0)))
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters: nnx.State, rest: nnx.State, images: jax.Array) -> jax.Array:
        model = nnx.merge(graph, parameters, rest, copy=True)
        model.train()
        return model.loss(images, jax.random.key(0))[0]

    images = jax.ShapeDtypeStruct((case.batch, *pixels.image_shape), jnp.float32)
    return count_flops(jax.grad(loss), parameters, rest, images)


class JaxRun:
    """Training steps of an ensemble of one case; the first call compiles, in `compile_seconds`."""

    def __init__(
        self, case: Case, images: np.ndarray, dtype: Any, members: int = 1, program: Program | None = None
    ) -> None:
        self.case = case
        self.training = Training(
            case.make(Pixels.from_images(images), dtype),
            reconstruct,
            adamw(_OPTIMIZER),
            batch_size=case.batch,
            num_members=members,
            mesh=train_mesh(devices=jax.devices()[:1]),
            steps_per_call=case.steps,
            program=program,
        )
        self.data = self.training.put(images)
        self.state = self.training.init(range(members))
        with compile_counter() as compiled:
            jax.block_until_ready(self())
        self.compile_seconds = compiled.seconds

    def __call__(self) -> Any:
        """Steps of a timing; what to wait for."""
        self.state, metrics = self.training.advance(self.state, self.data, self.case.steps)
        return self.state.params, metrics

    def parameters(self) -> int:
        """Trained numbers of one member."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params)) // self.training.num_members


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the first table: a network in one floating point type."""

    network: Network
    dtype: str
    seconds: float
    images_per_second: float
    flops: int
    share: float
    compile_seconds: float


def measure_networks(config: Config, images: np.ndarray) -> list[Row]:
    """Every network in every type, in turns with the matmul rates; printed."""
    rates = {name: MatmulRate(dtype, config.matmul_sizes) for name, dtype in _DTYPES.items()}
    chosen = {network: case for network, case in cases(config.tiny).items() if network in config.networks}
    runs = {
        (network, name): JaxRun(case, images, dtype)
        for network, case in chosen.items()
        for name, dtype in _DTYPES.items()
    }
    pixels = Pixels.from_images(images)
    contestants: dict[Any, Callable[[], object]] = {**rates, **runs}
    seconds = take_turns(contestants, config.repeats)
    for name, rate in rates.items():
        print(f"matmul, {name:8} {rate.best / 1e9:7.1f} GFLOP/s")
    rows = []
    for (network, name), run in runs.items():
        case = run.case
        if name == "float32":
            print(f"{case.describe()}; {run.parameters():,} parameters, {run.training.program.name}")
        step, flops = statistics.median(seconds[network, name]) / case.steps, step_flops(case, pixels)
        share = flops / step / rates[name].best
        row = Row(network, name, step, case.batch / step, flops, share, run.compile_seconds)
        rows.append(row)
        print(
            f"  {name:8} {1e3 * step:9.1f} ms a step {row.images_per_second:10,.0f} images/s "
            f"{flops / case.batch / 1e6:8.1f} MFLOP an image {flops / step / 1e9:7.1f} GFLOP/s {100 * share:5.1f}% of "
            f"matmul, compiled in {row.compile_seconds:.1f} s"
        )
    return rows


def measure_ensembles(config: Config, images: np.ndarray) -> dict[tuple[Network, int, Program], float]:
    """Seconds of a step of a member: alone, and of an ensemble, in both programs; printed.

    The ratio is to runs of one member after the other, each in its faster program. One run is made as often as there
    are members: they all cost the same.
    """
    print(f"{config.members} members in one call against {config.members} runs one after the other, float32:")
    found = {}
    for network, case in small_cases(config.tiny).items():
        if network not in config.networks:
            continue
        runs = {
            (members, program): JaxRun(case, images, jnp.float32, members, program)
            for members in (1, config.members)
            for program in Program
        }
        contestants = {
            key: (lambda run=run, times=config.members // key[0]: [run() for _ in range(times)][-1])
            for key, run in runs.items()
        }
        seconds = take_turns(contestants, config.repeats)
        print(f"{case.describe()}; chosen: {_chosen(network).name}")
        alone = min(Program, key=lambda program: statistics.median(seconds[1, program]))
        for (members, program), times in seconds.items():
            step = statistics.median(times) / case.steps / config.members
            found[network, members, program] = step
            print(
                f"  {members} in one call, {program.name:12} {1e3 * step:9.2f} ms a step and member, "
                f"{median_ratio(seconds[1, alone], times):5.2f} times as fast as one after the other, "
                f"compiled in {runs[members, program].compile_seconds:.1f} s"
            )
    return found


def measure_torch(config: Config, images: np.ndarray) -> dict[tuple[Network, str], float]:
    """Images/s of ours over those of PyTorch; printed."""
    torch_models = _torch_models()
    torch_models.use_threads(worker_count())
    found = {}
    for name, dtype in _DTYPES.items():
        rate = MatmulRate(dtype, config.matmul_sizes)
        theirs = torch_models.MatmulRate(name == "bf16", config.matmul_sizes)
        contestants: dict[Any, Callable[[], object]] = {"jax": rate, "torch": theirs}
        chosen = {network: case for network, case in cases(config.tiny).items() if network in config.networks}
        chosen = {network: case for network, case in chosen.items() if network in (Network.MLP, Network.VIT)}
        for network, case in chosen.items():
            contestants[network, "jax"] = JaxRun(case, images, dtype)
            contestants[network, "torch"] = _torch_run(torch_models, case, images, name == "bf16")
        seconds = take_turns(contestants, config.repeats, warm=2)  # PyTorch's first steps are slow
        print(
            f"PyTorch {torch_models.version()}, {name}: matmul {theirs.best / 1e9:.1f} GFLOP/s, JAX "
            f"{rate.best / 1e9:.1f}"
        )
        for network, case in chosen.items():
            ours, other = seconds[network, "jax"], seconds[network, "torch"]
            found[network, name] = median_ratio(other, ours)
            speeds = [case.batch * case.steps / statistics.median(times) for times in (ours, other)]
            print(
                f"  {network.name:4} {speeds[0]:10,.0f} images/s, PyTorch {speeds[1]:10,.0f}: "
                f"{found[network, name]:.2f} times as fast"
            )
    return found


def _chosen(network: Network) -> Program:
    return choose_program(_CLASSES[network].kind, jax.devices()[0].platform)


def _torch_models() -> Any:
    try:
        from benchmarks import torch_models
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise InputError("--torch: PyTorch is not installed here; pip install torch, or leave --torch out") from None
    return torch_models


def _torch_run(torch_models: Any, case: Case, images: np.ndarray, half: bool) -> Callable[[], object]:
    pixels = Pixels.from_images(images)
    normalize = torch_models.Normalize(np.asarray(pixels.mean), float(pixels.scale))
    # The tanh form of GELU, as jax.nn.gelu.
    if case.network is Network.MLP:
        model = torch_models.MLP(normalize, **case.arguments, approximate="tanh")
    else:
        grid = (_SHAPE[0] // _PATCH, _SHAPE[1] // _PATCH)
        widths = {f.name: case.arguments[f.name] for f in dataclasses.fields(VitSize)}
        model = torch_models.MaskedAutoencoder(
            normalize,
            torch_models.MaskedSizes(_SHAPE, _PATCH, case.arguments["corruption"].num_visible, **widths),
            norm_pix=True,
            approximate="tanh",
            positions=sincos_positions(grid, widths["width"]),
            decoder_positions=sincos_positions(grid, widths["decoder_width"]),
        )
    settings = dataclasses.asdict(_OPTIMIZER)
    settings = {name: settings[name] for name in ("learning_rate", "weight_decay", "b1", "b2", "eps", "clip_norm")}
    run = torch_models.TorchRun(model, images, case.batch, half=half, **settings)
    return lambda: run(case.steps)


def main(config: Config) -> None:
    """Run the benchmark."""
    check_counts(config, "members")
    if config.torch:
        _torch_models()  # before minutes of work
    print(machine())
    images = np.random.default_rng(0).integers(0, 256, (config.images, *_SHAPE), dtype=np.uint8)
    measure_networks(config, images)
    if config.members:
        measure_ensembles(config, images)
    if config.torch:
        measure_torch(config, images)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    start(main, Config)
