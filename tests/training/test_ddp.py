"""DDP sums as the plain sum would."""

from pathlib import Path

from launch import finish, ranks_of, start

AGAINST_A_PLAIN_SUM = """
import sys
sys.path.insert(0, {tests!r})
import copy, torch
import torch.distributed as dist
from tiny import TINY
from smolforge.config import RunConfig
from smolforge.distributed import init_distributed
from smolforge.model.architecture import build_model
from smolforge.training.optim import build_optimizer
from smolforge.training.plan import make_plan
from smolforge.training.step import replicate, train_step

ranks = init_distributed(torch.device("cpu"))
torch.set_num_threads(1)

def trained(name, precision, micro_batch, with_ddp):
    training = TINY["training"] | {{"precision": precision, "micro_batch": micro_batch}}
    optimizer = TINY["optimizer"] | {{"name": name}}
    config = RunConfig.model_validate(TINY | {{"training": training, "optimizer": optimizer}})
    plan = make_plan(config, torch.device("cpu"), ranks.world_size)
    model = build_model(config.model, **plan.model_options)
    optimizer = build_optimizer(model, config.optimizer, update=plan.update)
    replica = replicate(model, ranks) if with_ddp else None
    if not with_ddp:
        get_total_norm = torch.nn.utils.get_total_norm
        def summed(gradients):
            for gradient in gradients:
                dist.all_reduce(gradient)
            return get_total_norm(gradients)
        torch.nn.utils.get_total_norm = summed
    generator = torch.Generator().manual_seed(ranks.rank)
    for _ in range(3):
        tokens = torch.randint(320, (plan.sequences, 33), generator=generator)
        figures = train_step(model, optimizer, plan, config, tokens, None, lr=1e-2, ranks=ranks, replica=replica)
    if not with_ddp:
        torch.nn.utils.get_total_norm = get_total_norm
    return [float(figure) for figure in figures], list(model.parameters())

for case in [("adamw", "fp32", 4), ("adamw", "fp32", 1), ("adamw", "bf16-pure", 2), ("muon", "fp32", 2)]:
    (ours, weights), (theirs, expected) = trained(*case, True), trained(*case, False)
    assert ours == theirs, (case, ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True)), case
ranks.close()
sys.exit()
"""


def test_bitwise_the_plain_sum_of_two_ranks() -> None:
    program = AGAINST_A_PLAIN_SUM.format(tests=str(Path(__file__).parent))
    for process in [start([], environment, first=program) for environment in ranks_of(2)]:
        finish(process)
