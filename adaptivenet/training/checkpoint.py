"""Checkpoints that a killed run resumes from, bit for bit (orbax underneath)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from adaptivenet.training.state import is_typed_key


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the folder and says what to do."""


class Checkpoints:
    """A folder with the last few checkpoints of one run.

    A checkpoint is a pytree of arrays and a dict for JSON. Leaves of any dtype come back bit for
    bit: floats of all sizes, integers, bool, random keys (raw or typed), empty arrays; NamedTuples
    and `optax.MaskedNode` come back because the structure is taken from the tree that is asked for.
    Writing is synchronous and atomic: a checkpoint that a killed process left half-written is never
    seen. Only one process may use a folder at a time.

    Args:
        folder: Where the checkpoints live; made when needed.
        keep: How many to keep, at least 1; older ones are deleted after a newer one is whole.
        fingerprint: Names what the run depends on, for example `config_hash(config)`; a checkpoint
            of another fingerprint is refused.
        every: Epochs from one checkpoint to the next; a killed run repeats at most these.

    Raises:
        ValueError: If `keep` or `every` is less than 1.

    >>> import tempfile, jax.numpy as jnp
    >>> checkpoints = Checkpoints(tempfile.mkdtemp())
    >>> checkpoints.save(3, {"w": jnp.arange(3.0)}, {"note": "fine"})
    >>> checkpoints.latest()
    3
    >>> checkpoints.restore({"w": jnp.zeros(3)})
    ({'w': Array([0., 1., 2.], dtype=float32)}, {'note': 'fine'})
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep: int = 2,
        *,
        fingerprint: str = "",
        every: int = 1,
    ):
        if keep < 1 or every < 1:
            raise ValueError(f"keep and every must be at least 1, got {keep} and {every}")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.fingerprint = fingerprint
        self.every = every
        self._manager: Any = None

    def latest(self) -> int | None:
        """Returns the number of the newest whole checkpoint, or `None`."""
        return self._open().latest_step() if self.folder.exists() else None

    def save(self, epoch: int, tree: Any, meta: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint; when this returns, it is whole and on disk.

        Args:
            epoch: Its number; larger than that of every checkpoint in the folder.
            tree: Pytree of arrays.
            meta: Anything that JSON can hold.

        Raises:
            CheckpointError: If the folder holds this or a later checkpoint already.
        """
        import orbax.checkpoint as ocp

        manager = self._open()
        latest = manager.latest_step()
        if latest is not None and epoch <= latest:
            raise CheckpointError(
                f"{self.folder} already holds checkpoint {latest}, so {epoch} is not written; "
                "resume from it, or choose another folder"
            )
        leaves, arrays = _describe(tree)
        document = {"fingerprint": self.fingerprint, "leaves": leaves, "meta": meta or {}}
        parts: dict[str, Any] = {"document": ocp.args.JsonSave(document)}
        if arrays:
            parts["arrays"] = ocp.args.StandardSave(arrays)
        manager.save(epoch, args=ocp.args.Composite(**parts))

    def restore(self, like: Any, epoch: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint back.

        Args:
            like: Pytree of arrays (or `jax.ShapeDtypeStruct`) with the structure, shapes, dtypes
                and shardings to restore into; its values are not used.
            epoch: Number of the checkpoint; by default the newest.

        Returns:
            `(tree, meta)` as they were saved.

        Raises:
            CheckpointError: If there is no such checkpoint, it belongs to another configuration, it
                does not fit `like`, or its files are damaged.
        """
        import orbax.checkpoint as ocp

        manager = self._open()
        epoch = manager.latest_step() if epoch is None else epoch
        if epoch is None or epoch not in manager.all_steps():
            raise CheckpointError(
                f"{self.folder} holds no checkpoint {'' if epoch is None else epoch}"
            )
        folder = self.folder / str(epoch)
        try:
            parts = manager.restore(epoch, args=ocp.args.Composite(document=ocp.args.JsonRestore()))
            document = parts["document"]
            saved, fingerprint, meta = (document[k] for k in ("leaves", "fingerprint", "meta"))
        except Exception as error:
            raise self._damaged(folder, error) from error
        if fingerprint != self.fingerprint:
            raise CheckpointError(
                f"{folder} belongs to another configuration (fingerprint {fingerprint!r}, this run "
                f"has {self.fingerprint!r}); choose another folder, or delete it to start anew"
            )
        wanted, arrays = _describe(like)
        self._check_fit(folder, saved, wanted)
        restored: dict[str, Any] = {}
        if arrays:
            targets = {
                name: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)
                )
                for name, leaf in arrays.items()
            }
            try:
                args = ocp.args.Composite(arrays=ocp.args.StandardRestore(targets))
                restored = manager.restore(epoch, args=args)["arrays"]
            except Exception as error:
                raise self._damaged(folder, error) from error
        leaves = [_rebuild(restored.get(name), facts) for name, facts in saved.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), meta

    def delete(self) -> None:
        """Deletes all checkpoints of the folder."""
        self.close()
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def close(self) -> None:
        """Releases orbax's resources; the next call opens the folder again."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self) -> Any:
        if self._manager is None:
            import orbax.checkpoint as ocp

            self.folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.keep,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def _check_fit(self, folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
        differences = []
        for name in [*wanted, *(name for name in saved if name not in wanted)]:
            found, asked = saved.get(name), wanted.get(name)
            if found is None or asked is None:
                differences.append(
                    f"{name} is only in the {'run' if found is None else 'checkpoint'}"
                )
                continue
            if any(found[fact] != asked[fact] for fact in ("dtype", "shape")):
                differences.append(f"{name} is {_spell(found)}, the run has {_spell(asked)}")
        if differences:
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise CheckpointError(
                f"{folder} does not fit this run: {'; '.join(differences[:3])}{more}. "
                "It was written by another configuration: choose another folder, "
                "or delete it to start anew"
            )
        if list(saved) != list(wanted):
            raise CheckpointError(f"{folder} holds the leaves of this run in another order")

    def _damaged(self, folder: Path, error: Exception) -> CheckpointError:
        others = [step for step in self._open().all_steps() if str(step) != folder.name]
        then = f"the run continues from {max(others)}" if others else "the run starts anew"
        return CheckpointError(
            f"{folder} cannot be read ({type(error).__name__}: {error}). Move it away and "
            f"start the same command again: {then}"
        )


def _describe(tree: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Facts of every leaf by name, and the arrays to store (keys raw, empty arrays left out)."""
    facts: dict[str, dict[str, Any]] = {}
    arrays: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "."
        if name in facts:
            raise CheckpointError(f"two leaves of the tree are named {name!r}")
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            leaf = jnp.asarray(leaf)
        facts[name] = {
            "dtype": str(leaf.dtype),
            "shape": list(leaf.shape),
            "weak": bool(getattr(leaf, "weak_type", False)),
            "impl": "",
        }
        if is_typed_key(leaf):
            if isinstance(leaf, jax.Array):
                facts[name]["impl"] = str(jax.random.key_impl(leaf))
                leaf = jax.random.key_data(leaf)
            else:
                leaf = jax.eval_shape(jax.random.key_data, leaf)
        if leaf.size:
            arrays[name] = leaf
    return facts, arrays


def _rebuild(array: Any, facts: dict[str, Any]) -> Any:
    """Turns a stored array back into the leaf that was saved."""
    if array is None:
        dtype, shape = facts["dtype"], tuple(facts["shape"])
        if not facts["impl"]:
            return jnp.zeros(shape, dtype)
        # The trailing axis of key data depends on the generator.
        width = jax.random.key_data(jax.random.key(0, impl=facts["impl"])).shape[-1]
        array = jnp.zeros((*shape, width), jnp.uint32)
    if facts["impl"]:
        return jax.random.wrap_key_data(array, impl=facts["impl"])
    zero = {"int32": 0, "float32": 0.0}.get(facts["dtype"])
    if facts["weak"] and zero is not None:
        # Weakly typed leaves promote differently, so a resumed run needs them weak again.
        return jnp.broadcast_to(jnp.asarray(zero), array.shape).at[...].set(array)
    return array


def _spell(facts: dict[str, Any]) -> str:
    return f"{facts['dtype']}{facts['shape']}"
