"""Loading, the output head, and log-probabilities in padded microbatches against transformers on each sequence alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.unit.fsdp_cases import FAMILIES, make_backend, make_batch, make_config, path, save_model
from verst.errors import ModelError
from verst.training.microbatch import collate, flat, split
from verst.training.model import Head, Policy, load_model

__all__ = ["path"]  # a fixture

TEMPERATURE = 0.7
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_neither_logprobs_nor_gradients(tmp_path: Path, family: str) -> None:
    """Expected: transformers' own logits, each sequence alone and unpadded, log_softmax at the temperature."""
    path = save_model(tmp_path, family)
    samples = make_batch(1).samples
    policy = Policy(load_model(path, torch.float32), path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    microbatch = collate(samples, tuple(range(len(samples))), CPU)
    slope_N = torch.linspace(-1, 1, microbatch.loss_tokens)

    logprobs_N, entropy_N = policy(microbatch.tokens_BT, microbatch.positions_N, microbatch.targets_N, TEMPERATURE)
    (logprobs_N * slope_N).sum().backward()

    expected, entropies = [], []
    for sample in samples:
        tokens_T = torch.from_numpy(sample.tokens_T).long()
        logs_TV = (plain(input_ids=tokens_T[None]).logits[0, :-1].float() / TEMPERATURE).log_softmax(-1)
        mask_T = torch.from_numpy(sample.loss_mask_T)[1:]
        expected.append(logs_TV.gather(1, tokens_T[1:, None])[mask_T, 0])
        entropies.append(-(logs_TV.exp() * logs_TV).sum(-1)[mask_T])
    (torch.cat(expected) * slope_N).sum().backward()

    torch.testing.assert_close(logprobs_N, torch.cat(expected), rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy_N, torch.cat(entropies).detach(), rtol=0, atol=2e-5)
    theirs = dict(plain.named_parameters())
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_prompt_and_padding_never_reach_the_vocabulary_matrix(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def counting(hidden_NH: torch.Tensor, *args: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        rows.append(len(hidden_NH))
        return hidden_NH.sum(1), hidden_NH.sum(1)

    samples = make_batch(1).samples
    policy = Policy(load_model(path, torch.float32), path)
    monkeypatch.setattr("verst.training.model.token_logprobs", counting)
    microbatch = collate(samples, (0, 3, 1), CPU)
    policy(microbatch.tokens_BT, microbatch.positions_N, microbatch.targets_N, 1.0)
    assert rows == [sum(int(samples[i].loss_mask_T.sum()) for i in (0, 3, 1))]


def test_a_head_that_does_more_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path, "granite")
    monkeypatch.setattr("verst.training.model._head_of", lambda config: Head())
    with pytest.raises(ModelError, match="the head of GraniteForCausalLM does more"):
        Policy(load_model(path, torch.float32), path)


def test_the_head_check_holds_in_bfloat16(tmp_path: Path) -> None:
    path = save_model(tmp_path, "gemma2")
    assert Policy(load_model(path, torch.bfloat16), path).head.softcap == 2.0


def test_a_family_with_other_names_and_with_dropout(tmp_path: Path) -> None:
    """GPT-2: transformer.h and wte, and a policy that would sample without the dropout it was trained with."""
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, attn_pdrop=0.5, resid_pdrop=0.5)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    policy = Policy(load_model(str(tmp_path), torch.float32), str(tmp_path))
    assert len(policy.layers) == 2
    microbatch = collate(make_batch(1).samples, (0, 1), CPU)
    first, second = (policy(microbatch.tokens_BT, microbatch.positions_N, microbatch.targets_N, 1.0)[0] for _ in range(2))
    assert torch.equal(first, second), "dropout is active"


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (["config.json"], "no config.json"),
        (["model.safetensors"], "no weights"),
        (["tokenizer.json"], "no tokenizer"),
    ],
)
def test_an_incomplete_directory_is_an_error(path: str, tmp_path: Path, remove: list[str], message: str) -> None:
    shutil.copytree(path, tmp_path / "copy")
    for name in remove:
        (tmp_path / "copy" / name).unlink()
    with pytest.raises(ModelError, match=rf"model.path .*copy: {message}"):
        load_model(str(tmp_path / "copy"), torch.float32)


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such directory"):
        load_model(str(tmp_path / "nowhere"), torch.float32)


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_a_parameter_without_a_fitting_tensor_is_never_drawn_at_random(path: str, tmp_path: Path, damage: str) -> None:
    shutil.copytree(path, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    removed = tensors.pop("model.layers.1.mlp.up_proj.weight")
    if damage == "misshapen":
        tensors["model.layers.1.mlp.up_proj.weight"] = removed[:8].clone()
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no fitting tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(tmp_path / "copy"), torch.float32)


def test_an_unknown_architecture_is_an_error(path: str, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ModelError, match="transformers cannot load it as a causal language model"):
        load_model(str(tmp_path / "copy"), torch.float32)


def test_tied_weights_are_published_once(tmp_path: Path) -> None:
    names = [name for name, _ in make_backend(make_config(save_model(tmp_path, "llama_tied"))).weights()]
    assert len(names) == len(set(names))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_collate_points_at_the_token_before_each_loss_token() -> None:
    samples = make_batch(1).samples
    microbatch = collate(samples, (2, 5), CPU)
    width = max(len(samples[2].tokens_T), len(samples[5].tokens_T)) - 1
    assert microbatch.tokens_BT.shape == (2, width)
    place = 0
    for row, index in enumerate((2, 5)):
        for t in range(len(samples[index].tokens_T)):
            if samples[index].loss_mask_T[t]:
                assert int(microbatch.positions_N[place]) == row * width + t - 1
                assert int(microbatch.tokens_BT[row, t - 1]) == samples[index].tokens_T[t - 1]
                assert int(microbatch.targets_N[place]) == samples[index].tokens_T[t]
                assert microbatch.sample_of_token()[place] == index
                place += 1
    assert place == microbatch.loss_tokens


def test_split_undoes_flat() -> None:
    samples = make_batch(1).samples
    microbatch = collate(samples, (4, 0), CPU)
    values = {i: samples[i].behaviour_logprobs_T[samples[i].loss_mask_T] for i in (0, 4)}
    parts = split(flat(values, microbatch), microbatch)
    assert parts.keys() == values.keys()
    assert all((parts[i] == values[i]).all() for i in values)


def test_a_microbatch_without_loss_tokens_is_one_weightless_token() -> None:
    microbatch = collate(make_batch(1).samples, (), CPU)
    assert microbatch.tokens_BT.shape == (1, 1)
    assert (len(microbatch.positions_N), len(microbatch.targets_N), microbatch.loss_tokens) == (1, 1, 0)
