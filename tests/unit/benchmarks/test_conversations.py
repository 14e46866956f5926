"""What the fine-tuning benchmark makes of a document of each corpus."""

from benchmarks.conversations import CHARACTERS, KINDS, conversations, of_sentences, until


def test_what_is_said_ends_with_a_sentence() -> None:
    first, second = "a" * (CHARACTERS - 20) + ".", "b" * 30 + "."
    assert until(f"{first}\n{second}") == first
    assert until("One. Two.\n Three.") == "One. Two. Three."
    assert until("c" * 2 * CHARACTERS) == "c" * CHARACTERS  # a sentence for which there is no room


def test_a_conversation_of_each_kind() -> None:
    assert KINDS["law"]("§ 3-1. Unlawful acts.\nNobody shall.\nWhoever does pays.") == (
        "§ 3-1. Unlawful acts.",
        "Nobody shall. Whoever does pays.",
    )
    assert KINDS["law"]("a heading alone") is None
    asked = "Question: What is it?\nAnswer: A cold.\nQuestion: And then?\nAnswer: It goes."
    assert KINDS["medicine"](asked) == ("What is it?", "A cold.")
    assert KINDS["encyclopedia"]("Title\nOne is. Two is. Three is. Four is.") == (
        "One is. Two is.",
        "Three is. Four is.",
    )
    paragraphs = [f"{word} is what this paragraph is about, and long enough." for word in ("One", "Two", "Three")]
    assert KINDS["literature"]("\n\n".join(paragraphs)) == (paragraphs[0], paragraphs[1])
    assert of_sentences("Short. This sentence is long enough. So is the one that follows it.") == (
        "This sentence is long enough.",
        "So is the one that follows it.",
    )


def test_a_document_without_one_is_left_out() -> None:
    (found,) = conversations(["no heading", "heading\ncontent"], KINDS["law"])
    assert [message["content"] for message in found["messages"]] == ["heading", "content"]
