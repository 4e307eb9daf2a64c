"""From a training problem to the finished run folder: training, probes, report, figures, summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.harness.folder import Parts, RunFolder, atomic_path, netcdf3_ready
from experiments.harness.measures import Measured, Report, measure, report_sentences
from experiments.harness.probes import all_scores, end_trainings
from experiments.harness.report import NETWORK, Results, Score, comparisons, table_text
from experiments.harness.train_common import IGNORED, LabelledSplit, Probe, TrainConfig
from experiments.harness.train_figures import accuracy_figure, training_figure
from experiments.harness.train_loop import Ensemble, OnlineProbe, Problem, initial, make_training, steps_of, train
from mae_align.corruption import Corruption

Pictures = Callable[[Any, np.ndarray, np.ndarray, int], Figure]


def run(
    experiment: str,
    title: str,
    config: TrainConfig,
    split: LabelledSplit,
    problem: Problem,
    corruption: Corruption | None,
    pictures: Pictures,
) -> None:
    """Train the members of a problem, probe them and everything beside them, and write the report.

    Args:
        experiment: name of the module. title: first line of the summary. corruption: of the closed form.
        pictures: draws reconstructions of a network: (model, images, images of the range, seed).

    Raises:
        InputError: settings that do not fit the data or the devices, before any long work.
    """
    runs = problem.runs
    rates = [r.learning_rate for r in runs]
    training = make_training(
        config, split, problem.make_model, problem.objective, rates, config.epochs, config.warmup_epochs, problem.apart
    )
    # Refuses what does not fit before anything is trained.
    trainings = end_trainings(config, split, problem)
    folder = RunFolder.open(experiment, config.data, config, config.out, ignore=IGNORED)
    parts = Parts(folder.points, split.identity)
    state = initial(training, runs, rates)
    probe = OnlineProbe.of(training, split, config.online_images, config.seed)
    state = train(config, split, training, state, config.epochs, folder.shared, parts.identity, probe)
    trained = Ensemble.of(training, state, split, corrupted=corruption is not None)
    measured = Measured.of(split, corruption)
    scores, ends, chosen = all_scores(
        config,
        measured,
        problem,
        trained,
        lambda found: _chosen(problem, found),
        trainings,
        folder.shared / "ends",
        parts,
    )
    report = measure(problem, measured, trained, chosen, scores, parts, config.seed)
    results = Results(runs, chosen, scores, ends, report.rows, len(split.test_labels), split.chance)
    _write(folder, title, config, split, trained, results, report, pictures)


def _chosen(problem: Problem, scores: Sequence[Score]) -> list[int]:
    """Members with the learning rate whose ridge probe is best on validation images, for each guidance weight."""
    ridge = {s.member: s.values["accuracy_val"] for s in scores if s.probe == Probe.ridge.value}
    found = []
    for guidance in dict.fromkeys(r.guidance for r in problem.runs):
        by_rate: dict[float, list[int]] = {}
        for i, r in enumerate(problem.runs):
            if r.guidance == guidance:
                by_rate.setdefault(r.learning_rate, []).append(i)
        found += max(by_rate.values(), key=lambda members: np.mean([ridge[i] for i in members]))
    return found


def _write(
    folder: RunFolder,
    title: str,
    config: TrainConfig,
    split: LabelledSplit,
    trained: Ensemble,
    results: Results,
    report: Report,
    pictures: Pictures,
) -> None:
    model = trained.training.model(trained.state, results.chosen[0])
    if jax.process_index() > 0:
        return
    folder.save_table("results", results.rows())
    folder.save_table("report", report.rows)
    with atomic_path(folder.path / "results.nc") as file:
        netcdf3_ready(results.dataset()).to_netcdf(file, engine="scipy")
    lines = (folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    names = [r.name(results.runs) for r in results.runs]
    levels = {
        name: float(np.mean([s.values["accuracy_val"] for s in found if s.probe == Probe.ridge.value]))
        for name, found in results.groups().items()
        if not name.startswith(NETWORK)
    }
    records = [json.loads(line) for line in lines]
    shown = split.test_images[np.random.default_rng(config.seed).permutation(len(split.test_labels))[: config.pictures]]
    figures = [
        folder.save_figure("training", training_figure(records, names, levels, config.batch_size)),
        folder.save_figure("reconstructions", pictures(model, shown, split.train_images, config.seed)),
        folder.save_figure("accuracy", accuracy_figure(results.accuracies(), results.end_accuracies(), results.chance)),
    ]
    text = [
        title,
        f"{split.description}; {len(results.runs)} networks, {steps_of(config, split, config.epochs)} steps of "
        f"{config.batch_size} images, {records[-1]['seconds']:.0f} s of training",
        "",
        table_text(results),
        "",
        *comparisons(results),
        "",
        *report_sentences(report, len(split.train_labels)),
        "",
        "Figures: " + "  ".join(str(path) for path in figures),
    ]
    folder.summary("\n".join(text))
