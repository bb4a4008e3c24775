"""Stop at any moment and continue as if nothing had happened.

A folder holds complete checkpoints, numbered in order. One appears by a rename once every byte of it is on the disk,
and is renamed before the first byte of it is deleted; names that begin with a dot are never read::

    folder/
      000007_step_30000/         model.zip  replay_buffer.pkl  state.pth
      000008_step_40000/         the newest, which ``Dreamer.resume`` loads
      .000009_step_50000.part/   being written, or being deleted, or left over after a kill

``model.zip`` and ``replay_buffer.pkl`` are what ``save`` and ``save_replay_buffer`` write. ``state.pth`` has the rest:
which run it is, the random states of Python, NumPy and PyTorch, the agent's last observation and recurrent state, and
the environment; numbers, strings and plain containers only, read with ``weights_only=True``.

With an environment that can be restored, the resumed run has the same parameters, bit for bit on a CPU, as one that
was never stopped. An environment can be restored if it (or its outermost wrapper that has them) has two methods::

    def resume_state(self): ...              # all that determines its future, as arrays, numbers, strings, bytes,
    def set_resume_state(self, state): ...   # tuples, lists and dicts of these; called after a reset

Wrappers with a state are restored too: VecNormalize, VecFrameStack and VecMonitor around the vector of environments,
the outermost TimeLimit and Monitor around each of them; the state of other wrappers around a single environment must
be part of ``resume_state``. Any other environment is reset on resume: the running episode ends there, as by a time
limit. A replay on disk (``storage_path``) is not copied: what was collected after the checkpoint is dropped, what it
overwrote is lost, and refreshed latents stay. The rest of a ``warm_start`` is not kept: the actor continues without a
teacher.
"""

from sb3_dreamer.resume.checkpoint import ResumeCallback, checkpoints, resume, save_checkpoint
from sb3_dreamer.resume.state import run_state

__all__ = ["ResumeCallback", "checkpoints", "resume", "run_state", "save_checkpoint"]
