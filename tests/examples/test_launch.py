"""The files of examples/launch: each is parsed, and what it would start is run with programs that only note their words."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from smolforge import cli
from smolforge.config import build_config

FOLDER = Path(__file__).parents[2] / "examples" / "launch"


@pytest.fixture
def started(tmp_path: Path):
    """Runs a script with programs that note their words: (exit code, the words of each program that was started)."""

    def run(script: str, code: int = 0, **environment: str) -> tuple[int, list[list[str]]]:
        noted = tmp_path / "noted"
        for name in ("smolforge", "torchrun", "srun", "scontrol"):
            program = tmp_path / name
            exits = code if name == "srun" else 0
            program.write_text(f'#!/bin/bash\nprintf "%s\\t" {name} "$@" >> {noted}\necho >> {noted}\nexit {exits}\n')
            program.chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(["bash", "-c", script], env={"PATH": path, **environment}, check=False)
        return done.returncode, [line.rstrip("\t").split("\t") for line in noted.read_text().splitlines()]

    return run


def check_smolforge(words: list[str]) -> None:
    """The words of `smolforge` are such that it would train; the preset is one."""
    args = cli.parser(verb="train").parse_args(words)
    assert args.verb == "train" and args.out
    build_config(args.base, [], training={"tokens": args.tokens})


def check_torchrun(words: list[str]) -> None:
    """The words of `torchrun` are its own up to `-m smolforge`."""
    from torch.distributed.run import parse_args

    args = parse_args(words)
    assert args.module and args.training_script == "smolforge"
    check_smolforge(args.training_script_args)


def text(name: str) -> str:
    return (FOLDER / name).read_text()


def test_one_machine(started) -> None:
    code, [[program, *words]] = started(text("one_machine.sh"))
    assert (code, program) == (0, "smolforge")
    check_smolforge(words)


def test_several_machines(started) -> None:
    code, [[program, *words]] = started(text("several_machines.sh"), HEAD="node1", MACHINES="4", OUT="/shared/run")
    assert (code, program) == (0, "torchrun")
    check_torchrun(words)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (143, True), (75, True), (2, False), (1, False)])
def test_slurm_queues_a_saved_run_again(started, code: int, requeued: bool) -> None:
    ended, [[program, *words], *rest] = started(text("slurm.sbatch"), code, OUT="/shared/run", SLURM_JOB_ID="17")
    assert program == "srun"
    check_smolforge(words[words.index("smolforge") + 1 :])
    assert rest == ([["scontrol", "requeue", "17"]] if requeued else [])
    assert ended == (0 if requeued else code)
    assert "#SBATCH --signal=USR1@120\n#SBATCH --requeue" in text("slurm.sbatch")


def test_skypilot(started) -> None:
    task = yaml.safe_load(text("skypilot.yaml"))
    assert set(task) <= {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}
    environment = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
                   "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}  # fmt: skip
    _, [[program, *words]] = started(task["run"], **environment)
    assert program == "torchrun" and words[words.index("--master-addr") + 1] == "10.0.0.1"
    check_torchrun(words)


def test_kubernetes() -> None:
    job = yaml.safe_load(text("pytorchjob.yaml"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for each in replicas.values():
        pod = each["template"]["spec"]
        [container] = pod["containers"]
        assert container["name"] == "pytorch"  # the operator looks for this name
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
        assert container["command"] == ["torchrun"]
        check_torchrun(container["args"])
