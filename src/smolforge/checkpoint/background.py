"""Save checkpoints in a thread, so that training continues while the disk works.

The state is copied to the host before `save` returns, so training cannot change it. One save runs at a time. A failed
save raises at the next call. The thread is not a daemon: Python waits for it before the process ends.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge.checkpoint.commit import commit

if TYPE_CHECKING:
    from torch import Tensor


class Committer:
    """Commits checkpoints one after the other, in a thread or in the caller's.

    Args:
        checkpoints: RUN/checkpoints.
        asynchronous: False does everything before `save` returns, through the same code.
        after: called with each committed directory, in the thread that saved it (to prune, for example).
    """

    def __init__(
        self, checkpoints: Path, *, asynchronous: bool = True, after: Callable[[Path], None] | None = None
    ) -> None:
        self.checkpoints = checkpoints
        self.asynchronous = asynchronous
        self.last: Path | None = None
        """The newest directory that this committer committed."""
        self._after = after
        self._pool = ThreadPoolExecutor(1, "save")
        self._saving: Future[None] | None = None

    def save(self, step: int, tree: Any, write: Callable[[Path, Any], None], *, is_copy: bool = False) -> None:
        """Commit `step`. Waits for a save that is still in flight.

        Args:
            tree: nested dicts, lists and tuples with the tensors to save; copied to the host here.
            write: called as `write(directory, copy of the tree)`.
            is_copy: the tree is on the host and nobody changes it, so it is not copied again.

        Raises:
            The error of the save before this one; this one is then not started. When not asynchronous, also the
            error of this one.
        """
        self.wait()
        copies = self.asynchronous and not is_copy
        self.run(self._commit, step, snapshot(tree) if copies else tree, write)

    def run(self, work: Callable[..., None], *args: Any) -> None:
        """Do other work in the place of a save: what another process than the first writes of a checkpoint.

        Raises:
            As `save`.
        """
        self.wait()
        if self.asynchronous:
            self._saving = self._pool.submit(work, *args)
        else:
            work(*args)

    def _commit(self, step: int, tree: Any, write: Callable[[Path, Any], None]) -> None:
        self.last = commit(
            self.checkpoints, step, lambda directory: write(directory, tree), expected_bytes=tree_bytes(tree)
        )
        if self._after is not None:
            self._after(self.last)

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._saving is not None and not self._saving.done()

    def poll(self) -> None:
        """Raise what a finished save failed with; never waits. For every step of training."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight, and raise what it failed with."""
        if self._saving is not None:
            wait([self._saving])
            saving, self._saving = self._saving, None
            saving.result()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
        elif self._saving is not None:
            wait([self._saving])  # the first error is the one to tell


def snapshot(tree: Any) -> Any:
    """A copy of `tree` whose tensors are on the host and belong to nobody else; shared tensors stay shared."""
    import torch

    copies: dict[tuple[Any, ...], Tensor] = {}
    devices: set[torch.device] = set()

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            # Two names of one tensor give one copy. A view of the same place with the same shape is the same tensor.
            key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if value.numel() == 0 or key not in copies:
                copies[key] = _to_host(value.detach(), devices)
            return copies[key]
        return value.copy() if type(value).__module__ == "numpy" and hasattr(value, "copy") else value

    result = map_leaves(copy, tree)
    for device in devices:
        torch.cuda.synchronize(device)
    return result


def _to_host(tensor: Tensor, devices: set[Any]) -> Tensor:
    import torch

    if tensor.device.type == "cpu":
        return tensor.clone()
    if tensor.device.type != "cuda":
        return tensor.to("cpu")
    # All copies are queued and waited for together; page-locked memory is what lets the GPU write by itself.
    devices.add(tensor.device)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def tree_bytes(tree: Any) -> int:
    """Bytes of all tensors in a tree, each counted once."""
    import torch

    seen: dict[tuple[int, torch.Size, Any], int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            seen[(value.data_ptr() or id(value), value.shape, value.dtype)] = value.nbytes

    map_leaves(visit, tree)
    return sum(seen.values())


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree`, nested dicts, lists and tuples, with `function` of each value in it."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, inner) for key, inner in tree.items()}
    if isinstance(tree, (list, tuple)):
        mapped = [map_leaves(function, inner) for inner in tree]
        return mapped if isinstance(tree, list) else tuple(mapped)
    return function(tree)
