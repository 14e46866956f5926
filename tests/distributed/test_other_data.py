"""A position counts in the text that it was counted in: other text or shares after a stop are refused."""

import json
from dataclasses import replace
from pathlib import Path

from pretrain.config.keys import RunConfig
from tests.conftest import TinyConfig
from tests.distributed.federation import launched
from tests.support import TinyText


def with_silo(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, silos={"alpha": replace(config.silos["alpha"], **changes)})


def test_other_text_after_a_resume_is_refused(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    splits = [str(tiny_text.packed[name] / "train") for name in ("alpha", "beta")]
    config = tiny_config(tmp_path, exchange={"kind": "none"}, inner={"num_steps": 4})
    config = with_silo(config, data=splits, data_weights=[1.0, 1.0], eval_sequences=4)
    code, said = launched(config)
    assert code == 0, said
    checkpoint = Path(config.directory) / "silos" / "alpha" / "checkpoints" / "step-00000004"
    assert json.loads((checkpoint / "state.json").read_text())["data"]["sequence_tokens"] == 16

    code, said = launched(with_silo(config, data_weights=[9.0, 1.0]))
    assert code == 2
    meaning = (
        "data_weights of the silo changed since it was written, and the 16 sequences that it counts as read are other "
        "ones now"
    )
    assert f"{checkpoint}: {meaning}; allowed: what it was written with, or accept_other_data=true" in said
    code, said = launched(with_silo(config, data=splits[::-1], accept_other_data=True))
    assert code == 0, said
    logs = "".join(file.read_text() for file in (Path(config.directory) / "logs").rglob("*") if file.is_file())
    assert f"warning: {checkpoint}: {meaning.replace('_weights', '')}; it goes on, as accept_other_data says" in logs
