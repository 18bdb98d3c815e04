"""The tasks of Slurm's `srun` as ranks of a run."""

from __future__ import annotations

import re
from collections.abc import MutableMapping


def read_slurm(environment: MutableMapping[str, str]) -> None:
    """Set RANK and what belongs to it for a task of Slurm's `srun`, unless a launcher has set it.

    A script that `sbatch` runs without `srun` is one process, whatever SLURM_NTASKS says.
    """
    if "RANK" in environment or not {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"} <= set(environment):
        return
    if int(environment["SLURM_STEP_NUM_TASKS"]) == 1:
        return
    tasks = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"]))
    # With --gpus-per-task each task sees its own GPU only, and that is number 0.
    has_own_gpu = len(environment.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    job = int(environment.get("SLURM_JOB_ID", "0")) * 16 + int(environment.get("SLURM_STEP_ID", "0"))
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if has_own_gpu else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks[int(environment.get("SLURM_NODEID", "0"))]),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(20000 + job % 12000),  # the same on all nodes, and below the ports that Linux hands out
    }
    for name, value in found.items():
        environment.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first name of one of Slurm's lists, such as `gpu[07-09,12],login1`."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).partition(",")[0]


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` → [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]
