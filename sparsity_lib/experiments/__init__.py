"""The full-size runs behind the book's tables and figures, by the name of the file they write to results/."""

import importlib.util

import torch

from sparsity_lib.bench import (
    batch,
    calibration,
    cwic,
    cwic_gpu,
    cwic_train,
    decode,
    evaluation,
    glu,
    gpu,
    matvec,
    nm,
    nm_gpu,
    scaling,
    streaming,
)
from sparsity_lib.experiments import (
    claws_benchmarks,
    claws_lora,
    claws_stability,
    claws_sweep,
    compare_protocol,
    compare_quality,
    compare_rivals,
    compare_search,
    compare_speed,
    compare_tasks,
    compare_tasks_many,
    cwic_ablations,
    cwic_head,
    cwic_limit,
    cwic_patterns,
    cwic_rates,
    cwic_small,
    cwic_smol,
    cwic_tasks,
    explorer_masks,
    nm_energy,
    nm_quality,
    nm_tasks,
    nm_training,
    rounding,
    scap_beams,
    scap_center,
    scap_coverage,
    scap_decode,
    scap_grid,
    scap_targets,
    scap_tasks,
    smallnets,
    teal_allocation,
)


def stress_trials(checkpoint):
    """Faults and bad inputs, tried (`sparsity_lib.stress`); imported late, because it imports most of the library."""
    from sparsity_lib.stress.experiment import run

    return run(checkpoint)


EXPERIMENTS = {
    "claws_sweep": claws_sweep.run,
    "claws_benchmarks": claws_benchmarks.run,
    "claws_lora": claws_lora.run,
    "claws_stability": claws_stability.run,
    "scap_grid": scap_grid.run,
    "scap_tasks": scap_tasks.run,
    "scap_center": scap_center.run,
    "scap_coverage": scap_coverage.run,
    "scap_targets": scap_targets.run,
    "scap_beams": scap_beams.run,
    "teal_allocation": teal_allocation.run,
    "explorer_masks": explorer_masks.run,
    "nm_quality": nm_quality.run,
    "nm_tasks": nm_tasks.run,
    "nm_energy": nm_energy.run,
    "nm_training": nm_training.run,
    "cwic_small": cwic_small.run,
    "cwic_ablations": cwic_ablations.run,
    "cwic_smol": cwic_smol.run,
    "cwic_head": cwic_head.run,
    "cwic_limit": cwic_limit.run,
    "cwic_rates": cwic_rates.run,
    "cwic_patterns": cwic_patterns.run,
    "cwic_tasks": cwic_tasks.run,
    "bench/scap_decode": scap_decode.run,
    "compare_quality": compare_quality.run,
    "compare_protocol": compare_protocol.run,
    "compare_search": compare_search.run,
    "compare_rivals": compare_rivals.run,
    "compare_tasks": compare_tasks.run,
    "compare_tasks_many": compare_tasks_many.run,
    "smallnets": smallnets.run,
    "rounding": rounding.run,
    "stress": stress_trials,
    "bench/matvec": matvec.run,
    "bench/glu": glu.run,
    "bench/batch": batch.run,
    "bench/decode": decode.run,
    "bench/evaluation": evaluation.run,
    "bench/calibration": calibration.run,
    "bench/streaming": streaming.run,
    "bench/gpu": gpu.run,
    "bench/cwic": cwic.run,
    "bench/nm": nm.run,
    "bench/compare": compare_speed.run,
    "bench/nm_gpu": nm_gpu.run,
    "bench/cwic_train": cwic_train.run,
    "bench/cwic_gpu": cwic_gpu.run,
    "bench/scaling": scaling.run,
}
#: Those that need a GPU.
ON_GPU = ("bench/gpu", "bench/nm_gpu", "bench/cwic_gpu")


#: The one that needs the extra `cluster`.
ON_DASK = "bench/scaling"


#: Starts processes by fork, which a process that has computed with several threads must not: `make stress` has one of its own.
APART = "stress"


def runnable() -> list[str]:
    """The names of those that one process on this machine can run: all but the GPU's measurements without one, Dask's without
    it, and the trials of `make stress`."""
    dask = importlib.util.find_spec("distributed") is not None
    return [name for name in EXPERIMENTS
            if (name not in ON_GPU or torch.cuda.is_available()) and (name != ON_DASK or dask) and name != APART]
