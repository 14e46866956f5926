"""Conversations made from the installed Python: whole functions, each in one institution, that a template renders."""

import json
from pathlib import Path

from data_tools.chat_template import find_template
from data_tools.conversations import normalised
from data_tools.dialogues import PUBLIC, SENTENCE, functions_of, write_conversations
from data_tools.tokenizer import CHAT_TOKENS
from tests.conversations import block, encoder, with_tokens
from tests.support import ROOT, TinyText

SOURCE = '''
import math

@cached
def area(radius: float, exact: bool = True):
    """Tell how large a circle is. It has no corners.

    More of it.
    """
    return math.pi * radius**2  # about

class Box:
    def open(self, *, key: "str | None" = None):
        """Open it, if the key is the one that fits."""
        return key == self.key

    def _close(self):
        """Nobody's, as its name begins with an underscore."""
        return None

def many(*values):
    """Of whatever is given, nothing is known of how many."""
    return values

def empty():
    """There is nothing in here that it could do."""
'''


def test_functions_are_taken_from_a_file_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "circles.py").write_text(SOURCE)
    area, opened = functions_of(tmp_path / "circles.py")
    assert (area.module, area.signature) == ("circles", "area(radius, exact)")
    assert area.arguments == (("radius", "number", True), ("exact", "boolean", False))
    assert area.summary == "Tell how large a circle is. It has no corners."
    assert area.code == ("def area(radius: float, exact: bool = True):\n    return math.pi * radius**2  # about")
    assert (opened.module, opened.arguments) == ("Box", (("key", "string", False),))
    assert opened.code == 'def open(self, *, key: "str | None" = None):\n    return key == self.key'
    (tmp_path / "broken.py").write_text("def (")
    assert not [*functions_of(tmp_path / "broken.py")]


def test_each_conversation_is_one_and_no_function_is_in_two_institutions(tmp_path: Path, tiny_text: TinyText) -> None:
    files = write_conversations(tmp_path / "one", limit=24)
    assert [*files] == ["docs", "code", "calls", PUBLIC]
    tokenizer = with_tokens(tiny_text.tokenizer, CHAT_TOKENS, tmp_path / "tokenizer" / "tokenizer.json")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_bytes((ROOT / "data_tools" / "chatml.j2").read_bytes())
    made, told = encoder(tokenizer, find_template(tokenizer, None, "")), []
    for name, file in files.items():
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(records) == 24
        encoded = made.encode(block(*records))
        assert (len(encoded.document_tokens), encoded.bad) == (24, [])
        kinds = {normalised(record).kind for record in records}
        assert kinds <= ({"with calls"} if name == "calls" else {"one turn", "several turns"})
        for record in records if name != PUBLIC else ():
            asked, said = (record["messages"][place]["content"] for place in (0, 1))
            summary = record["tools"][0]["function"]["description"] if name == "calls" else said
            told.append(SENTENCE.split(asked.split(": ", 1)[1] if name == "code" else summary)[0])
    assert len({*told}) == len(told) == 72

    again = write_conversations(tmp_path / "two", limit=24)
    assert [file.read_bytes() for file in again.values()] == [file.read_bytes() for file in files.values()]
    files["docs"].write_text("kept\n")
    assert write_conversations(tmp_path / "one", limit=24)["docs"].read_text() == "kept\n"


def test_a_call_has_the_values_that_were_asked_for(tmp_path: Path) -> None:
    calls = write_conversations(tmp_path, limit=24)["calls"]
    for line in calls.read_text().splitlines():
        record = json.loads(line)
        asked, called, result, said = record["messages"]
        function = called["tool_calls"][0]["function"]
        assert function["name"] == record["tools"][0]["function"]["name"]
        for name, value in function["arguments"].items():
            assert f"{name} {json.dumps(value)}" in asked["content"]
        assert result["content"] in said["content"]
