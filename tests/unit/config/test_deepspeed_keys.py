"""The keys that we know of DeepSpeed's configuration are those that the installed DeepSpeed asks for."""

from pathlib import Path
from typing import Any

import pytest

from pretrain.config.deepspeed_keys import KNOWN, OWNED
from pretrain.config.load import load_config
from tests.support import TinyText, one_line_error, write_settings

UNKNOWN = ": unknown key given; allowed: DeepSpeed's, such as"
READ = ("activation_checkpointing", "aio", "flops_profiler")  # sections whose keys DeepSpeed takes one by one


class Asked(dict[str, Any]):
    """A configuration that notes which of its keys are asked for."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        """Asked as `key in given.keys()`."""
        return self

    def __copy__(self) -> "Asked":
        return self


def installed_keys() -> dict[str, tuple[str, ...]]:
    """Section to its keys, of the DeepSpeed that is installed; what it only names to refuse it is none."""
    from deepspeed.runtime import config as theirs
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    sections = {name: Asked({}) for name in READ}
    given = Asked({"train_batch_size": 1, **sections})
    theirs.DeepSpeedConfig(given)
    found = {"": given.asked - theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()}
    found |= {name: section.asked for name, section in sections.items()}
    zero, typed = "zero_optimization", DeepSpeedZeroConfig.model_fields
    found[zero] = {name for key, field in typed.items() for name in (key, field.alias) if name}
    found[zero] -= theirs._REMOVED_ZERO_CONFIG_KEYS.keys()
    found[f"{zero}.offload_param"] = set(DeepSpeedZeroOffloadParamConfig.model_fields)
    found[f"{zero}.offload_optimizer"] = set(DeepSpeedZeroOffloadOptimizerConfig.model_fields)
    return {section: tuple(sorted(keys)) for section, keys in found.items()}


def test_they_are_those_of_the_installed_deepspeed() -> None:
    installed = installed_keys()
    assert installed == KNOWN, (
        f"DeepSpeed has changed: check pretrain/config/deepspeed_keys.py and write KNOWN = {installed}"
    )
    assert set(KNOWN[""]) >= OWNED.keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, f"zero_optimisation{UNKNOWN} zero_optimization"),
        ({"zero_optimization": {"stgae": 2}}, f"zero_optimization.stgae{UNKNOWN} stage"),
        (
            {"zero_optimization": {"offload_optimizer": {"devcie": "cpu"}}},
            f"zero_optimization.offload_optimizer.devcie{UNKNOWN} device",
        ),
        ({"aio": {"queue_dept": 1}}, f"aio.queue_dept{UNKNOWN} queue_depth"),
        ({"aio": 3}, "aio: 3 given; allowed: a section of keys and values"),
        ({"bfloat16": {"enabled": True}}, "bfloat16: {'enabled': True} given; set precision instead"),
    ],
)
def test_another_key_is_refused(tmp_path: Path, tiny_text: TinyText, given: dict[str, Any], message: str) -> None:
    path = write_settings(tmp_path, tiny_text, silos={"beta": {"deepspeed": given}})
    assert one_line_error(load_config, [path]) == f"silos.beta.deepspeed.{message}"


def test_keys_that_it_knows_pass(tmp_path: Path, tiny_text: TinyText) -> None:
    zero = {"stage": 3, "stage3_max_live_parameters": 10, "offload_param": {"device": "cpu", "pin_memory": False}}
    given = {"zero_optimization": zero, "wall_clock_breakdown": True, "aio": {"queue_depth": 1}}
    path = write_settings(tmp_path, tiny_text, silos={"beta": {"deepspeed": given}})
    assert load_config([path]).silos["beta"].deepspeed == given
