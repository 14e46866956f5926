"""Sequences of practice among a silo's own: a function of the position, which leaves the others in their order."""

from pathlib import Path

import pytest

from pretrain.config.practice import PracticeConfig
from pretrain.silo.data import Batches, Mixture, PackedTokens
from pretrain.silo.practised import Practised
from pretrain.trust.contract import build_contract
from tests.chats import conversations, write_chat
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error

ROW = 16


def packed(directory: Path, seed: int, number: int) -> PackedTokens:
    given = conversations(number, vocab_size=300, seed=seed)
    write_chat(directory, given, row_tokens=ROW, vocab_size=300, tokenizer="a1" * 32)
    return PackedTokens([directory], sequence_tokens=ROW)


@pytest.fixture
def corpora(tmp_path: Path) -> list[PackedTokens]:
    return [packed(tmp_path / name, seed, number) for seed, (name, number) in enumerate((("a", 30), ("b", 20)))]


def both(corpora: list[PackedTokens]) -> tuple[Mixture, Practised]:
    plain, practised = (kind(corpora, seed=3, silo="alpha", weights=[2.0, 1.0]) for kind in (Mixture, Practised))
    assert isinstance(practised, Practised)
    return plain, practised


def test_its_own_data_go_on_where_they_were(corpora: list[PackedTokens], tmp_path: Path) -> None:
    plain, practised = both(corpora)
    before = [practised.locate(position) for position in range(60)]
    assert before == [plain.locate(position) for position in range(60)]
    assert practised.terms == plain.terms
    first, second = packed(tmp_path / "k1", 7, 12), packed(tmp_path / "k2", 8, 9)
    practised.begin(10, first, 0.75)
    practised.begin(30, second, 0.5)
    found = [practised.locate(position) for position in range(60)]
    assert found[:10] == before[:10]
    own = [place for place in found if place[0] < 2]
    assert own == before[: len(own)]  # none is left out, none read again
    of = [
        [place[1] for place in found[begin:end] if place[0] == corpus]
        for begin, end, corpus in ((10, 30, 2), (30, 60, 3))
    ]
    assert list(map(len, of)) == [15, 15]
    for indices, tokens in zip(of, (first, second), strict=True):  # all before any again
        assert len({*indices}) == min(len(indices), tokens.num_sequences)
    assert practised.read(60) == [*plain.draws(len(own)), 30]
    assert practised.read(10) == [*plain.draws(10), 0]


def test_all_of_it_may_be_practice(corpora: list[PackedTokens], tmp_path: Path) -> None:
    _, practised = both(corpora)
    practised.begin(4, packed(tmp_path / "k", 7, 12), 1)
    assert {practised.locate(position)[0] for position in range(4, 40)} == {2}


def test_batches_go_on_from_any_position(corpora: list[PackedTokens], tmp_path: Path) -> None:
    kept = packed(tmp_path / "k", 7, 12)
    rows = []
    for start in (0, 12):
        _, practised = both(corpora)
        practised.begin(8, kept, 0.5)
        options = {"micro_batch_sequences": 2, "accumulation_steps": 2, "rank": 0, "num_ranks": 1}
        batches = Batches(practised, **options, position=start)  # type: ignore[arg-type]
        found = [next(batches) for _ in range((24 - start) // 2)]
        rows.append([one.inputs.tolist() for one in found])
        assert all(one.num_trained for one in found)
    assert rows[0][6:] == rows[1]


def test_when_it_is_time() -> None:
    every = PracticeConfig(every_rounds=2, after_rounds=1)
    assert [every.point(rounds) for rounds in range(7)] == [None, 1, 1, 3, 3, 5, 5]
    assert [PracticeConfig(every_rounds=1).point(rounds) for rounds in range(3)] == [0, 1, 2]
    assert PracticeConfig().point(9) is None


def test_what_it_does_not_go_with(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    def said(*, every: int = 1, template: str = "", **changes: object) -> str:
        silo = {"practice": {"tasks": "t.jsonl", "verifier": "ours:verify"}} | changes
        sections = {"practice": {"every_rounds": every}, "chat_template": template, "document_masking": True}
        return one_line_error(tiny_config, tmp_path, silos={"alpha": silo}, **sections)

    chat = {"template": str(tiny_text.tokenizer.parent)}
    given = "silos.alpha.practice.tasks: 't.jsonl' given; "
    assert said(every=0).startswith(
        given.replace("t.jsonl", str(Path("t.jsonl"))) + "allowed: empty with practice.every"
    )
    assert said().startswith("chat_template: '' given; allowed: a chat template with silos.alpha.practice.tasks")
    private = said(private={"epsilon": 3.0}, **chat)  # type: ignore[arg-type]
    assert private.startswith("silos.alpha.private.epsilon: 3.0 given; allowed: null with silos.alpha.practice.tasks")
    none = said(practice={"tasks": "t.jsonl"}, **chat)  # type: ignore[arg-type]
    assert none.startswith("silos.alpha.practice.verifier: '' given; allowed: package.module:function")
    no_tasks = said(practice={"verifier": "ours:verify"}, **chat)  # type: ignore[arg-type]
    assert no_tasks.endswith("allowed: empty without silos.alpha.practice.tasks")
    share = said(practice={"tasks": "t", "verifier": "a:b", "share": 0}, **chat)  # type: ignore[arg-type]
    assert share == "silos.alpha.practice.share: 0.0 given; allowed: above 0, to 1"
    pairs = {"practice": {"every_rounds": 2}, "inner": {"loss": "dpo"}, "chat_template": chat["template"]}
    alpha = {"practice": {"tasks": "t.jsonl", "verifier": "ours:verify"}}
    assert one_line_error(tiny_config, tmp_path, silos={"alpha": alpha}, document_masking=True, **pairs) == (
        "practice.every_rounds: 2 given; allowed: 0 with inner.loss=dpo: what practice keeps is conversations, no pairs"
    )


def test_a_contract_without_practice_is_what_it_was(tmp_path: Path, tiny_config: TinyConfig) -> None:
    assert "practice" not in build_contract(tiny_config(tmp_path))
    agreed = build_contract(tiny_config(tmp_path, practice={"every_rounds": 3}))
    assert agreed["practice"] == {"every_rounds": 3, "after_rounds": 0}
