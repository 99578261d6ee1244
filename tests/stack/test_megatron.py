"""The megatron backend in one process: against transformers, against the fsdp backend, and bit for bit against the files it read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.stack.megatron_cases import FAMILIES, make_megatron, save_model, with_routes
from tests.unit.fsdp_cases import BATCHES, branched, make_backend, make_batch, make_config, same_bits, train, weights_of
from verst.errors import ConfigError, ModelError
from verst.training.distributed import leave_distributed
from verst.training.megatron.table.families import FAMILIES as TABLES


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    directory = tmp_path_factory.mktemp("models")
    yield {family: save_model(directory / family, family) for family in FAMILIES}
    leave_distributed()  # the group of one rank that Megatron works on


def test_every_table_has_a_fixture() -> None:
    assert {kind.model_type for kind, _ in FAMILIES.values()} == set(TABLES)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_those_of_transformers(paths: dict[str, str], family: str) -> None:
    backend = make_megatron(make_config(paths[family]))
    model = transformers.AutoModelForCausalLM.from_pretrained(paths[family], attn_implementation="sdpa").eval()
    for sample in make_batch(1, longest=30).samples:
        tokens = torch.from_numpy(sample.tokens_T.astype(np.int64))[None]
        with torch.no_grad():
            logs = model(input_ids=tokens).logits[0, :-1].log_softmax(dim=-1)
        expected = logs.gather(1, tokens[0, 1:, None])[:, 0].numpy()
        assert np.abs(backend.logprobs(sample.tokens_T)[1:] - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_after_import_has_the_bits_of_the_files(paths: dict[str, str], tmp_path: Path, family: str, dtype: str) -> None:
    source = Path(paths[family])
    if dtype == "bfloat16":
        source = tmp_path / "bfloat16"
        save_model(source, family)
        tensors = load_file(source / "model.safetensors")
        halved = {n: t if n.endswith("e_score_correction_bias") else t.bfloat16() for n, t in tensors.items()}
        save_file(halved, source / "model.safetensors", metadata={"format": "pt"})
    exported = weights_of(make_megatron(make_config(str(source), model={"dtype": dtype})))
    files = load_file(source / "model.safetensors")
    assert same_bits(exported, files)
    assert {n: t.dtype for n, t in exported.items()} == {n: t.dtype for n, t in files.items()}


@pytest.mark.parametrize(
    ("family", "longest"), [("llama", 11), ("qwen3_moe", 11), ("deepseek_v3", 11), ("qwen3", 6)], ids=lambda value: f"{value}"
)  # six tokens is also the shortest length: sequences of one length are attended to as rows
def test_steps_equal_those_of_the_fsdp_backend(paths: dict[str, str], family: str, longest: int) -> None:
    batches = [make_batch(step, longest=longest) for step in (1, 2, 3)]
    config = make_config(
        paths[family], train={"lr": 1e-3, "minibatches": 2, "schedule": "cosine"}, algorithm={"name": "grpo", "kl_coefficient": 0.1}
    )
    backends = make_megatron(config), make_backend(config)
    assert backends[0].routed_experts == backends[1].routed_experts
    if (kind := backends[0].routed_experts) is not None:  # both replay the same routes
        batches = [with_routes(batch, kind) for batch in batches]
    ours, theirs = (train(backend, config, batches) for backend in backends)
    for own, other in zip(ours, theirs, strict=True):
        report, expected = own.report(), other.report()
        assert report.keys() == expected.keys()
        for metric in ("loss/total", "update/grad_norm", "update/lr"):
            assert report[metric] == pytest.approx(expected[metric], rel=5e-5, abs=5e-5), metric
        for metric, value in expected.items():
            assert report[metric] == pytest.approx(value, rel=2e-3, abs=2e-4), metric


def test_branches_are_trained_as_by_the_fsdp_backend(paths: dict[str, str]) -> None:
    """Sequences of one trajectory lie in different microbatches, and weigh as one."""
    kl = {"kl_coefficient": 0.1, "kl_in": "reward"}
    config = make_config(paths["qwen3"], train={"lr": 1e-3, "microbatch_tokens": 12}, algorithm={"name": "gspo", **kl})
    batches = [branched(make_batch(step)) for step in (1, 2)]
    ours, theirs = (train(backend, config, batches) for backend in (make_megatron(config), make_backend(config)))
    for own, other in zip(ours, theirs, strict=True):
        report, expected = own.report(), other.report()
        for metric in ("loss/total", "update/grad_norm"):
            assert report[metric] == pytest.approx(expected[metric], rel=5e-5, abs=5e-5), metric


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's compiler, about torch itself
@pytest.mark.parametrize(
    ("options", "longest", "graphs"),
    [
        ({"microbatch_tokens": 24}, 6, 1),  # four sequences of one length
        # sequences of any lengths, in any of 4 layers, and one graph for the forward without a gradient; on a CPU also one for each number
        # of sequences in a microbatch
        ({"microbatch_tokens": 100, "gradient_checkpointing": True}, 11, 3),
    ],
    ids=["even", "ragged"],
)
def test_compiled_layers_train_the_same_bits_with_few_graphs(
    paths: dict[str, str], options: dict[str, object], longest: int, graphs: int
) -> None:
    batches, results = [make_batch(step, longest=longest) for step in (1, 2)], []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = make_config(paths["qwen3"], train=options | {"compile": compiled})
        backend = make_megatron(config)
        reports = [tally.report() for tally in train(backend, config, batches)]
        results.append((weights_of(backend), reports))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert results[0][1] == results[1][1]
    assert same_bits(results[0][0], results[1][0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_packed_attention_of_a_gpu_compiles_twice_for_all_lengths(paths: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_megatron(make_config(paths["qwen3"]))  # the groups that attention asks for
    from verst.training.megatron import specs

    monkeypatch.setattr(specs, "_flash_takes", lambda query, value: True)  # on "meta" the GPU's operator computes shapes alone
    config = SimpleNamespace(transformer_impl="local", multi_latent_attention=False, kv_channels=64)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    attend = torch.compile(specs.Attention(config), dynamic=True, fullgraph=True, backend="aot_eager_decomp_partition")
    for lengths in ((100, 50, 30), (64,), (77, 20), (300, 1, 5, 6), (64, 64), (128, 128, 128), (33,), (50, 50), (17, 21)):
        packed = specs.packed_sequences(lengths, torch.arange(sum(lengths)), config)
        for name in ("cu_seqlens_q", "cu_seqlens_kv", "places"):
            setattr(packed, name, getattr(packed, name).to("meta"))
        heads = [torch.empty(sum(lengths), 1, h, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for h in (4, 2, 2)]
        for head in heads:
            torch._dynamo.mark_static(head, 2)  # in a layer the number of heads is that of its weights
        out = attend(*heads, packed_seq_params=packed)
        out.sum().backward()
        assert out.shape == (sum(lengths), 1, 4 * 64)
        assert all(h.grad is not None and h.grad.shape == h.shape for h in heads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # for sequences of one length, and for all others


@pytest.mark.parametrize(
    ("family", "arguments", "reason"),
    [
        ("qwen3_moe", {}, "layers with experts wait for the CPU"),
        ("deepseek_v3_dense", {}, "latent attention is not tested"),
        ("qwen3", {"tensor_model_parallel_size": 2}, "layers that communicate are not tested"),
    ],
)
def test_layers_that_cannot_be_compiled_are_named(paths: dict[str, str], family: str, arguments: dict[str, object], reason: str) -> None:
    from verst.training.megatron.arguments import check

    with pytest.raises(ConfigError, match=f"train.compile: {reason}"):
        check(make_config(paths[family], train={"compile": True}), arguments, 2)


def test_gradients_are_measured_and_scaled_all_at_once(paths: dict[str, str]) -> None:
    make_megatron(make_config(paths["qwen3"]))  # brings Megatron, and its optimizer's functions
    from megatron.core.optimizer import clip_grads

    gradients = [torch.full((3, 4), 2.0), torch.arange(5.0)]  # squares: 12 · 4 and 0 + 1 + 4 + 9 + 16
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, None, [gradients], False)
    assert norm.shape == (1,)
    assert norm.item() == pytest.approx(78**0.5)
    clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, None, [gradients, gradients], 0.5)
    assert gradients[0].unique().tolist() == [1.0]
    assert gradients[1].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_bfloat16_publishes_the_rounded_masters(paths: dict[str, str]) -> None:
    config = make_config(paths["qwen3"], model={"dtype": "bfloat16"}, train={"lr": 1e-3})
    backend = make_megatron(config)
    tallies = train(backend, config, BATCHES)
    assert [tally.report()["update/skipped"] for tally in tallies] == [0, 0, 0]
    masters = {tuple(sorted(t.bfloat16().flatten().tolist())) for n, t in backend.state().tensors.items() if n.startswith("model/")}
    state = backend.state()
    assert all(t.dtype == torch.float32 for t in state.tensors.values())
    rounded = backend._tensors.local.values()
    assert {tuple(sorted(p.flatten().tolist())) for p in rounded} == masters


def test_a_state_of_the_fsdp_backend_is_refused(paths: dict[str, str]) -> None:
    from verst.errors import CheckpointError

    config = make_config(paths["qwen3"])
    with pytest.raises(CheckpointError, match="saved by another backend, this run has 1 ranks of the megatron backend"):
        make_megatron(config).load_state(make_backend(config).state())


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path: Path) -> None:
    path = Path(save_model(tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    lost = {n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"}
    save_file(lost, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight"):
        make_megatron(make_config(str(path)))
    save_file({**tensors, "model.layers.0.mlp.extra.weight": torch.zeros(2)}, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"no row for model\.layers\.0\.mlp\.extra\.weight"):
        make_megatron(make_config(str(path)))


def test_a_family_without_a_table_is_told_how_to_get_one(tmp_path: Path) -> None:
    from tests.unit.fsdp_cases import save_model as save_other

    path = save_other(tmp_path / "gemma2", "gemma2")
    with pytest.raises(ModelError, match=r"no table for model_type 'gemma2'.*train\.backend fsdp trains any.*FAMILY\.py"):
        make_megatron(make_config(path))


def test_a_machine_without_the_package_is_told_how_to_install_it() -> None:
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.startswith('megatron') else real(name, *a)\n"
        "from verst.training.megatron import compat\n"
        "try:\n    compat.require()\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    )
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.startswith("ConfigError")
    assert "`make stack`" in said
    assert "`pip install 'verst[megatron]'`" in said


def test_transformers_still_builds_models_on_the_meta_device(paths: dict[str, str]) -> None:
    """The CPU stands in for CUDA by replacing torch's factories, which `torch.device` knows by identity."""
    make_megatron(make_config(paths["qwen3"]))
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert torch.zeros(1, device="cuda").device.type == ("cuda" if torch.cuda.is_available() else "cpu")


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "world", "lines"),
    [
        (
            {"tensor_parallel_size": 2},
            1,
            ["train.megatron.tensor_parallel_size: Megatron has no such argument; did you mean tensor_model_parallel_size?"],
        ),
        (
            {"lr": 1.0, "hidden_size": 8, "save": "x", "attention_dropout": 0.1},
            1,
            [
                "train.megatron.lr: not to be set here: Verst takes it from train.lr",
                "train.megatron.hidden_size: not to be set here: it follows from the model's config.json and the run file",
                "train.megatron.save: not to be set here: it belongs to Megatron's own training program (checkpointing), "
                "which Verst does not run",
                "train.megatron.attention_dropout: not to be set here: the policy that samples has no dropout, so the trainer has none",
            ],
        ),
        (
            {"tensor_model_parallel_size": 3, "pipeline_model_parallel_size": 3},
            4,
            [
                "train.megatron: train.ranks (4) is not divisible by "
                "tensor_model_parallel_size × pipeline_model_parallel_size × context_parallel_size (9)",
                "train.megatron: num_attention_heads of the model (4) is not divisible by tensor_model_parallel_size (3)",
                "train.megatron: num_hidden_layers of the model (4) is not divisible by pipeline_model_parallel_size (3)",
                "train.megatron: num_key_value_heads of the model (2) is not divisible by tensor_model_parallel_size (3)",
            ],
        ),
        (
            {"recompute_granularity": "some"},
            1,
            ["train.megatron: argument --recompute-granularity: invalid choice: 'some' (choose from 'full', 'selective')"],
        ),
        ({"sequence_parallel": 1}, 1, ["train.megatron.sequence_parallel: expected true or false, not 1"]),
        ({"sequence_parallel": True}, 1, ["train.megatron: sequence_parallel needs tensor_model_parallel_size above 1"]),
        ({"expert_model_parallel_size": 2}, 2, ["train.megatron: expert_model_parallel_size needs a model with experts"]),
    ],
)
def test_everything_wrong_with_the_arguments_is_said_at_once(
    paths: dict[str, str], arguments: dict[str, object], world: int, lines: list[str]
) -> None:
    from verst.training.megatron.arguments import check

    with pytest.raises(ConfigError) as raised:
        check(make_config(paths["qwen3"]), arguments, world)
    assert str(raised.value).splitlines() == lines


