"""`bench.shared_prefix`: prompts that really begin alike, and the ratio of the waves."""

from pathlib import Path

import pytest
from bench.load import prompts_of
from bench.make_model import train_tokenizer
from bench.report import WrongLength
from bench.shared_prefix import Setting, join_exactly, rows, times_to_first
from text_generation_launcher.benchmark.apis import Usage
from text_generation_launcher.benchmark.outcome import End, Outcome

SETTING = Setting(requests=2, prefix_tokens=6, tail_tokens=3, output_tokens=2)


def answered(first_token_s: float, prompt_tokens: int = 9) -> Outcome:
    times = [first_token_s, first_token_s + 1]
    return Outcome(start=0, end=times[-1], kind=End.OK, token_times=times, usage=Usage(prompt_tokens, 2))


def test_joined_prompts_share_exactly_the_tokens_of_the_prefix(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(["import this\nimport that and the other\n" * 50]), vocab_size=300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prefix = next(prompts_of(tmp_path / "tokenizer.json", 40, seed=1))
    joined = join_exactly(tokenizer, prefix, prompts_of(tmp_path / "tokenizer.json", 8, seed=2))
    first, second = (tokenizer.encode(next(joined)).ids for _ in range(2))
    assert first[:40] == second[:40] == tokenizer.encode(prefix).ids
    assert first[40:] != second[40:]
    assert len(first) == len(second) == 48


def test_a_tail_that_joins_up_with_the_prefix_is_left_out() -> None:
    tokenizer = train_tokenizer(iter(["import import import"]), vocab_size=262)
    merged, apart = "ort", ", ort"
    assert list(join_exactly(tokenizer, "imp", iter([merged, apart]))) == ["imp" + apart]


def test_answers_to_other_prompts_are_refused() -> None:
    assert times_to_first([answered(1), answered(2)], SETTING) == [1, 2]
    with pytest.raises(WrongLength, match="prompt_tokens=8"):
        times_to_first([answered(1), answered(2, prompt_tokens=8)], SETTING)


def test_rows_compare_the_means_with_the_first_wave() -> None:
    first, second = rows("ours", [[[1.0, 3.0], [0.4, 0.6]]] * 3)
    assert first == "| ours | 1 | 2000 | 2000 | 3000 | 1.00 |"
    assert second == "| ours | 2 | 500 | 500 | 600 | 4.00 |"
