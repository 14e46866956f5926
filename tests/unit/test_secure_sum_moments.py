"""What silos tell of their gradients in a secure sum: known again, bounded, and a sum that none can be."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.aggregate import OuterState
from pretrain.merge.terms import sum_share, summed_moments
from pretrain.outer.moments import MeanGradient, SecondMoment
from pretrain.outer.quantize import Parts
from pretrain.plan.bytes import traffic
from pretrain.trust.ledger import RefusedError
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error
from tests.unit.summing import (
    ADAMW,
    MUON,
    TOKENS,
    Asked,
    Silo,
    gradients,
    make,
    shapes_of,
)
from tests.unit.test_signed import begin


def test_what_a_silo_has_told_is_known_to_it_again_without_its_masks(
    tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    """As it counts in the sum, rounding and all, so that corrections of all silos add up to nothing."""
    config = make(tiny_config, tiny_text, tmp_path, **copy.deepcopy(MUON))
    aggregator, state = begin(config)
    silo = Silo(config, "alpha")
    sent, again = silo.coded(state), Silo(config, "alpha")  # started again
    told, share = again.through.told(sent, state.parameters), sum_share(config, 1, TOKENS["alpha"])
    assert sent.manifest.payloads[0].num_bytes == traffic(config, shapes_of(state), "alpha")[0].before[0]
    before = gradients(config, state, [*state.parameters], "alpha")
    for name, moment in summed_moments(config, before, shapes_of(state)).items():
        wanted = moment.values(moment.whole(before[name], share), share)
        assert told[name].keys() == wanted.keys()
        for part, value in wanted.items():
            assert torch.equal(told[name][part], value)
            masked = sent.coded.moments[name][part]
            assert (masked != moment.whole(before[name], share)[part]).all()
    for one in (silo, again):
        one.through.close("")
    aggregator.stop()


@pytest.mark.parametrize("told", [ADAMW, MUON], ids=["AdamW", "Muon"])
def test_what_clipped_gradients_cannot_make_stops_the_silo_before_it_wraps(
    told: dict[str, Any], tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    config = make(tiny_config, tiny_text, tmp_path, **copy.deepcopy(told))
    aggregator, state = begin(config)
    silo, moments = Silo(config, "alpha"), gradients(config, state, [*state.parameters], "alpha")
    agreed = summed_moments(config, moments, shapes_of(state))
    for kind, part in ((SecondMoment, "rows"), *([(MeanGradient, "values")] if told is MUON else [])):
        name = next(n for n, one in agreed.items() if isinstance(one.moment, kind) and part in one.layout)
        most, moment = agreed[name].largest(part), agreed[name].moment
        bad = moment.encode(torch.full(moment.shape, 1.5 * most)) if kind is MeanGradient else dict(moments[name])
        if kind is SecondMoment:
            bad[part] = torch.full_like(bad[part], 1.5 * most)
        message = one_line_error(
            silo.through.masked, 1, state.parameters, silo.local(state), moments | {name: bad}, 100
        )
        given = bad[part].max() if kind is SecondMoment else moment.decode(bad).max()
        assert message == (
            f"inner.clip_norm: 1 given; silo alpha: version 1: what is told of the gradients of {name} ({part}) has "
            f"{given:g}; allowed: up to {most:g}, for which a sum of gradients that are clipped so has room; "
            "nothing was sent"
        )
    assert not list(config.silo_directory("alpha").rglob("*.safetensors"))
    silo.through.close("")
    aggregator.stop()


def test_a_sum_of_moments_that_none_can_be_ends_the_aggregator_in_one_line(
    tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    """Nobody knows whose part it is; silos would be told second moments below zero."""

    class Liar(Silo):
        def told(self, state: OuterState, names: list[str]) -> dict[str, Parts]:
            honest = super().told(state, names)
            return {name: {part: -3 * value for part, value in parts.items()} for name, parts in honest.items()}

    config = make(tiny_config, tiny_text, tmp_path, **copy.deepcopy(ADAMW))
    asked = Asked(config, beta=Liar)
    for silo in asked.silos:
        asked.answer(silo)
    said = "version 1: what alpha, beta, gamma tell of the gradients of .* is no sum of what they may tell: its .* add "
    with pytest.raises(RefusedError, match=said):
        asked.aggregator.merge(asked.state, asked.deliveries)
    asked.close()
