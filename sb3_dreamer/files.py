"""What a saved agent consists of, and how to read one without running its code.

::

    model.zip
      data                   settings, as JSON. What JSON cannot hold is pickled there by SB3, see below
        described            format, name of the policy, spaces: all that ``predict`` needs besides the weights
      policy.pth             weights, tensors only (read with ``weights_only=True``)
      policy.optimizer.pth   state of the optimizer, tensors only
      pytorch_variables.pth  empty

Pickled in ``data``, and not needed to act: ``policy_class``, ``observation_space`` and ``action_space`` (``described``
has them too), ``lr_schedule``, ``train_freq``, ``replay_buffer_class``, ``_last_episode_starts``, ``ep_info_buffer``,
``ep_success_buffer``, and of the settings those that JSON cannot hold: a ``learning_rate`` that is a function, and
``replay_buffer_kwargs`` or ``policy_kwargs`` with objects in them. Unpickling runs code. ``load(trusted=False)``
reads none of it. A replay buffer (``replay_buffer.pkl``) and what ``policy.save`` writes are pickles as a whole:
read only your own.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_pkl, open_path

from sb3_dreamer.checks import constructor_parameters

FORMAT = 5
PICKLED = ":serialized:"  # SB3's mark of a pickled attribute
# arguments of SB3's base class that nothing here reads
UNUSED_SB3_ARGUMENTS = (
    "tau", "gradient_steps", "train_freq", "action_noise", "n_steps", "optimize_memory_usage",
    "use_sde", "sde_sample_freq", "use_sde_at_warmup",
)  # fmt: skip

# what SB3's save() leaves out unless it is asked for; load() would build an environment that a file names
NEVER_SAVED = {
    "policy", "device", "env", "replay_buffer", "rollout_buffer",
    "_vec_normalize_env", "_episode_storage", "_logger", "_custom_logger",
}  # fmt: skip

FileLike = str | pathlib.Path | io.BufferedIOBase


# -- spaces as data ----------------------------------------------------------------------------------------------------


def _number(bound: np.ndarray) -> Any:
    """A bound as a list, or as one number if all are the same."""
    return bound.flat[0].item() if bound.size and (bound == bound.flat[0]).all() else bound.tolist()


def _integers(space: spaces.Space) -> dict[str, str]:
    """The dtype, if it is not int64: older versions of Gymnasium have no argument for it."""
    return {} if space.dtype == np.int64 else {"dtype": str(space.dtype)}


def describe_space(space: spaces.Space) -> dict[str, Any]:
    """A space as JSON.

    :raises ValueError: for a kind of space that no agent can have.
    """
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "spaces": {key: describe_space(sub) for key, sub in space.spaces.items()}}
    if isinstance(space, spaces.Box):
        bounds = {"low": _number(space.low), "high": _number(space.high)}
        return {"kind": "Box", **bounds, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start), **_integers(space)}
    if isinstance(space, spaces.MultiDiscrete):
        start = np.asarray(getattr(space, "start", np.zeros_like(space.nvec)))
        return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": start.tolist(), **_integers(space)}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.shape)}
    raise ValueError(f"{space} has no description")


def space_from(described: Mapping[str, Any]) -> spaces.Space:
    """Inverse of :func:`describe_space`."""
    arguments = dict(described)
    kind = arguments.pop("kind")
    if kind == "Dict":
        return spaces.Dict([(key, space_from(sub)) for key, sub in arguments["spaces"].items()])
    if kind == "Box":
        shape, dtype = tuple(arguments["shape"]), np.dtype(arguments["dtype"])
        low, high = (np.broadcast_to(np.asarray(arguments[key], dtype), shape).copy() for key in ("low", "high"))
        return spaces.Box(low, high, shape, dtype.type)
    if "dtype" in arguments:
        arguments["dtype"] = np.dtype(arguments["dtype"]).type
    if kind == "MultiDiscrete" and not np.any(arguments["start"]):
        arguments.pop("start")  # older versions of Gymnasium have no such argument
    makers = {"Discrete": spaces.Discrete, "MultiDiscrete": spaces.MultiDiscrete, "MultiBinary": spaces.MultiBinary}
    return makers[kind](**arguments)


def describe(policy: type[BasePolicy], observation_space: spaces.Space, action_space: spaces.Space) -> dict[str, Any]:
    """What ``load(trusted=False)`` needs, as JSON; saved with the agent."""
    return {
        "format": FORMAT,
        "policy": policy.__name__,
        "observation_space": describe_space(observation_space),
        "action_space": describe_space(action_space),
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def read_settings(path: FileLike) -> dict[str, Any]:
    """The JSON of a saved agent, without unpickling anything, after a check of the whole file.

    :param path: of the file that ``save`` wrote.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if the file is no saved agent, truncated, damaged, or in the format of another version.
    """
    file = open_path(path, "r", suffix="zip")
    try:
        _check_whole(file, path)
        with zipfile.ZipFile(file) as archive:
            settings = json.loads(archive.read("data")) if "data" in archive.namelist() else {}
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again, or take an older checkpoint") from error
    finally:
        if isinstance(path, str | pathlib.Path):
            file.close()
    described = settings.get("described") if isinstance(settings, dict) else None
    if not isinstance(described, dict):
        raise ValueError(f"{path} was not saved by Dreamer: load it with the algorithm that saved it")
    if (saved := described.get("format", 0)) != FORMAT:
        age = "an older" if saved < FORMAT else "a newer"
        raise ValueError(
            f"{path} was saved by {age} version of sb3_dreamer, in format {saved}, this one reads {FORMAT}: "
            "load it with the version that saved it"
        )
    return settings


def _check_whole(file: Any, path: FileLike) -> None:
    """Check that a file is a complete zip file with correct checksums.

    :raises ValueError: if it is no zip file, or truncated.
    :raises zipfile.BadZipFile: if a checksum is wrong.
    """
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        raise ValueError(f"{path} is not a zip file, so no saved agent: was it written by save()?")
    if not zipfile.is_zipfile(file) or _begins_at(file) != 0:  # a .pth inside is a zip file too, with an end of its own
        raise ValueError(f"{path} is truncated, its end is missing: copy it again, or take an older checkpoint")
    with zipfile.ZipFile(file) as archive:
        if bad := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {bad} is wrong")
    file.seek(0)


def _begins_at(file: Any) -> int:
    """Offset of the first part of a zip file, according to the directory at its end."""
    with zipfile.ZipFile(file) as archive:
        return min((part.header_offset for part in archive.infolist()), default=0)


def in_place_of_pickles(
    settings: Mapping[str, Any], policies: Mapping[str, type[BasePolicy]], cls: type, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Replacements, made from data, for everything that is pickled in a saved agent.

    :param settings: of :func:`read_settings`.
    :param policies: policies by name; a file that names another one is refused.
    :param cls: the algorithm, whose defaults replace settings that are pickled.
    :param given: objects that the caller provides instead.
    :return: for ``custom_objects``.
    :raises ValueError: if the file lacks the description, names an unknown policy, or would overwrite methods.
    """
    described = settings["described"]
    if methods := sorted(key for key in settings if callable(getattr(cls, key, None))):
        raise ValueError(f"the file would overwrite the methods {methods}: no save() wrote that")
    if objects := sorted(NEVER_SAVED & settings.keys()):
        raise ValueError(f"the file holds {objects}, which save() leaves out: only trusted=True can load it")
    try:
        own_spaces = {key: space_from(described[key]) for key in ("observation_space", "action_space")}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the file describes no spaces that an agent could have ({error!r})") from error
    if (wanted := str(described.get("policy"))) not in policies:
        raise ValueError(
            f"the file asks for the policy class {wanted}, which is not one of {sorted(policies)}: "
            "only trusted=True can load it"
        )
    defaults = {name: parameter.default for name, parameter in constructor_parameters(cls).items()}
    replaced: dict[str, Any] = {
        key: {} if key.endswith("_kwargs") else defaults.get(key.removeprefix("_"), getattr(cls, key, None))
        for key, value in settings.items()
        if isinstance(value, dict) and PICKLED in value and key not in given
    }
    if lost := sorted(replaced.keys() & defaults.keys()):
        warnings.warn(f"{lost} of the saved agent are pickled and were not read, their defaults are used", stacklevel=3)
    folders: dict[str, Any] = {"tensorboard_log": None, "replay_buffer_kwargs": {}}  # chosen by whoever wrote the file
    if lost := sorted(key for key in folders if settings.get(key) and key not in {*replaced, *given}):
        warnings.warn(f"{lost} of the saved agent name folders and were not read: give your own", stacklevel=3)
    replaced |= folders | own_spaces
    return {**replaced, "policy_class": policies[wanted], "train_freq": 1, **given}


