"""One root for every error Verst raises on purpose, so that the command line can tell a diagnosis from a defect.

A message says what was wrong, where, and what to do about it. Anything that is not a `VerstError` is a bug and is shown with
its traceback.
"""


class VerstError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(VerstError):
    """A run file or an override is invalid. The message names the key."""


class DataError(VerstError):
    """A prompt source is missing, empty or malformed. The message names file and line (or row)."""


class ModelError(VerstError):
    """A model directory lacks a tokenizer or weights, or does not fit what it is asked to load."""


class ExtensionError(VerstError):
    """A user's function could not be imported or does not have the expected signature."""


class EnvironmentFailure(VerstError):
    """An environment raised or broke its protocol. Fails one trajectory, never the run."""


class RoutesRefused(VerstError):
    """Recorded routes are missing or do not fit their tokens. Fails one trajectory: a guess would be another gradient."""


class RewardFailure(VerstError):
    """A reward function crashed, timed out or returned something that is not a number. Fails one trajectory."""


class CallFailed(VerstError):
    """A user's object in a process of its own raised, took too long, took its process with it, or returned what it must not.

    `lost`: the process is gone, and with it what the object knew.
    """

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


class EngineFailure(VerstError):
    """An engine broke, or an answer of it violates the protocol."""


class WeightMismatch(VerstError):
    """Weights an engine holds differ from those that were published. The message names the tensors."""


class CorruptWeights(VerstError):
    """Weights or optimizer state of a trainer rank changed while nothing may change them, or copies of them differ between ranks.

    The message names ranks and tensors. `ranks`: those that may be damaged.
    """

    ranks: tuple[int, ...] = ()


class CheckpointError(VerstError):
    """A checkpoint is missing, truncated, corrupt, or belongs to another model."""


class JournalError(VerstError):
    """A journal is corrupt beyond a torn tail, or belongs to another run or format."""


class RunLocked(VerstError):
    """The run directory is in use by a living process."""


class TrainingDiverged(VerstError):
    """Too many non-finite updates, or a fidelity limit was passed."""


class InvariantViolation(VerstError):
    """Something that must hold did not. The run stops; its directory stays intact."""


class CollectiveFailed(VerstError):
    """Trainer ranks lost touch with one another in the middle of a collective: one has died or stands still, or the network failed."""


class DeviceFailed(VerstError):
    """A GPU, or a process's context on it, is broken: the process can compute nothing more, another one may."""


class DeadlineExceeded(VerstError):
    """A wait ran out of time. The message names who was awaited, for what, and how long."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, as far as a message has room for it; its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
