"""From a training problem to the finished run folder: training, probes, networks with labels, tables and figures."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence

import jax
import numpy as np
import pandas as pd
import xarray as xr

from experiments.harness.data import Split
from experiments.harness.ends import EndTraining, end_programs, train_end
from experiments.harness.ensembles import (
    End,
    Ensemble,
    Problem,
    TrainedConfig,
    images_for,
    initial,
    make_training,
)
from experiments.harness.figures import accuracy_figure, training_figure
from experiments.harness.probes import (
    NETWORK,
    PREDICTED,
    SUPERVISED,
    UNTRAINED,
    OnlineProbe,
    network_features,
    plain_features,
    probe_rows,
)
from experiments.harness.report import (
    Measured,
    accuracy_table,
    best_rates,
    closed_form_rows,
    comparison_rows,
    report_rows,
    result_rows,
    sentences,
)
from experiments.harness.run import Rows, Run
from mae_align.probes import Rows as Labelled
from mae_align.train.loop import Diverged

_KEY = "trained"


def train_and_report(config: TrainedConfig, run: Run[Split], problem: Problem) -> None:
    """Train the members of a problem, probe them and everything beside them, and write the report.

    Args:
        config: the settings.
        run: where everything goes.
        problem: what is trained.

    Raises:
        InputError: settings that do not fit the data or the devices, before any long work.
    """
    split, members, seed = run.data, problem.members, config.seed
    rates = [member.learning_rate for member in members]
    training = make_training(
        config, split, config.training, problem.make_model, problem.objective, rates, problem.apart
    )
    # Refuses what does not fit before anything is trained.
    programs = end_programs(config, split, problem)
    total = config.training.steps(len(split.train_labels))
    online = OnlineProbe.of(
        training,
        Labelled(split.train_images, split.train_labels),
        Labelled(split.validation_images, split.validation_labels),
        split.classes,
        most=config.probe_images,
        seed=seed,
    )
    state = run.train_to(
        _KEY,
        training,
        lambda: initial(training, members),
        lambda: images_for(config, split, training),
        config.looks(total),
        online,
        save_every=config.saves(total),
    )
    trained = Ensemble.of(training, state, split, corrupted=problem.corruption is not None)
    measured = Measured.of(split, problem.corruption)

    # By kind, so that only one ensemble's features are held at a time.
    everyone = [(i, i) for i in range(len(members))]
    rows = probe_rows(
        run, config.probes, network_features(NETWORK, lambda: trained, split, everyone, trained.note), seed
    )
    chosen = best_rates(members, rows)
    latent = trained.features(split.test_images[:1]).shape[-1]
    plain = plain_features(measured.train, measured.pool, split, latent, measured.note)
    rows += probe_rows(run, config.probes, plain, seed)
    before = network_features(
        UNTRAINED, lambda: Ensemble(training, initial(training, members)), split, [(i, i) for i in problem.firsts]
    )
    rows += probe_rows(run, config.probes, before, seed)

    def with_labels(end: End, positions: Sequence[int]) -> EndTraining | None:
        """None, and a note, where a network diverges: the report of what is finished is not lost with it."""
        try:
            return train_end(end, config, run, problem, trained, programs[end], positions)
        except Diverged as error:
            run.notes.append(
                f"Left out: networks trained with labels ({end.value}): {error} Give smaller --end-learning-rates."
            )
            warnings.warn(run.notes[-1], stacklevel=2)
            return None

    ends: Rows = []
    if End.fine_tuning in programs and (tuned := with_labels(End.fine_tuning, chosen)) is not None:
        ends += tuned.rows
    if End.from_scratch in programs and (made := with_labels(End.from_scratch, problem.firsts)) is not None:
        if End.from_scratch in (config.ends or ()):
            ends += made.rows
        if End.supervised in (config.ends or ()):
            rows += probe_rows(run, config.probes, network_features(SUPERVISED, made.ensemble, split, made.best), seed)

    closed = closed_form_rows(run, measured)
    report = report_rows(run, problem, measured, trained, chosen, rows, closed[0], seed)
    results = result_rows(members, [*rows, *ends], chosen)
    predicted = np.stack([row[PREDICTED] for row in (*rows, *ends)])
    # Of several processes all have a part of the network.
    model = training.model(state, chosen[0])
    frame = pd.DataFrame(results)
    reported = frame.loc[frame.reported]
    comparisons = comparison_rows(reported, predicted == split.test_labels)
    run.table("results", results, show=accuracy_table(reported, split.chance))
    run.table("comparisons", comparisons)
    run.table("report", report)
    run.table("closed_form", closed)
    run.netcdf(
        "predictions",
        xr.Dataset({PREDICTED: (("row", "image"), predicted.astype(np.int32)), "label": ("image", split.test_labels)}),
    )
    if jax.process_index() == 0:
        lines = (run.folder.path / "networks" / _KEY / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        names = [member.name(members) for member in members]
        ridge = reported[(reported.probe == "ridge") & (reported.features != NETWORK)]
        levels = ridge.groupby("compared_as", sort=False).accuracy_val.mean()
        records, batch = [json.loads(line) for line in lines], config.training.batch_size
        shown = np.random.default_rng(seed).permutation(len(split.test_labels))[: config.pictures]
        run.figure("training", training_figure(records, names, levels.to_dict(), batch))
        run.figure("reconstructions", problem.pictures(model, split.test_images[shown], split.train_images, seed))
        run.figure("accuracy", accuracy_figure(reported, split.chance))
    run.verdict(*sentences(problem.subject, comparisons, report, closed))
