"""The carriers that travel between the parts of Verst. Frozen, NumPy at the boundary, no torch.

Array suffixes: `_T` tokens, `_G` group members. Policy versions count committed steps; version 0 is the initial model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.fields import Field

NO_VERSION = -1
"""The version of a token that no policy produced: prompt tokens, environment replies, demonstrations."""


Estimates = Sequence[float] | Sequence[NDArray[np.float32]]
"""The advantages of a batch's samples, in order: one number for all loss tokens of a sample, or [N], one for each of them."""


class Status(StrEnum):
    """How a trajectory ended."""

    FINISHED = "finished"  # the model or the environment ended it
    TRUNCATED = "truncated"  # a token or turn limit ended it; it is scored and trained like a finished one
    FAILED = "failed"  # engine, environment or reward broke; never trained; `error` says why


class PauseMode(StrEnum):
    """What a pause of an engine does with the requests in flight."""

    IN_PLACE = "in_place"  # they go on after `resume` from the keys and values they have, also under newer weights
    RETRACT = "retract"  # they go on after `resume`; keys and values are computed again, by the weights of then
    ABORT = "abort"  # they end with `FinishReason.ABORT`


class FinishReason(StrEnum):
    """How one generation ended."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_new_tokens or the context limit
    ABORT = "abort"  # cut from outside; the tokens so far are valid and can be continued


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A task: what opens the conversation, and the fields its environment and reward need."""

    id: str  # unique in the source: "file:row", "task:index"
    messages: tuple[Message, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)  # JSON values; e.g. {"answer": "42"}
    demonstration: tuple[Message, ...] = ()  # the assistant's turns to imitate, or the better answer of a pair
    rejected: tuple[Message, ...] = ()  # the worse answer of a pair


@dataclass(frozen=True, slots=True)
class Sampling:
    """The distribution sampled from, and when to stop. `top_k` 0, `top_p` 1 and `min_p` 0 switch those filters off."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy: the distribution is then a point and its log-probabilities are 0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # beside the tokenizer's end-of-sequence tokens


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """How a Mixture-of-Experts model routes: its layers that do, the experts of each, and how many of them a token is given."""

    layers: int
    experts: int
    chosen: int


@dataclass(frozen=True, slots=True)
class Routes:
    """Which experts processed each token: recorded where the tokens were sampled, replayed where they are trained (R3, arXiv 2510.11370).

    The T − 1 rows of T tokens, because the last token is no input. A row is of the pass whose logits gave the next token, whatever
    weights and cached keys that pass had.
    """

    experts_TLK: NDArray[np.uint8] | NDArray[np.int16]
    """[T − 1, L, K] for each Mixture-of-Experts layer, in the model's order; uint8 up to 256 experts, int16 above."""
    digest: str
    """Of the T token ids (`verst.routing.records.tokens_digest`), so that routes of other tokens are noticed."""


