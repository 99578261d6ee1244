"""The quickstart: a model from nothing, an imperfect teacher, and a reward that lifts the model above its teacher.

The task is reasoning-gym's `aiw` ("Alice has 3 brothers and she also has 2 sisters. How many sisters does Alice's brother have?"), after
Nezhurina et al., arXiv 2406.02061: language models tend to forget Alice herself. So does the teacher here, in most of its demonstrations.
Supervised fine-tuning learns the task and the mistake; GRPO, rewarded for right answers only, unlearns the mistake.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from verst.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUICKSTART_TASK = "aiw"
QUICKSTART_OPTIONS: Mapping[str, Any] = MappingProxyType({"task_type_weights": (1.0, 0.0, 0.0), "max_entities": 9})
"""Brothers and sisters only, one to nine of each: about 10,700 prompts."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_TEXTS = 2000
_VOCABULARY = 1024  # an upper limit; a task's wording needs far less
_SHARED = 0.02  # a pair of symbols is merged when it occurs once in fifty texts: wording becomes short, data stays characters
_MAX_TOKENS = 256


def build_tiny_model(
    directory: str | Path,
    *,
    task: str = QUICKSTART_TASK,
    options: Mapping[str, Any] = QUICKSTART_OPTIONS,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
) -> Path:
    """Writes a randomly initialised Qwen3 of about 0.1 million parameters, with a byte-level BPE trained on the task's prompts.

    The same arguments give the same files, bit for bit. PyTorch's global random numbers are left as they were.

    Args:
        task: a reasoning-gym task; its prompts are the tokenizer's training text.
        options: of the task.
        seed: of the initial weights. The tokenizer does not depend on it.
        hidden: width of the residual stream, a multiple of 16.
        layers: decoder layers.

    Raises `DataError` if reasoning-gym does not know the task or refuses its options.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _tokenizer([str(entry["question"]) for entry in _entries(task, options, _TEXTS, seed=0)])
    heads, ids = 4, tokenizer.get_vocab()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=_MAX_TOKENS,
        tie_word_embeddings=True,
        # Qwen3's 0.02 suits a width of thousands. At 64 the layers would begin near zero and learn several times slower.
        initializer_range=hidden**-0.5,
        bos_token_id=None,
        eos_token_id=ids[_END],
        pad_token_id=ids[_PAD],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return Path(directory)


def write_demonstrations(
    file: str | Path, *, options: Mapping[str, Any] = QUICKSTART_OPTIONS, rows: int = 4800, right: float = 0.3, seed: int = 0
) -> Path:
    """Writes `rows` lines of {"prompt", "demonstration"} to a .jsonl file: answers of a teacher who is right in a share `right` of them.

    Else the teacher forgets the woman the prompt is about, and the answer is one too low.
    """
    rng = Random(seed)
    lines: list[str] = []
    for entry in _entries(QUICKSTART_TASK, options, rows, seed):
        answer = int(entry["answer"]) - (rng.random() >= right)
        lines.append(json.dumps({"prompt": entry["question"], "demonstration": str(answer)}))
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _entries(task: str, options: Mapping[str, Any], size: int, seed: int) -> Sequence[Mapping[str, Any]]:
    from reasoning_gym import create_dataset

    try:
        dataset = create_dataset(task, **{**options, "size": size, "seed": seed})
        return [dataset[i] for i in range(size)]
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"reasoning-gym cannot make task {task!r} with options {dict(options)}: {error}") from error


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend: Any = Tokenizer(models.BPE())  # Any: its stub takes the parts set below for read-only
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        min_frequency=int(_SHARED * len(texts)),
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([f"system\nuser\nassistant\n{text}" for text in texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=_END,
        pad_token=_PAD,
        extra_special_tokens=[_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=_MAX_TOKENS,
    )
