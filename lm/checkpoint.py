"""Checkpoints: asynchronous, atomic, with one layout on disk whatever the mesh, and checked before they are read.

A state is stored as a tree of plain dictionaries named by its paths, beside a JSON object for what is not an array.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationContext

from lm import tree
from lm.errors import UserError, check


@dataclass
class _KeepLatestAndBest:
    """The last `latest` checkpoints and the best one."""

    latest: int
    best: int | None = None

    def should_preserve(self, checkpoints: list[PolicyCheckpointInfo], *, context: PreservationContext) -> list[bool]:
        first_kept = len(checkpoints) - self.latest
        return [i >= first_kept or info.step == self.best for i, info in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      path: their folder.
      keep: how many of the latest to keep, besides the best.
      read_only: for who only reads, while another process may be writing.
      in_flight: bytes being written at once, which take as much memory again; more than the largest array. None = all.
    """

    def __init__(self, path: Path, *, keep: int = 2, read_only: bool = False, in_flight: int | None = None):
        self._folder = path
        self._in_flight = in_flight
        self._policy = _KeepLatestAndBest(keep)
        gigabytes = None if in_flight is None else in_flight / 10**9
        self._manager = ocp.CheckpointManager(
            path.absolute(),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(save_concurrent_gb=gigabytes),
                "extra": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(barrier_sync_fn=_meet),
                read_only=read_only,
                create=not read_only,
            ),
        )

    @classmethod
    def read_only(cls, path: Path) -> "Checkpoints":
        """Checkpoints to read from, while another process may be writing them."""
        return cls(path, read_only=True)

    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, extra: dict[str, Any], *, best: int | None) -> None:
        """Starts writing `state` (a tree of arrays) and `extra` (JSON); returns before it is on disk.

        A crash at any moment leaves the earlier checkpoints whole. `best` names the checkpoint to keep for good.

        Raises:
          OSError: the disk refused this save or, as they go on in the background, the one before.
        """
        self._policy.best = best
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_as_dict(state), ocdbt_target_data_file_size=self._in_flight),
            extra=ocp.args.JsonSave(extra),
        )
        with _disk_errors(self._folder):
            self._manager.save(step, args=arguments)

    def wait(self) -> None:
        """Returns when every save is on disk; raises OSError where the disk refused one."""
        with _disk_errors(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go."""
        with _disk_errors(self._folder):
            self._manager.close()

    def restore_extra(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint; raises UserError if it is damaged."""
        with _damage(step):
            return self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"]

    def compare(self, step: int, target: Any) -> None:
        """Raises `restore`'s UserError if it would; reads only names and shapes."""
        with _damage(step):
            saved = self._manager.item_metadata(step)["state"]
        check(saved is not None, f"checkpoint {step} holds no state; the run directory is damaged")
        found = {path: tuple(leaf.shape) for path, leaf in tree.path_leaves(saved.tree)}
        asked = {path: tuple(leaf.shape) for path, leaf in tree.path_leaves(_as_dict(target))}
        problems = [f"{path} is missing" for path in asked if path not in found]
        problems += [
            f"{path} is {found[path]}, not {asked[path]}"
            for path in asked
            if path in found and found[path] != asked[path]
        ]
        # Whole subtrees may be left out on purpose (evaluation reads no optimizer state), single leaves may not.
        roots = {path.split("/")[0] for path in asked}
        problems += [f"{path} is extra" for path in found if path not in asked and path.split("/")[0] in roots]
        problems.sort(key=lambda problem: problem.count("/"))  # parameters before the optimizer's copies of them
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise UserError(f"checkpoint {step} is of another model: {shown}; use the config it was trained with")

    def restore(self, step: int, target: Any) -> Any:
        """The state saved at `step`, in the structure, dtypes and shardings of `target`.

        Args:
          step: one of `steps()`.
          target: a tree of `jax.ShapeDtypeStruct` with shardings; any mesh will do. It may be a part of what was
            saved: a whole state, or one that holds only its parameters.

        Raises:
          UserError: names or shapes differ; all differences are named and nothing was allocated.
        """
        self.compare(step, target)
        wanted = _as_dict(target)
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        with _damage(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
        by_path = dict(tree.path_leaves(restored))
        leaves = [by_path[path] for path, _ in tree.path_leaves(target)]
        return jax.tree.unflatten(jax.tree.structure(target), leaves)


def whole_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending: one that is being written has another name."""
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def read_arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, as it is on disk: no model and no mesh is asked.

    Raises:
      UserError: it can't be read.
    """
    state = (folder / str(step) / "state").absolute()
    with _damage(step), ocp.PyTreeCheckpointer() as reader:
        shapes = reader.metadata(state).item_metadata.tree
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return dict(tree.path_leaves(reader.restore(state, restore_args=whole)))


def _meet(*, key: str, timeout_ms: int) -> None:
    """Where orbax's threads wait for those of other processes.

    It has them wait for 20 minutes also in a process that has just failed to write, as on a full disk of its own; that
    one is to go on and say so.
    """
    if sys.exc_info()[0] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


@contextlib.contextmanager
def _damage(step: int) -> Iterator[None]:
    """What can't be read, as a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"can't read checkpoint {step}: {reason}; delete its folder to go on from an earlier one"
        ) from error


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """What the disk said, as an OSError: TensorStore, which writes for orbax, puts its number into a ValueError."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        number = int(code.group(1))
        raise OSError(number, os.strerror(number), str(folder)) from error


def _as_dict(state: Any) -> dict[str, Any]:
    """A tree as nested dictionaries keyed by its paths' parts: names on disk do not depend on container types."""
    nested: dict[str, Any] = {}
    for path, leaf in tree.path_leaves(state):
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested
