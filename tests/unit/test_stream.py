import itertools
import json
import math
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verst.config.schema import DataConfig
from verst.data.prompts import split_point, text_hash
from verst.data.sources import JsonlSource, SequenceSource, open_source
from verst.data.stream import Permutation, PromptStream, eval_prompts
from verst.errors import DataError


def config(**options) -> DataConfig:
    return DataConfig.model_validate(options)


DATA = config()


def texts(stream, n):
    return [stream.next().messages[0].content for _ in range(n)]


def rows_source(rows: int, block_rows: int, window_blocks: int):
    source = SequenceSource([f"p{i}" for i in range(rows)], "prompt", block_rows)
    source.window_blocks = window_blocks
    return source


@given(st.integers(1, 300), st.text(max_size=8))
def test_permutation_is_a_bijection(n, seed):
    assert sorted(map(Permutation(n, seed), range(n))) == list(range(n))


def test_permutation_of_a_huge_range_needs_no_memory():
    order = Permutation(2**40, "0")
    assert len({order(i) for i in range(1000)}) == 1000
    assert max(order(i) for i in range(1000)) > 2**38


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    block_rows=st.integers(1, 9),
    window_blocks=st.integers(1, 4),
    shuffle=st.booleans(),
    holdout=st.sampled_from([0.0, 0.3]),
    taken=st.integers(0, 100),
    seed=st.integers(0, 3),
)
def test_resuming_after_any_number_of_prompts_equals_never_stopping(rows, block_rows, window_blocks, shuffle, holdout, taken, seed):
    data = config(shuffle=shuffle, holdout=holdout)

    def stream():
        return PromptStream(rows_source(rows, block_rows, window_blocks), data, seed)

    straight, first, resumed = stream(), stream(), stream()
    try:
        expected = [straight.next() for _ in range(taken + 45)]
    except DataError:  # all rows may fall on the other side of the split
        return
    before = [first.next() for _ in range(taken)]
    resumed.restore(json.loads(json.dumps(first.state())))
    assert before + [resumed.next() for _ in range(45)] == expected


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_each_epoch_has_every_row_once(rows, block_rows, window_blocks):
    stream = PromptStream(rows_source(rows, block_rows, window_blocks), DATA, 0)
    for _ in range(3):
        assert sorted(texts(stream, rows)) == sorted(f"p{i}" for i in range(rows))


def test_order_differs_by_epoch_and_seed_and_not_without_shuffle():
    stream, other = (PromptStream(rows_source(60, 5, 4), DATA, seed) for seed in (0, 1))
    epochs = [texts(stream, 60), texts(stream, 60), texts(other, 60)]
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    plain = PromptStream(rows_source(60, 5, 4), config(shuffle=False), 0)
    assert texts(plain, 120) == [f"p{i}" for i in range(60)] * 2


def test_first_prompts_read_one_window_of_a_large_file(tmp_path):
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"prompt": f"{i} " + "x" * 1000}) + "\n" for i in range(20_000))
    source = JsonlSource(path, block_bytes=2**16, window_bytes=2**19)
    read = []
    read_block = source.read_block
    source.read_block = lambda block: read.append(block) or read_block(block)
    stream = PromptStream(source, DATA, 0)
    tracemalloc.start()
    numbers = {int(text.split()[0]) for text in texts(stream, 400)}
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(numbers) == 400
    assert len(read) == 8  # of 308: one window
    assert max(numbers) - min(numbers) > 10_000  # whose blocks lie all over the file
    assert peak_bytes < 2 * 2**20 < path.stat().st_size / 9


def test_a_position_in_other_data_is_refused():
    stream = PromptStream(rows_source(10, 5, 2), DATA, 0)
    for changed in (PromptStream(rows_source(11, 5, 2), DATA, 0), PromptStream(rows_source(10, 5, 2), DATA, 1)):
        with pytest.raises(DataError, match=r"saved position in rows does not fit: (source|seed) was"):
            changed.restore(stream.state())


def test_one_shot_iterators_resume_by_skipping_and_end_with_an_error():
    stream = PromptStream(open_source(DATA, (f"p{i}" for i in range(6))), DATA, 0)
    assert texts(stream, 3) == ["p0", "p1", "p2"]
    resumed = PromptStream(open_source(DATA, (f"p{i}" for i in range(6))), DATA, 0)
    resumed.restore(stream.state())
    assert texts(resumed, 3) == ["p3", "p4", "p5"]
    with pytest.raises(DataError, match="one-shot iterator that gave 6 rows and cannot start again: give a list"):
        resumed.next()


class Repeatable:
    def __iter__(self):
        return (f"p{i}" for i in range(4))


@pytest.mark.parametrize("taken", range(10))
def test_repeatable_iterables_go_on_and_resume(taken):
    stream = PromptStream(open_source(DATA, Repeatable()), DATA, 0)
    before = texts(stream, taken)
    resumed = PromptStream(open_source(DATA, Repeatable()), DATA, 0)
    resumed.restore(stream.state())
    assert before + texts(resumed, 9) == (["p0", "p1", "p2", "p3"] * 5)[: taken + 9]


def test_holdout_is_disjoint_though_a_task_repeats_its_prompts():
    data = config(task="chain_sum", options={"max_terms": 2, "min_digits": 1, "max_digits": 1}, holdout=0.2)  # few hundred prompts
    source = open_source(data)
    train = set(texts(PromptStream(source, data, 0), 3000))
    held_out = set(texts(PromptStream(source, data, 0, split="eval"), 1000))
    assert len(train) < 500  # they do repeat
    assert not train & held_out
    chosen = [prompt.messages[0].content for prompt in eval_prompts(source, data, 20)]
    assert len(set(chosen)) == 20
    assert not train & set(chosen)


def test_holdout_share_is_kept_and_ignores_the_system_message():
    data = config(holdout=0.25)
    source = rows_source(4000, 100, 4)
    held_out = eval_prompts(source, data, 900)
    stream = PromptStream(source, data, 0)
    train = {stream.next().id for _ in range(2900)}
    assert not train & {prompt.id for prompt in held_out}
    with_system = config(holdout=0.25, system="Think.")
    assert [p.id for p in eval_prompts(source, with_system, 900)] == [p.id for p in held_out]
    assert math.isclose(900 / (int(held_out[-1].id.split(":")[1]) + 1), 0.25, abs_tol=0.03)
    assert text_hash(held_out[0], data) == text_hash(eval_prompts(source, with_system, 1)[0], with_system)


def test_too_few_held_out_prompts():
    data = config(holdout=0.5)
    with pytest.raises(DataError, match=r"50 different held-out prompts wanted, \d+ found in 20 rows of rows at data.holdout=0.5"):
        eval_prompts(rows_source(20, 5, 2), data, 50)
    small = config(task="coin_flip", options={"min_trials": 3, "max_trials": 3}, holdout=0.5)
    with pytest.raises(DataError, match=r"500 different held-out prompts wanted, \d+ found in"):
        eval_prompts(open_source(small), small, 500)
    with pytest.raises(DataError, match=r"data.holdout is 0"):
        eval_prompts(rows_source(20, 5, 2), DATA, 1)
    with pytest.raises(DataError, match=r"data.holdout is 0"):
        PromptStream(rows_source(20, 5, 2), DATA, 0, split="eval")
    with pytest.raises(DataError, match="one-shot iterator"):
        eval_prompts(open_source(data, (str(i) for i in range(9))), data, 1)