@dataclass(frozen=True, slots=True)
class RoutesWanted:
    """What one trainer rank replays: the rows of the samples that are its own, and the layers of its pipeline stages."""

    rank: int  # among the `ranks` that have different samples
    ranks: int
    layers: tuple[int, ...]  # counted among the Mixture-of-Experts layers
    packed: bool  # how its step is planned; see `verst.data.packing.plan_step`


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Token ids in. `seed` fixes the random numbers of this request, whatever its neighbours are.

    A token's depend on the seed and the token's place in the sequence: what goes on from the tokens so far draws as the whole would have.
    """

    id: str
    tokens_T: NDArray[np.int32]
    sampling: Sampling
    seed: int
    routes_from: int | None = None
    """The first token whose routes are wanted: those of the tokens before it are known. None: none are wanted."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Token ids out: new tokens only, the one that stopped generation included.

    `logprobs_T` are of the distribution sampled (after temperature and filters), from the very logits sampled;
    `versions_T` is the policy version that produced each token.
    """

    id: str
    tokens_T: NDArray[np.int32]
    logprobs_T: NDArray[np.float32]
    versions_T: NDArray[np.int32]
    finish: FinishReason
    experts_RLK: NDArray[Any] | None = None
    """[R, L, K] routes of the tokens from `GenerateRequest.routes_from` on, but for the newest, which was no input yet."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What an environment sees of one generation."""

    text: str  # decoded, without end-of-sequence and stop tokens; a stop string that matched is kept
    tokens: tuple[int, ...]
    finish: FinishReason
    logprobs: tuple[float, ...] = ()
    """Of each token, by the distribution that it was sampled from."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What an environment answers to a completion."""

    messages: tuple[Message, ...] = ()  # appended to the conversation when not done
    done: bool = True
    info: Mapping[str, Any] = field(default_factory=dict)
    """JSON values, handed to the reward as `trajectory.info`; and fields (`verst.fields`), which become `trajectory.fields`.

    A `PerToken` has one value for each token generated since its field was last given.
    """


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a trajectory, as a span of its tokens: `[start, generated)` was given, `[generated, end)` was generated."""

    start: int
    generated: int
    end: int
    finish: FinishReason
    text: str


@dataclass(frozen=True, slots=True)
class Branch:
    """Another conversation of a trajectory whose agent did not only append: it went on from an earlier place, or began anew.

    Arrays as those of `Trajectory`. Tokens that it shares with another conversation count as given in all but one of them, so that none
    is trained twice.
    """

    tokens_T: NDArray[np.int32]
    loss_mask_T: NDArray[np.bool_]
    logprobs_T: NDArray[np.float32]
    versions_T: NDArray[np.int32]
    turns: tuple[Turn, ...]
    messages: tuple[Message, ...]
    routes: Routes | None = None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One rollout, exact to the token. Arrays have one entry for each token of the whole conversation.

    Where `loss_mask_T` is False the token was given: its log-probability is 0 and its version `NO_VERSION`.
    """

    id: str  # "GROUP/MEMBER"
    tokens_T: NDArray[np.int32]
    loss_mask_T: NDArray[np.bool_]
    logprobs_T: NDArray[np.float32]
    versions_T: NDArray[np.int32]
    turns: tuple[Turn, ...]
    messages: tuple[Message, ...]
    status: Status
    seed: int
    error: str | None = None
    reward: float | None = None  # None until scored, and for failed trajectories
    info: Mapping[str, Any] = field(default_factory=dict)
    routes: Routes | None = None  # None: of a dense model, or not recorded
    fields: Mapping[str, Field] = field(default_factory=dict)
    """Of the environment and, once scored, of the reward. A `PerToken` has one value for each token of the loss mask, then of those of the
    branches."""
    branches: tuple[Branch, ...] = ()
    """Of agents: conversations beside the one that had the last answer, in the order in which they began."""

    def __post_init__(self) -> None:
        lengths = {len(self.tokens_T), len(self.loss_mask_T), len(self.logprobs_T), len(self.versions_T)}
        if len(lengths) != 1:
            raise ValueError(f"trajectory {self.id}: token arrays of different lengths {sorted(lengths)}")

    @property
    def completion(self) -> str:
        """Text of the last generated turn."""
        return self.turns[-1].text if self.turns else ""

    @property
    def sequences(self) -> tuple[Trajectory | Branch, ...]:
        """All that is trained of it: its own tokens, then those of its branches."""
        return (self, *self.branches)

    @property
    def generated_tokens(self) -> int:
        """Tokens that a policy sampled, in all sequences; none of a demonstration."""
        return sum(int((one.versions_T != NO_VERSION).sum()) for one in self.sequences)

    @property
    def oldest_version(self) -> int | None:
        """Oldest policy version among the tokens that are trained; None if nothing was sampled, as in a demonstration."""
        versions_N = np.concatenate([one.versions_T[one.loss_mask_T] for one in self.sequences])
        oldest = int(versions_N.min()) if versions_N.size else NO_VERSION
        return None if oldest == NO_VERSION else oldest

    def failed(self, error: str) -> Trajectory:
        """The same trajectory, marked failed: it keeps its tokens for inspection and is never trained."""
        return replace(self, status=Status.FAILED, error=error, reward=None)


@dataclass(frozen=True, slots=True)
class Group:
    """The trajectories of one prompt. `seq` is the admission number, unique in a run and the order of everything."""

    seq: int
    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    admitted_version: int
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds: roll_s, score_s
    cut: tuple[int, ...] = ()
    """Generated tokens of each trajectory that was rolled beside these and cut (`rollout.oversample`)."""

    @property
    def trainable(self) -> tuple[Trajectory, ...]:
        return tuple(t for t in self.trajectories if t.status is not Status.FAILED)

    @property
    def oldest_version(self) -> int:
        """Oldest policy version in any generated token; `admitted_version` if nothing was generated."""
        return min((v for t in self.trainable if (v := t.oldest_version) is not None), default=self.admitted_version)


@dataclass(frozen=True, slots=True)
class Sample:
    """One trainable token sequence with its reward. `group` numbers the samples of one prompt."""

    id: str  # of its trajectory
    group: int
    tokens_T: NDArray[np.int32]
    loss_mask_T: NDArray[np.bool_]
    behaviour_logprobs_T: NDArray[np.float32]
    versions_T: NDArray[np.int32]
    reward: float
    routes: Routes | None = None  # they travel on their own: each trainer rank gets those that it replays
    fields: Mapping[str, Field] = field(default_factory=dict)  # of the trajectory
    branch: int = 0
    """Which of `Trajectory.sequences` it is. Samples of one id are one trajectory: they share its reward and its advantage."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The groups one step consumes, as samples in the order of their group's `seq`, then member, then branch.

    Step s trains policy version s - 1.
    """

    step: int
    groups: tuple[int, ...]  # the `seq` of each group
    samples: tuple[Sample, ...]

    @property
    def tokens(self) -> int:
        return sum(len(s.tokens_T) for s in self.samples)

    @property
    def trajectories(self) -> NDArray[np.int64]:
        """[samples] which trajectory each sample is of, counted from 0. Those of one follow each other, the first with branch 0."""
        return np.cumsum([sample.branch == 0 for sample in self.samples], dtype=np.int64) - 1


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What must be true of one published tensor, by its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "float32", "bfloat16"
    checksum: str  # 16 hexadecimal digits; see verst.weights.checksum
    nbytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """One published policy version: where its tensors lie and what each must hash to."""

    version: int
    location: str  # a path the engines can read
    entries: tuple[TensorEntry, ...]
    digest: str  # the weights hash: of all names and checksums, sorted