def test_arguments_of_megatron_reach_megatron(paths: dict[str, str]) -> None:
    from verst.training.megatron.arguments import check

    config = make_config(paths["qwen3_moe"], train={"weight_decay": 0.2})
    args = check(config, {"recompute_granularity": "selective", "moe-token-dispatcher-type": "allgather", "no_rope_fusion": True}, 1)
    assert (args.recompute_granularity, args.moe_token_dispatcher_type, args.apply_rope_fusion) == ("selective", "allgather", False)
    assert (args.weight_decay, args.num_experts, args.moe_layer_freq) == (0.2, 4, [1, 0, 1, 1])


def test_every_argument_that_verst_sets_is_one_of_megatrons() -> None:
    """A renamed argument would otherwise be set in vain."""
    from verst.training.megatron import arguments as ours
    from verst.training.megatron import compat

    compat.require()
    names = {action.dest for action in ours._parser()._actions}
    groups = {group.title for group in ours._parser()._action_groups}
    assert set(ours._FROM_RUN_FILE) | set(ours._VERST_DECIDES) <= names
    assert groups >= ours._NOT_RUN


@pytest.mark.parametrize("family", FAMILIES)
def test_every_argument_a_table_gives_is_one_of_megatrons(paths: dict[str, str], family: str) -> None:
    import dataclasses

    from megatron.core.transformer import MLATransformerConfig

    from verst.training.megatron import arguments as ours

    config = transformers.AutoConfig.from_pretrained(paths[family])
    known = {action.dest for action in ours._parser()._actions} | {field.name for field in dataclasses.fields(MLATransformerConfig)}
    given = TABLES[config.model_type].arguments(config) | ours._defaults(make_config(paths[family]), shares=True)
    assert set(given) <= known
    assert set(ours._run_arguments(make_config(paths[family]), 1)) - {"world_size", "rank"} <= known