def test_a_split_without_prompts_ends_instead_of_searching_for_ever():
    data = config(holdout=0.5)
    alike = open_source(data, ["same"] * 30)
    held_out = split_point(PromptStream(alike, DATA, 0).next(), data) < 0.5
    present, absent = ("eval", "train") if held_out else ("train", "eval")
    assert texts(PromptStream(alike, data, 0, present), 40) == ["same"] * 40
    with pytest.raises(DataError, match=rf"none of 60 rows of rows is on the {absent} side of data.holdout=0.5"):
        PromptStream(alike, data, 0, absent).next()


def test_a_file_of_blank_lines_has_no_row(tmp_path):
    path = tmp_path / "blank.jsonl"
    path.write_text("\n\n \n")
    with pytest.raises(DataError, match=r"blank.jsonl has no row"):
        PromptStream(JsonlSource(path), DATA, 0).next()
    with pytest.raises(DataError, match="rows yields no row"):
        PromptStream(open_source(DATA, iter([])), DATA, 0).next()


# ---- curriculum

CURRICULUM = {"field": "level", "start": 1, "end": 5, "prompts": 40}


def graded(rows: int, **options):
    data = config(curriculum=CURRICULUM | options)
    return lambda seed=0: PromptStream(
        SequenceSource([{"prompt": f"p{i}", "level": i % 5 + 1} for i in range(rows)], "prompt", 4), data, seed
    )


def test_a_curriculum_admits_what_is_easy_enough_and_in_the_end_all():
    stream = graded(100)()
    levels = [stream.next().fields["level"] for _ in range(200)]
    assert set(levels[:10]) == {1}  # the limit is 1 + 4 · n / 40 after n prompts, so the eleventh may be of level 2
    for taken, level in enumerate(levels):
        assert level <= 1 + 4 * min(taken / 40, 1)
    assert set(levels[40:]) == {1, 2, 3, 4, 5}
    assert [levels[40:].count(level) / 160 for level in (1, 5)] == pytest.approx([0.2, 0.2], abs=0.05)


@pytest.mark.parametrize("taken", [0, 7, 39, 63])
def test_a_resumed_curriculum_goes_on_where_it_was(taken: int):
    make = graded(30)
    whole = texts(make(), 80)
    stream = make()
    assert texts(stream, taken) == whole[:taken]
    resumed = make()
    resumed.restore(json.loads(json.dumps(stream.state())))
    assert texts(resumed, 80 - taken) == whole[taken:]


def test_a_curriculum_is_a_part_of_what_a_place_in_the_data_is_valid_for():
    with pytest.raises(DataError, match=r"curriculum was .*'end': 5.*is .*'end': 4"):
        graded(30, end=4)().restore(graded(30)().state())
    without = PromptStream(SequenceSource(["a"], "prompt"), DATA, 0)
    state = without.state()
    del state["given"]  # as before there were curricula
    without.restore(state)
    assert texts(without, 1) == ["a"]


@pytest.mark.parametrize("level", [None, "hard", True])
def test_a_difficulty_that_is_no_number_is_told_with_its_row(level):
    stream = PromptStream(SequenceSource([{"prompt": "p", "level": level}], "prompt"), config(curriculum=CURRICULUM), 0)
    with pytest.raises(DataError, match=r"rows\[0\]: data.curriculum needs a number in the field 'level'"):
        stream.next()


def test_prompts_that_are_all_too_difficult_are_told_at_once():
    stream = PromptStream(SequenceSource([{"prompt": "p", "level": 3}] * 9, "prompt"), config(curriculum=CURRICULUM), 0)
    with pytest.raises(
        DataError, match=r"is as easy as data.curriculum has it after 0 prompts: level up to 1. Raise data.curriculum.start"
    ):
        stream.next()


def test_held_out_prompts_know_no_curriculum():
    source = SequenceSource([{"prompt": f"p{i}", "level": 9} for i in range(50)], "prompt")
    data = config(curriculum=CURRICULUM, holdout=0.5)
    assert PromptStream(source, data, 0, "eval").next().fields["level"] == 9
    assert len(eval_prompts(source, data, 3)) == 3