def check_parameters(given: dict[str, dict[str, Any]], own: dict[str, dict[str, Any]], exact_match: bool) -> None:
    """Refuse parameters that do not match those of an agent, before any of them is loaded.

    :param given: "policy" and "policy.optimizer" -> name -> value.
    :param own: the same of the agent.
    :param exact_match: whether none may be missing or unknown.
    :raises ValueError: for another shape, and for unknown or missing names.
    """
    absent = [f"{part} {name}" for part in own for name in sorted(own[part].keys() - given.get(part, {}).keys())]
    unknown = [part for part in given if part not in own]
    unknown += [f"{part} {name}" for part in own for name in sorted(given.get(part, {}).keys() - own[part].keys())]
    if exact_match and (absent or unknown):
        raise ValueError(
            f"the parameters do not match, missing: {', '.join(absent[:5]) or 'none'}, unknown: "
            f"{', '.join(unknown[:5]) or 'none'}. Nothing was changed; exact_match=False loads those that match"
        )
    groups, wanted = (
        [len(group["params"]) for group in part.get("policy.optimizer", {}).get("param_groups", [])]
        for part in (given, own)
    )
    if groups and groups != wanted:
        raise ValueError(
            f"the optimizer's parameters belong to another agent: groups of {groups}, here {wanted}. "
            "Nothing was changed"
        )
    for name, value in given.get("policy", {}).items():
        if name in own["policy"] and value.shape != own["policy"][name].shape:
            raise ValueError(
                f"the parameters belong to an agent with other spaces or widths: {name} has shape "
                f"{tuple(value.shape)}, here {tuple(own['policy'][name].shape)}. Nothing was changed"
            )


