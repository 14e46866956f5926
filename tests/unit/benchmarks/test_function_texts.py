"""The recipe of the function calling benchmark: what is kept, and that no question that is held out is trained."""

import json
from pathlib import Path
from typing import Any

from benchmarks.function_texts import FILES, by_domain, held_out, training
from data_tools.asked import question
from data_tools.calls import RIGHT, verdict
from data_tools.conversations import normalised


def record(text: str, arguments: dict[str, list[Any]], *, name: str = "get_stock_price") -> tuple[Any, Any]:
    properties = {one: {"type": "dict" if one == "any" else "float"} for one in [*arguments, "more"]}
    tool = {"name": name, "description": "Tells it.", "parameters": {"type": "dict", "properties": properties}}
    return {"question": [[{"role": "user", "content": text}]], "function": [tool]}, [{name: arguments}]


KEPT = [
    record("Price of Acme Corp for 3 days, 3.5 at most", {"company": ["Acme Corp"], "days": [3], "most": ["", 3.5]}),
    record(
        "What did Bolt cost on day 12?", {"company": ["Bolt"], "days": [12], "unit": ["", "USD"]}, name="stock.cost"
    ),
]
LEFT_OUT = [
    record("Price of Acme for 3 of 3 days", {"company": ["Acme"], "days": [3]}),  # which of the two
    record("Price of Acme for three days", {"company": ["Acme"], "days": [3]}),  # in other words
    record("Do it for Acme", {"company": ["Acme"]}, name="do_it"),  # of no silo
    record("Price of Köln for 3 days", {"company": ["Köln"], "days": [3]}),
]


def write(folder: Path) -> Path:
    (folder / "possible_answer").mkdir()
    for name in FILES:
        chosen = [*KEPT, *LEFT_OUT] if name == "multiple" else []
        asked = [{"id": f"{name}_{place}"} | one for place, (one, _) in enumerate(chosen)]
        right = [{"id": f"{name}_{place}", "ground_truth": one} for place, (_, one) in enumerate(chosen)]
        for file, rows in ((f"BFCL_v4_{name}.json", asked), (f"possible_answer/BFCL_v4_{name}.json", right)):
            (folder / file).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_questions_are_kept_whose_words_are_known_and_told_anew(tmp_path: Path) -> None:
    found = by_domain(write(tmp_path))
    assert {silo: len(asked) for silo, asked in found.items()} == {"money": 2, "science": 0, "places": 0, "leisure": 0}
    money = found["money"]
    exam = [*held_out(money, "money")]
    assert [one["messages"][0]["content"] for one in exam] == [one[0]["question"][0][0]["content"] for one in KEPT]
    trained = [*training(money, "money", num_variants=50)]
    assert trained == [*training(money, "money", num_variants=50)]
    texts = {one["messages"][0]["content"] for one in trained}
    assert len(texts) > 60
    assert not texts & {one["messages"][0]["content"] for one in exam}
    for one in trained:
        conversation = normalised(one)  # with tools whose schema is one, and calls of what they declare
        [call] = conversation.messages[1]["tool_calls"]
        for value in call["function"]["arguments"].values():
            assert str(value) in one["messages"][0]["content"]
    # What was kept is answered by the leaderboard's own values, and by nothing else.
    asked = question(1, json.dumps(exam[0]))
    said = {"name": "get_stock_price", "arguments": {"company": "Acme Corp", "days": 3, "most": 3.5}}
    for days, expected in ((3, RIGHT), (4, "other value")):
        text = f"<tool_call>{json.dumps(said | {'arguments': said['arguments'] | {'days': days}})}</tool_call>"  # type: ignore[dict-item]
        assert verdict(text, asked.expected, asked.declared, is_cut=False) == expected
