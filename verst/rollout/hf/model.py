"""The transformers model behind the engine: loading, forward passes over the slot cache, and the check that both fit.

What the checks compare is measured when the engine starts, on the machine and the model at hand: the slot cache must give the logits
of the model's own attention, and in deterministic mode a row's logits must have the same bits with and without neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from verst.config.plan import UNFIT, loading
from verst.errors import EngineFailure, ModelError
from verst.exact.experts import has_experts, use_exact_experts
from verst.exact.head import head_logits, operand, row_logs, row_sums
from verst.exact.layers import use_exact_layers
from verst.exact.rows import PRODUCT_ROWS, filled, row_multiple
from verst.model_spec import key_mapping
from verst.rollout.hf.attention import EXACT_NAME, NAME, DecodePlan, attended_length, decoding, register
from verst.rollout.hf.cache import SlotCache
from verst.rollout.hf.graphs import ForwardGraphs
from verst.routing.records import expert_dtype
from verst.routing.tap import RoutingTap, tap_of
from verst.weights.offload import Offload, own_memory, return_unused

_LAYERS_SUPPORTED = {"full_attention", "sliding_attention"}
_LONGEST_RECORDED = 1024  # tokens of a prompt; a longer one keeps the device busy without a recording
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.3}  # relative; a wrong mask or position gives about 1


class Passed(NamedTuple):
    """What a forward pass gives."""

    logits: torch.Tensor
    """`[V]` after a prompt, `[R, V]` after a decoding step."""
    experts_NLK: torch.Tensor | None = None
    """The routes of the N tokens that were its inputs, if they are recorded."""


class SlotModel:
    """Prefill and decode of one model on one device. Not thread-safe: everything runs in the engine's decode thread."""

    def __init__(
        self, path: str, dtype: torch.dtype, device: torch.device, *, slots: int, max_tokens: int, exact: bool, record_routes: bool = False
    ) -> None:
        """Loads and checks the model. Raises `ModelError` if the directory is no model, `EngineFailure` if its type does not work."""
        self.device, self.slots, self.max_tokens, self.exact = device, slots, max_tokens, exact
        self.model = _load(path, dtype, device, exact=exact)
        config = self.model.config.get_text_config()
        self.type: str = self.model.config.model_type
        self.vocab_size: int = config.vocab_size
        self._refuse_unsupported(config)
        # On a CPU, tokens of a forward pass come in multiples of this, or a row's bits would depend on how many there are.
        self._multiple = row_multiple(config) if exact else 1
        self.rows = -(-slots // self._multiple) * self._multiple
        self._switches_experts = exact and device.type == "cuda" and has_experts(self.model)
        self._prefill_experts = getattr(self.model.config, "_experts_implementation", None)
        self.cache = SlotCache(self.rows, max_tokens, self._multiple)
        self._graphs = ForwardGraphs(device)
        self._weights_memory = Offload(device)
        if exact and device.type == "cuda":
            # As the trainer's deterministic algorithms do: in bfloat16 another attention kernel alone is worth 0.2 of a log-probability.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.tap: RoutingTap | None = None
        self._check_on_this_machine(record_routes)

    @property
    def recordings(self) -> int:
        return len(self._graphs)

    @torch.inference_mode()
    def prefill(self, tokens_T: NDArray[np.int32], slot: int) -> Passed:
        """Fills a slot with one prompt; returns the logits `[V]` that follow it. Bits depend on weights and prompt alone."""
        self._use_experts(self._prefill_experts)
        count = len(tokens_T)
        inputs = torch.zeros(self._prefill_length(count) + 2, dtype=torch.long)
        inputs[0], inputs[1] = slot, count - 1
        inputs[2 : count + 2] = torch.tensor(tokens_T)
        if count > _LONGEST_RECORDED:
            logits, *experts = self._prefill(inputs.to(self.device))
        else:
            logits, *experts = self._graphs.run(("prefill", len(inputs)), self._prefill, inputs)
        return Passed(logits, *(experts_NLK[:count] for experts_NLK in experts))

    def _prefill(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`inputs`: slot, place of the last token, tokens and what fills them up (later places, so no token attends to it)."""
        self.cache.aim_prefill(inputs[:1])
        tokens = inputs[None, 2:]
        positions = torch.arange(tokens.shape[1], device=inputs.device)[None]
        logits, *experts = self._recorded(
            input_ids=tokens, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=inputs[1:2]
        )
        return logits[0, 0], *experts

    def _prefill_length(self, count: int) -> int:
        """A recording is of one length, so on a GPU prompts are filled up to one of a few."""
        if self.device.type == "cpu" or count > _LONGEST_RECORDED:
            return -(-count // self._multiple) * self._multiple
        return attended_length(np.array([count - 1]), self.cache.columns, rounded=True)

    @torch.inference_mode()
    def decode(self, tokens_R: NDArray[np.integer[Any]], filled_R: NDArray[np.int64], active_R: NDArray[np.bool_]) -> Passed:
        """One token on the first R slots; returns the logits `[R, V]` that follow.

        `filled_R` counts the positions a slot holds, which is where the token goes. Rows that are not active compute nothing of use
        and leave their slots alone.
        """
        self._use_experts("batched_mm")
        positions = np.where(active_R, filled_R, 0)
        targets = np.where(active_R, filled_R, self.cache.scrap)
        length = attended_length(positions, self.cache.columns, rounded=self._graphs.enabled)
        inputs = torch.from_numpy(np.stack((tokens_R, positions, targets)))
        return Passed(*self._graphs.run((len(positions), length), partial(self._decode, length=length), inputs))

    def _decode(self, inputs_3R: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
        tokens, positions, targets = inputs_3R
        self.cache.aim_decode(targets)
        with decoding(DecodePlan(positions, length, self.model.dtype)):
            logits, *experts = self._recorded(
                input_ids=tokens[:, None], position_ids=positions[:, None], past_key_values=self.cache, use_cache=True
            )
        return logits[:, -1], *experts

    def rows_for(self, needed: int) -> int:
        """How many rows a step computes that needs the first `needed`: all in exact mode, so that shapes never vary."""
        if self.exact:
            return self.rows
        # Few different numbers of rows, because each is recorded on its own.
        return min(2 ** math.ceil(math.log2(needed)), self.rows) if self._graphs.enabled else needed

    @torch.inference_mode()
    def logprobs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """Log-probability `[T]` of each token given those before it, at temperature 1; entry 0 is 0. Leaves the cache alone."""
        self._use_experts(self._prefill_experts)
        inputs, positions = self._prompt(tokens_T)
        targets = inputs[0, 1 : len(tokens_T)]
        logits = self._forward(input_ids=inputs, position_ids=positions, use_cache=False)[0, : len(targets)]
        top, total, _, target = row_sums(logits.float(), targets, 1.0)
        return np.concatenate((np.zeros(1, np.float32), (target - (top + row_logs(total))).cpu().numpy()))

    def release_memory(self, *, weights: bool) -> None:
        """Gives up the cache and, with `weights`, the parameters: their contents are gone. Buffers, which no update brings, stay."""
        self._graphs.clear()
        self.cache.release()
        if weights and not self._weights_memory.is_away:
            self._weights_memory.release(dropped=self.model.parameters())
        return_unused(self.device)

    def resume_memory(self) -> None:
        """Takes the parameters' memory back, as zeros. The cache's is taken when it is next written."""
        self._weights_memory.take_back()

    def stop_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids, of the generation config if it names any, else of the model's config."""
        generation = self.model.generation_config
        ids = generation.eos_token_id if generation is not None else None
        if ids is None:
            ids = self.model.config.get_text_config().eos_token_id
        if ids is None:
            return ()
        return (ids,) if isinstance(ids, int) else tuple(ids)

    def _prompt(self, tokens_T: NDArray[np.int32]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and positions `[1, T or more]`."""
        tokens = filled(torch.from_numpy(tokens_T.astype(np.int64)).to(self.device), self._multiple)
        return tokens[None], torch.arange(len(tokens), device=self.device)[None]

    def _forward(self, **inputs: Any) -> torch.Tensor:
        return self.model(**inputs).logits

    def _recorded(self, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """Logits, and the routes `[N, L, K]` of all input tokens if they are recorded."""
        if self.tap is None:
            return (self._forward(**inputs),)
        with self.tap.recording() as choices:
            logits = self._forward(**inputs)
        return logits, choices.live().to(getattr(torch, expert_dtype(self.tap.kind.experts).name))

    def _use_experts(self, implementation: str | None) -> None:
        """Chooses how experts are computed, in deterministic mode on a GPU only.

        A decode step needs one product for each (token, expert), or the number of rows of an expert's product, hence its bits, would
        depend on where the neighbours are routed. A prefill has no neighbours, and such products would need too much memory.
        """
        if self._switches_experts and implementation is not None:
            self.model.set_experts_implementation(implementation)

    def _refuse_unsupported(self, config: Any) -> None:
        kinds = set(getattr(config, "layer_types", None) or ()) - _LAYERS_SUPPORTED
        if kinds or getattr(self.model, "_is_stateful", False):
            what = f"layers of kind {', '.join(sorted(map(str, kinds)))}" if kinds else "recurrent state"
            raise self._unsupported(f"it has {what}, and only full and sliding-window attention are supported")
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and self.max_tokens > limit:
            raise EngineFailure(f"the engine is asked for {self.max_tokens} tokens a sequence, but the model's limit is {limit}")

    def _unsupported(self, why: str) -> EngineFailure:
        return EngineFailure(f"model type {self.type!r} does not work with the hf engine: {why}. Use another engine or model")

    @torch.inference_mode()
    def _check_on_this_machine(self, record_routes: bool) -> None:
        """Compares the slot cache with the model's own attention, and one sequence alone with the same in every row.

        In between it finds the routers, where the model is still as it was loaded.
        """
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, min(8, self.max_tokens), dtype=np.int32)
        try:
            expected = self._own_attention(tokens)
            self._require_finite(expected)
            if record_routes:
                self.tap = tap_of(self.model, self.model.config.get_text_config().to_dict())
            self._switch_attention()
            alone = self._teacher_forced(tokens, filled=(0,))[0]
            crowd = self._teacher_forced(tokens, filled=range(self.rows))
        except ModelError as error:
            raise EngineFailure(str(error)) from error
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise self._unsupported(f"a trial decode raised {type(error).__name__}: {error}") from error
        difference = ((alone - expected).norm() / expected.norm()).item()
        if not difference < _TOLERANCE[self.model.dtype]:
            raise self._unsupported(f"with the slot cache its logits differ by {difference:.1%} from those of its own attention")
        if self.exact and not torch.equal(alone.expand_as(crowd), crowd):
            raise self._unsupported(
                f"its logits change by up to {(crowd - alone).abs().max().item():.1e} with slot and neighbours, with "
                f"{torch.get_num_threads()} CPU threads. Use 1 or 2 threads, or set deterministic to false"
            )

    def _require_finite(self, logits: torch.Tensor) -> None:
        if not torch.isfinite(logits).all():
            broken = [name for name, tensor in self.model.named_parameters() if not torch.isfinite(tensor).all()]
            raise ModelError(
                f"{self.model.name_or_path}: its logits are not finite; tensors with NaN or infinity: {', '.join(broken[:4]) or 'none'} "
                f"({len(broken)} in all); copy or download the weights again, or use another model.dtype"
            )

    def _switch_attention(self) -> None:
        register()
        name = EXACT_NAME if self.exact else NAME
        self.model.set_attn_implementation(name)
        if self.exact and self.device.type == "cpu":
            use_exact_experts(self.model)
        elif self.exact:
            use_exact_layers(self.model, self.model.get_output_embeddings())
        if self.model.config.get_text_config()._attn_implementation != name:
            raise self._unsupported("its attention cannot be replaced")

    def _own_attention(self, tokens_T: NDArray[np.int32]) -> torch.Tensor:
        tokens, positions = self._prompt(tokens_T)
        return self._forward(input_ids=tokens, position_ids=positions, use_cache=False)[0, len(tokens_T) - 1].float()

    def _teacher_forced(self, tokens_T: NDArray[np.int32], filled: Sequence[int]) -> torch.Tensor:
        """Logits `[rows, V]` after all tokens, half of them prefilled and half decoded, with the same sequence in each filled row."""
        active = np.zeros(self.rows, np.bool_)
        active[list(filled)] = True
        half = (len(tokens_T) + 1) // 2
        logits = self.prefill(tokens_T[:half], filled[0]).logits.expand(self.rows, -1)
        if others := filled[1:]:
            self.cache.copy([filled[0]] * len(others), others, half)
        for position in range(half, len(tokens_T)):
            logits = self.decode(np.full(self.rows, tokens_T[position]), np.full(self.rows, position, np.int64), active).logits
        return logits.float()


def _load(path: str, dtype: torch.dtype, device: torch.device, *, exact: bool) -> PreTrainedModel:
    if not (Path(path) / "config.json").is_file():
        raise ModelError(f"{path} is no Hugging Face model directory: it has no config.json")
    with loading(f"{path} cannot be loaded as a causal language model", UNFIT):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, local_files_only=True, key_mapping=key_mapping(config)
        )
    own_memory(torch.nn.Module.to(model, device))
    _replace_head(model, exact=exact)
    return model.requires_grad_(False).eval()


def _replace_head(model: PreTrainedModel, *, exact: bool) -> None:
    """Gives float32 logits to a bfloat16 model, as the trainer computes them: rounded, a logit of 20 is off by up to 0.06."""
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear) and (exact or head.weight.dtype == torch.bfloat16):
        head.forward = partial(_float32_logits, head, exact=exact)  # pyright: ignore[reportAttributeAccessIssue]


def _float32_logits(head: torch.nn.Linear, hidden: torch.Tensor, *, exact: bool) -> torch.Tensor:
    rows = hidden.flatten(0, -2)
    on_cpu = not rows.is_cuda
    logits = head_logits(filled(rows, PRODUCT_ROWS) if exact and on_cpu else rows, operand(head.weight), head.bias, exact=exact)
    return logits[: len(rows)].view(*hidden.shape[:-1], -1)
