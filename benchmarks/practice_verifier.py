"""What is right, by reasoning-gym: the verifier of benchmarks/practice.py."""

from typing import Any

import reasoning_gym


def verify(task: dict[str, Any], messages: list[dict[str, Any]]) -> bool:
    """Whether the last message has the full score of the task's kind."""
    score = reasoning_gym.get_score_answer_fn(task["kind"])
    return bool(score(messages[-1]["content"].strip(), task["entry"]) == 1.0)
