"""Job arrays of a study for a Slurm cluster, every run checked by clip-train --dry-run first."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import ScalingError
from study_cells import dry_run, options, train_command
from study_grid import Cell
from study_run import Runner

ROOT = Path(__file__).resolve().parents[2]
SPARE = 20  # minutes before the time limit at which clip-train saves its state and ends

TRAIN = """\
#!/bin/bash
#SBATCH --job-name={name}-train
#SBATCH --array=0-{last}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={minutes}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={logs}/%x-%a.log
{more}# {runs} runs of {model}, one a task of the array: the lines of {lines}
set -euo pipefail
cd {root}
mapfile -t lines <{lines}
IFS=$'\\t' read -r home command <<<"${{lines[$SLURM_ARRAY_TASK_ID]}}"
if [ -e "$home/train.json" ]; then exit 0; fi
mkdir -p "$home"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
status=0
launch="{python} -m torch.distributed.run --nnodes=$SLURM_NNODES --nproc-per-node={gpus}"
launch="$launch --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=${{hosts[0]}}:29500"
srun bash -c "exec $launch $command" >"$home/train.json.part" || status=$?
if grep -qE '"status": "(finished|nothing left to do)"' "$home/train.json.part"; then
    mv "$home/train.json.part" "$home/train.json"
elif grep -q '"status": "stopped"' "$home/train.json.part"; then # at its time limit
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
else
    exit $((status ? status : 1))
fi
"""

MEASURE = """\
#!/bin/bash
#SBATCH --job-name={name}-measure
#SBATCH --array=0-{last}
#SBATCH --gpus=1
#SBATCH --time={minutes}
#SBATCH --output={logs}/%x-%a.log
{more}# measures the runs of {lines}
set -euo pipefail
cd {root}
mapfile -t lines <{lines}
IFS=$'\\t' read -r home command <<<"${{lines[$SLURM_ARRAY_TASK_ID]}}"
{python} tools/scaling_study.py {out} --grid {grid} --cell "$(basename "$home")"
"""

SUBMIT = """\
#!/bin/bash
# Submits the study: each run is measured when it has ended, and the report follows the last.
set -euo pipefail
cd {folder}
after=afterok
for train in *-train.sbatch; do
    trained=$(sbatch --parsable "$train")
    measure=${{train%-train.sbatch}}-measure.sbatch
    measured=$(sbatch --parsable --dependency="aftercorr:${{trained%%;*}}" "$measure")
    after=$after:${{measured%%;*}}
done
sbatch --dependency="$after" report.sbatch
"""

REPORT = """\
#!/bin/bash
#SBATCH --job-name={name}-report
#SBATCH --ntasks=1
#SBATCH --time=60
#SBATCH --output={logs}/%x.log
{more}set -euo pipefail
cd {root}
{python} tools/scaling_study.py {out} --grid {grid}
"""


def write_jobs(
    grid: dict[str, Any], cells: Sequence[Cell], path: Path, runner: Runner
) -> dict[str, Any]:
    """Write OUT/slurm, an array for each model, after a dry run of every cell.

    Returns what was written, what a GPU holds (weights, AdamW's state and activations) and
    whatever clip-train warned of.

    Raises:
        ScalingError: a dry run failed; a model has no nodes, or a batch no whole share of a GPU.
    """
    if "slurm" not in grid:
        raise ScalingError(f"{path}: missing: [slurm], as in tools/scaling/paper.toml")
    slurm = grid["slurm"]
    out, gpus = runner.out, slurm["gpus-per-node"]
    folder = out / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    runner.run([[dry_run(grid, cell, out)] for cell in cells], "dry run")
    arrays: dict[str, list[str]] = {}
    held: dict[str, float] = {}
    warned: dict[str, list[str]] = {}
    for cell in cells:
        if cell.model not in slurm["nodes"]:
            raise ScalingError(f"{path}: [slurm.nodes] has no number for {cell.model}")
        world = gpus * slurm["nodes"][cell.model]
        plan = json.loads((out / "plan" / f"{cell.name}.json").read_text())
        if plan["batch_size"] % world:
            raise ScalingError(
                f"{cell.name}: a batch of {plan['batch_size']} does not divide by {world} GPUs; "
                f"change [slurm.nodes] in {path}"
            )
        if plan["state_gib"] is not None and plan["activations_gib"] is not None:
            gib = plan["state_gib"] + plan["activations_gib"] / world
            held[cell.model] = max(held.get(cell.model, 0.0), round(gib, 1))
        if plan["warnings"]:
            warned[cell.name] = plan["warnings"]
        limit = {"time-limit": slurm["minutes"] - SPARE}
        command = shlex.join(train_command(grid, cell, out) + options(limit))
        arrays.setdefault(cell.model, []).append(f"{out / 'cells' / cell.name}\t{command}\n")

    places = {"root": ROOT, "out": out, "grid": path, "python": sys.executable}
    common = {key: shlex.quote(str(value)) for key, value in places.items()}
    common |= {"name": grid["name"], "logs": str(folder), "minutes": slurm["minutes"], "gpus": gpus}
    common["more"] = "".join(f"#SBATCH {option}\n" for option in slurm["options"])
    for model, lines in arrays.items():
        listed = folder / f"{model}.txt"
        listed.write_text("".join(lines))
        about = common | {"last": len(lines) - 1, "runs": len(lines), "model": model}
        about |= {"lines": shlex.quote(str(listed)), "nodes": slurm["nodes"][model]}
        (folder / f"{model}-train.sbatch").write_text(TRAIN.format(**about))
        (folder / f"{model}-measure.sbatch").write_text(MEASURE.format(**about))
    (folder / "report.sbatch").write_text(REPORT.format(**common))
    submit = folder / "submit.sh"
    submit.write_text(SUBMIT.format(folder=shlex.quote(str(folder))))
    submit.chmod(0o755)
    return {
        "submit": str(submit),
        "runs": len(cells),
        "arrays": {model: len(lines) for model, lines in arrays.items()},
        "gpus": {model: gpus * slurm["nodes"][model] for model in arrays},
        "gib_per_gpu": held,
        "total_gmacs": sum(cell.compute for cell in cells),
        "warnings": warned,
    }