def unpickled(path: FileLike, what: str, verbose: int = 0) -> Any:
    """The object that SB3 has pickled into a file.

    :param path: with or without its ``.pkl``, or an open file.
    :param what: what the file should hold, for the message.
    :param verbose: as in SB3.
    :raises ValueError: if the file is truncated or no pickle, or if it needs other versions of its classes.
    """
    file = open_path(path, "r", verbose, suffix="pkl")
    try:
        return load_from_pkl(file, verbose)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no {what} ({error}): give another file") from error
    except (AttributeError, ImportError) as error:
        raise ValueError(f"{path} was saved by other versions of these packages ({error}): use those") from error
    finally:
        if file is not path:
            file.close()


@contextmanager
def atomic_write(path: FileLike, suffix: str) -> Iterator[Any]:
    """A file to write that replaces an older one once it is complete and on the disk; an open file is used directly.

    :param path: with SB3's rules: ``suffix`` is added if there is none, missing folders are made.
    :param suffix: without the dot.
    """
    if not isinstance(path, str | pathlib.Path):
        yield path
        return
    path = pathlib.Path(path)
    path = (path if path.suffix else pathlib.Path(f"{path}.{suffix}")).resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def known_args(agent: type, saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse unknown keyword arguments of load(), which SB3 would silently store as attributes.

    :param agent: the class of the agent.
    :param saved: the settings in its file.
    :param given: the keyword arguments.
    :return: the keyword arguments by attribute: the name of one differs.
    :raises TypeError: names the unknown ones.
    """
    known = (saved.keys() | constructor_parameters(agent).keys()) - {*UNUSED_SB3_ARGUMENTS, "policy"}
    if unknown := sorted(given.keys() - known):
        raise TypeError(f"load() got {', '.join(unknown)}, which {agent.__name__} does not have")
    return {"_stats_window_size" if name == "stats_window_size" else name: value for name, value in given.items()}
